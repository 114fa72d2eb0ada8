"""Learned vectors among a text's tokens: where they stand, what they begin as, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_hf import make

from mmrep.config import ConfigError, component
from mmrep.testing import check_encoder

PLAIN = {"type": "text-transformer", "tokenizer": "bytes", "width": 16, "depth": 1, "heads": 2, "max_length": 24}


def save(kind: str, folder: Path) -> dict:
    torch.manual_seed(0)
    model, tokenizer = make(kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"type": "hf-text", "path": str(folder)}


def build(inner: dict, **fields):
    torch.manual_seed(0)
    return component("encoders", "prompt-tuned-text", encoder=inner, **fields).build().eval()


def read(encoder, *texts: str):
    with torch.no_grad():
        return encoder(encoder.collate([encoder.prepare(text) for text in texts]))


@pytest.mark.parametrize("kind", ["plain", "bert", "clip", "gpt2"])
def test_contract(kind: str, tmp_path: Path):
    inner = PLAIN if kind == "plain" else save(kind, tmp_path)
    check_encoder(build(inner, context=2, words=("w3",)))


@pytest.mark.parametrize("kind", ["plain", "bert", "clip"])
def test_before_training_nothing_has_changed(kind: str, tmp_path: Path):
    """A context that begins as a text is that text; a word of its own begins as its own tokens."""
    inner = PLAIN if kind == "plain" else save(kind, tmp_path)
    encoder = build(inner, context="w1 w2" + (" " if kind == "plain" else ""), words=("w3", "w3 w4"))
    texts = ["w5 w3", "w3 w4 w6"]
    found = read(encoder, *texts)
    plain = encoder.inner
    with torch.no_grad():
        wanted = plain(plain.collate([plain.prepare(f"w1 w2 {text}") for text in texts]))
    torch.testing.assert_close(found.tokens.values, wanted.tokens.values)
    if kind == "clip":
        torch.testing.assert_close(found.pooled, wanted.pooled)


def test_learned_vectors_stand_where_they_should(tmp_path: Path):
    encoder = build(save("bert", tmp_path), context=2, words=("w3", "w3 w4"))
    V = encoder.vocabulary
    first, second = (encoder.prepare(text)["ids"].tolist() for text in ("w5 w3", "w3 w4 w3"))
    assert first == [1, V, V + 1, 3 + 5, V + 2, 59]
    assert second == [1, V, V + 1, V + 3, V + 4, V + 2, 59]  # the longer name first
    assert encoder.untuned("w5 w3")["ids"].tolist() == [1, 8, 6, 59]
    before = read(encoder, "w5 w9").tokens.values, read(encoder, "w5 w3").tokens.values
    with torch.no_grad():
        encoder.learned[2:].add_(torch.randn(3, 16))
    torch.testing.assert_close(read(encoder, "w5 w9").tokens.values, before[0])
    assert (read(encoder, "w5 w3").tokens.values - before[1]).abs().max() > 0.1


def test_long_texts_make_room_for_the_context(tmp_path: Path):
    encoder = build(save("bert", tmp_path), context=3)
    ids = encoder.prepare("w1 " * 40)["ids"]
    assert len(ids) == 16
    assert ids[-1] == 59


@pytest.mark.parametrize(("kind", "fields", "message"), [
    ("siglip", {}, "reads its padding"),
    ("bert", {"context": 14}, "14 vectors, and the encoder reads 14 tokens"),
    ("bert", {"context": 0, "words": ("",)}, "leaves nothing of ''"),
])  # fmt: skip
def test_what_cannot_be_is_refused(kind: str, fields: dict, message: str, tmp_path: Path):
    with pytest.raises((ValueError, ConfigError), match=message):
        build(save(kind, tmp_path), **fields)
