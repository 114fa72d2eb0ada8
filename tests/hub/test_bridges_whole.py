"""Whole joint models of transformers by `mmrep.load`: embeddings, logits, bounds, odd sizes, long and empty texts."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import mmrep
from mmrep.encoder import BadSampleError
from tests.hub import joint_toys

PICTURES = [
    Image.fromarray(np.random.default_rng(n).integers(0, 255 - 40 * n, (*size, 3), dtype=np.uint8))
    for n, size in enumerate([(30, 41), (16, 16), (64, 20), (7, 5), (17, 129)])
]
TEXTS = ["w1 w2 w3", "w9", "w4 " * 30, "w5 w6 w7 w8 w1", " w2  w3 "]


@torch.no_grad()
def library(kind, model, processor, pictures, texts):
    """Unit embeddings of pictures and texts, and ``logits_per_image``; one padded batch, by the library's processor."""
    inputs = dict(processor.image_processor(pictures, return_tensors="pt"))
    padding = "max_length" if kind == "siglip2" else True
    coded = dict(processor.tokenizer(texts, return_tensors="pt", padding=padding, truncation=True, max_length=16))
    if kind == "siglip2":
        del coded["attention_mask"]  # it is called without one, as it was trained
    images = model.get_image_features(**inputs).pooler_output
    words = model.get_text_features(**coded).pooler_output
    logits = model(**inputs, **coded).logits_per_image
    return F.normalize(images, dim=1), F.normalize(words, dim=1), logits


def logits(model, one, other):
    """What the model's similarity becomes by its scale and bias."""
    temperature = model.temperature("default")
    found = temperature.scale * torch.as_tensor(one) @ torch.as_tensor(other).T
    return found if temperature.bias is None else found + temperature.bias


@pytest.mark.parametrize("kind", joint_toys.IMAGE_TEXT)
def test_both_towers_and_their_logits_are_the_librarys(kind, tmp_path):
    model, processor = joint_toys.image_text(kind, tmp_path)
    ours = mmrep.load(tmp_path)
    images, texts, wanted = library(kind, model, processor, PICTURES, TEXTS)
    found = ours.encode(PICTURES, "image"), ours.encode(TEXTS, "text")
    np.testing.assert_allclose(found[0], images, atol=2e-5)
    np.testing.assert_allclose(found[1], texts, atol=2e-5)
    assert (images[0] - images[1]).abs().max() > 5e-4  # tolerances are far below
    assert (texts[0] - texts[1]).abs().max() > 5e-4  # tolerances are far below
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, *found), wanted, atol=1e-4, rtol=1e-4)
    temperature = ours.temperature("default")
    if kind == "align":
        torch.testing.assert_close(1 / temperature.scale, model.temperature.detach().reshape(1))
    else:
        assert torch.equal(temperature.log_scale, model.logit_scale.detach().reshape(1))
    assert (temperature.bias is None) is (kind != "siglip2")
    alone = np.concatenate([ours.encode([text], "text") for text in TEXTS])
    np.testing.assert_allclose(alone, found[1], atol=2e-6)  # no padding can matter


@pytest.mark.parametrize("fusion", [False, True])
def test_claps_towers_and_logits_are_the_librarys(fusion, tmp_path):
    """Clips of other lengths than the window, shorter only: of longer ones the library draws a random part."""
    model, processor = joint_toys.clap(tmp_path, fusion=fusion)
    ours = mmrep.load(tmp_path)
    rate = processor.feature_extractor.sampling_rate
    random = np.random.default_rng(0)
    waves = [random.normal(size=size).astype(np.float32) / 5 for size in (rate, rate // 3, rate // 7 + 5)]
    heard = processor.feature_extractor(waves, sampling_rate=rate, return_tensors="pt")
    heard["is_longer"] = torch.zeros(3, 1, dtype=torch.bool)  # where fusion, it marks one of them by chance
    coded = processor.tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True, max_length=16)
    coded.pop("token_type_ids", None)
    with torch.no_grad():
        audio, texts = model.get_audio_features(**heard).pooler_output, model.get_text_features(**coded).pooler_output
        wanted = model(**heard, **coded)
        found = ours.encode([{"array": w, "sampling_rate": rate} for w in waves], "audio"), ours.encode(TEXTS, "text")
        torch.testing.assert_close(logits(ours, *found), wanted.logits_per_audio, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(found[0], audio, atol=2e-5)
    np.testing.assert_allclose(found[1], texts, atol=2e-5)
    assert (audio @ audio.T).min() < 0.9999
    stereo = [{"array": np.stack([1.5 * w, 0.5 * w]), "sampling_rate": rate} for w in waves]  # whose mean is w
    np.testing.assert_allclose(ours.encode(stereo, "audio"), audio, atol=2e-5)


@pytest.mark.parametrize(("kind", "highest", "lowest"), [
    ("metaclip2", 100, 1), ("altclip", 100, 1), ("chinese-clip", 100, 1), ("clap", 100, 1),
    ("siglip2", None, None), ("align", None, None),
])  # fmt: skip
def test_the_scale_is_held_where_training_held_it(kind, highest, lowest, tmp_path):
    joint_toys.clap(tmp_path) if kind == "clap" else joint_toys.image_text(kind, tmp_path)
    temperature = mmrep.load(tmp_path).temperature("default")
    for start, bound in [(1e4, highest), (1e-3, lowest)]:
        with torch.no_grad():
            temperature.log_scale.fill_(math.log(start))
        temperature.clamp_()
        assert temperature.scale.item() == pytest.approx(start if bound is None else bound, rel=1e-4)


@pytest.mark.parametrize("kind", [*joint_toys.IMAGE_TEXT, "clap"])
def test_empty_text_is_refused_and_one_word_is_not(kind, tmp_path):
    joint_toys.clap(tmp_path) if kind == "clap" else joint_toys.image_text(kind, tmp_path)
    ours = mmrep.load(tmp_path)
    for empty in ("", "  \n"):
        with pytest.raises(BadSampleError, match="empty text"):
            ours.encode([empty], "text")
    assert np.isfinite(ours.encode(["w1"], "text")).all()


@pytest.mark.parametrize("kind", joint_toys.IMAGE_TEXT)
def test_weights_of_16_bits_are_read_in_32(kind, tmp_path):
    import transformers as hf

    model, processor = joint_toys.image_text(kind, tmp_path)
    model.bfloat16().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    wide = getattr(hf, type(model).__name__).from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = mmrep.load(tmp_path)
    images, texts, wanted = library(kind, wide, processor, PICTURES, TEXTS)
    found = ours.encode(PICTURES, "image"), ours.encode(TEXTS, "text")
    np.testing.assert_allclose(found[0], images, atol=2e-5)
    np.testing.assert_allclose(found[1], texts, atol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, *found), wanted, atol=1e-4, rtol=1e-4)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_siglip_2_pads_on_the_side_that_its_tokenizer_does(tmp_path):
    """It reads its padding, so the side is part of the text."""
    model, processor = joint_toys.image_text("siglip2", tmp_path)
    right = mmrep.load(tmp_path).encode(TEXTS, "text")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    processor.tokenizer.padding_side = "left"
    _, texts, _ = library("siglip2", model, processor, PICTURES[:1], TEXTS)
    left = mmrep.load(tmp_path).encode(TEXTS, "text")
    np.testing.assert_allclose(left, texts, atol=2e-5)
    assert np.abs(left - right).max() > 1e-3


def test_a_checkpoint_without_its_scale_is_refused(tmp_path):
    joint_toys.image_text("metaclip2", tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    del values["logit_scale"]
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(mmrep.hub.fetch.ModelFolderError, match="no 'logit_scale'"):
        mmrep.load(tmp_path)


@pytest.mark.parametrize("kind", ["clap", "xclip", "pe_audio"])
def test_other_weights_of_16_bits_are_those_of_the_same_values_in_32(kind, tmp_path):
    """And the library in 32 bits, by the tests of these values."""
    make = {"clap": joint_toys.clap, "xclip": joint_toys.xclip, "pe_audio": lambda f: joint_toys.pe("pe_audio", f)}[
        kind
    ]
    model, _ = make(tmp_path)
    model.bfloat16().save_pretrained(tmp_path)
    ours = mmrep.load(tmp_path).encode(TEXTS, "text")
    model.float().save_pretrained(tmp_path)
    np.testing.assert_array_equal(mmrep.load(tmp_path).encode(TEXTS, "text"), ours)
