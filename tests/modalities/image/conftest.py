"""Tiny open_clip models, added to its registry for these tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
MODELS = {
    "tiny-vit": {"vision_cfg": VISION},
    "tiny-vit-avg": {
        "quick_gelu": True,
        "vision_cfg": {**VISION, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    },
    "tiny-resnet": {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}},
    "tiny-timm": {
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    },
}


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    for name, model in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 24, "text_cfg": TEXT, **model}))
    open_clip.add_model_config(folder)
    return folder
