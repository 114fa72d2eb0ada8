"""The encoder contract, run on every text encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_hf import KINDS

from mmrep.config import component
from mmrep.encoder import BadSampleError
from mmrep.testing import check_encoder


@pytest.mark.parametrize("fields", [
    {}, {"causal": True}, {"dropout": 0.1, "drop_path": 0.1}, {"max_length": 3}
])  # fmt: skip
def test_text_transformer(fields: dict[str, object]) -> None:
    torch.manual_seed(0)
    check_encoder(component("encoders", "text-transformer", width=32, depth=2, **fields).build())


def test_text_transformer_by_its_class() -> None:
    from mmrep.modalities.text.transformer import TextTransformer

    check_encoder(TextTransformer)


def test_text_transformer_with_a_learned_tokenizer(tmp_path: Path) -> None:
    chosen = component("encoders", "text-transformer", tokenizer="sentencepiece", vocab_size=500, width=32, depth=2)
    chosen.cls.fit(chosen.config, ["a red cat", "eine rote Katze", "赤い猫"] * 3, tmp_path)
    check_encoder(chosen.build(files=tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_hf_text(hf_folder: Callable[[str], Path], kind: str) -> None:
    check_encoder(component("encoders", "hf-text", path=str(hf_folder(kind))).build())


def test_oddities_are_read_or_refused_for_their_own_cause() -> None:
    encoder = component("encoders", "text-transformer", width=8, depth=1, heads=1).build()
    found = {}
    for name, raw in encoder.oddities(0).items():
        try:
            found[name] = len(encoder.prepare(raw)["ids"])
        except BadSampleError as error:
            found[name] = error.cause
    empty = {"no characters", "no bytes", "blanks", "an empty list", "a list of blanks"}
    wrong = {
        "a lone surrogate", "wrong UTF-8", "UTF-8 cut in a character", "a number", "not a number", "nothing",
        "None in a list", "a number in a list", "a list in a list", "an array of numbers", "a dict",
    }  # fmt: skip
    assert {name for name, cause in found.items() if cause == "empty text"} == empty
    assert {name for name, cause in found.items() if cause == "not text"} == wrong
    assert found["a million characters"] == found["a million letters without a blank"] == encoder.max_length
