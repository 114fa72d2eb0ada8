"""Joint checkpoints of transformers and single image models: what their own calls give, and their temperature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import mmrep
from tests.modalities.image import image_tiny_hf
from tests.modalities.text import tiny_hf

PICTURES = [
    Image.fromarray(np.random.default_rng(n).integers(0, 255, (*size, 3), dtype=np.uint8))
    for n, size in enumerate([(30, 41), (16, 16), (64, 20)])
]
TEXTS = ["w1 w2 w3", "w9", "w5 w6 w7 w8 w1"]


def value(found):
    return getattr(found, "pooler_output", found)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_joint_model_is_both_towers_and_the_temperature(kind, tmp_path):
    model, processor = image_tiny_hf.save(kind, tmp_path)
    _, tokenizer = tiny_hf.make(kind)
    tokenizer.save_pretrained(tmp_path)
    ours = mmrep.load(tmp_path)
    longest = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {"padding": True}
    with torch.no_grad():
        images = value(model.get_image_features(**processor(PICTURES, return_tensors="pt")))
        coded = tokenizer(TEXTS, return_tensors="pt", **longest)
        mask = {} if kind == "siglip" else {"attention_mask": coded["attention_mask"]}
        texts = value(model.get_text_features(input_ids=coded["input_ids"], **mask))
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    np.testing.assert_allclose(ours.encode(PICTURES, "image"), images, atol=2e-5)
    np.testing.assert_allclose(ours.encode(TEXTS, "text"), texts, atol=2e-5)
    temperature = ours.temperature("default")
    assert torch.equal(temperature.log_scale, model.logit_scale.detach().reshape(1))
    assert (temperature.bias is None) == (kind == "clip")
    if kind == "siglip":
        assert temperature.bias.item() == model.logit_bias.item()
    ours.save_pretrained(tmp_path / "again")
    again = mmrep.load(tmp_path / "again")
    np.testing.assert_array_equal(again.encode(PICTURES, "image"), ours.encode(PICTURES, "image"))
    assert torch.equal(again.temperature("default").log_scale, temperature.log_scale)


@pytest.mark.parametrize(("kind", "pool"), [("vit", "cls"), ("dinov2-registers", "pooler"), ("clip-vision", "pooler")])
def test_an_image_model_is_pooled_as_its_kind_is(kind, pool, tmp_path):
    model, processor = image_tiny_hf.save(kind, tmp_path)
    with torch.no_grad():
        out = model(**processor(PICTURES, return_tensors="pt"))
    wanted = out.last_hidden_state[:, 0] if pool == "cls" else out.pooler_output
    np.testing.assert_allclose(mmrep.load(tmp_path).encode(PICTURES), wanted, atol=2e-5)
