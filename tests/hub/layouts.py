"""Tiny random models in the layouts of timm and open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def timm_folder(folder: Path) -> Any:
    """A model of timm as its own ``save_for_hf`` writes it; the model."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7).eval()
    save_for_hf(model, folder, safe_serialization=True)
    return model


def open_clip_folder(folder: Path, *, sigmoid: bool = False) -> None:
    """A CLIP of open_clip, or with a bias, in a folder as open_clip pushes it."""
    import open_clip

    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    if sigmoid:
        config |= {"init_logit_bias": -7.5, "init_logit_scale": 2.0, "custom_text": True}
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear"}
    document = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    made = (open_clip.CustomTextCLIP if sigmoid else open_clip.CLIP)(
        **{key: value for key, value in json.loads(json.dumps(config)).items() if key != "custom_text"}
    )
    with torch.no_grad():
        made.logit_scale.add_(0.3)
    save_file({key: value.contiguous() for key, value in made.state_dict().items() if key != "attn_mask"},
              folder / "open_clip_model.safetensors")  # fmt: skip
