"""Towers of a joint space that were saved alone, each a checkpoint of its own, and those that cannot be read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mmrep
from mmrep.config import parse
from mmrep.hub.fetch import ModelFolderError
from mmrep.model import Model, ModelConfig
from mmrep.recipe import read_recipe
from mmrep.run import Run
from tests.modalities.image import image_tiny_hf
from tests.modalities.text import tiny_hf
from tests.world import make_world, recipe

PICTURES = [
    Image.fromarray(np.random.default_rng(n).integers(0, 255, (*size, 3), dtype=np.uint8))
    for n, size in enumerate([(30, 41), (16, 16), (64, 20)])
]
TEXTS = ["w1 w2 w3", "w9", "w4 " * 30]


def apart(folder):
    """One CLIP, whole and as its two parts, each with its projection and what it needs to read."""
    import transformers as hf

    _, processor = image_tiny_hf.save("clip", folder / "whole")
    tokenizer = tiny_hf.make("clip")[1]
    tokenizer.save_pretrained(folder / "whole")
    for name, reader in (("vision", processor), ("text", tokenizer)):
        whole = hf.CLIPConfig.from_pretrained(folder / "whole")
        config = getattr(whole, f"{name}_config")
        config.projection_dim = whole.projection_dim
        part: Any = getattr(hf, f"CLIP{name.capitalize()}ModelWithProjection")
        part.from_pretrained(folder / "whole", config=config).save_pretrained(folder / name)
        reader.save_pretrained(folder / name)
    return folder / "vision", folder / "text"


def unit(values):
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_a_part_saved_alone_is_one_tower_with_its_projection(tmp_path):
    vision, text = apart(tmp_path)
    whole, pictures, texts = mmrep.load(tmp_path / "whole"), mmrep.load(vision), mmrep.load(text)
    assert (pictures.modalities, texts.modalities) == (["image"], ["text"])
    assert pictures.dim == texts.dim == whole.dim == 12
    assert not pictures.config.temperatures
    np.testing.assert_allclose(unit(pictures.encode(PICTURES)), whole.encode(PICTURES, "image"), atol=1e-6)
    np.testing.assert_allclose(unit(texts.encode(TEXTS)), whole.encode(TEXTS, "text"), atol=1e-6)


def test_towers_of_several_checkpoints_go_together_by_their_paths(tmp_path):
    """As LanguageBind's do: towers of one space, in folders of their own, two of them reading pictures."""
    vision, text = apart(tmp_path)

    def tower(kind, path):
        return {"encoder": {"type": kind, "path": str(path)}, "pool": "native", "projector": "identity"}

    towers = {"depth": tower("hf-image", vision), "thermal": tower("hf-image", vision), "text": tower("hf-text", text)}
    model = Model(parse(ModelConfig, {"dim": 12, "towers": towers})).eval()
    whole = mmrep.load(tmp_path / "whole")
    for name in ("depth", "thermal"):
        np.testing.assert_allclose(model.encode(PICTURES, name), whole.encode(PICTURES, "image"), atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS, "text"), whole.encode(TEXTS, "text"), atol=1e-6)
    model.save_pretrained(tmp_path / "together")
    again = mmrep.load(tmp_path / "together")
    np.testing.assert_array_equal(again.encode(PICTURES, "depth"), model.encode(PICTURES, "depth"))


@pytest.mark.parametrize("first", [None, "vision", "text"])
def test_a_recipe_of_towers_that_begin_each_from_its_own_checkpoint_is_the_joint_model(first, tmp_path):
    """By ``path`` of each tower, or one by ``start:`` and the other by its path."""
    apart(tmp_path)
    whole = mmrep.load(tmp_path / "whole")
    towers = {
        name: {
            "encoder": {"type": f"hf-{name}", "path": str(tmp_path / part)},
            "pool": "native",
            "projector": "identity",
        }
        for name, part in (("image", "vision"), ("text", "text"))
    }
    if first is not None:
        towers.pop({"vision": "image", "text": "text"}[first])
    scale = float(whole.temperature("default").scale)
    data = recipe(make_world(tmp_path / "world"))
    data["model"] = {"dim": 12, "towers": towers, "normalize": True, "temperatures": {"default": {"scale": scale}}}
    data |= {} if first is None else {"start": str(tmp_path / first)}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(data))
    model = Run(read_recipe(str(tmp_path / "both.yaml"))).model.eval()
    wanted = whole.encode(PICTURES, "image") @ whole.encode(TEXTS, "text").T
    found = model.encode(PICTURES, "image") @ model.encode(TEXTS, "text").T
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(wanted - wanted.mean()).max() > 0.01
    assert float(model.temperature("default").scale) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("kind", ["LanguageBindVideo", "LanguageBindAudio"])
def test_languagebinds_own_classes_are_refused_with_a_way_on(kind, tmp_path):
    vision = {"model_type": "clip_vision_model", "add_time_attn": True, "num_frames": 8}
    document = {"model_type": kind, "architectures": [kind], "projection_dim": 12, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(document))
    torch.save({}, tmp_path / "pytorch_model.bin")  # as it is released
    with pytest.raises(ModelFolderError, match=f"{kind}.*package of its own.*saved again as.*CLIPVisionModelWithProj"):
        mmrep.load(tmp_path)
