"""The view of random chunks: whole units, the seed's choice, and where the chunk lay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrep.config import ConfigError, component
from mmrep.data.reader import Reader
from mmrep.data.sample import Sample
from mmrep.modalities.text.chunks import TextChunk

CODE = "def f(x):\n    if x:\n\n        return 1\n    return 2\n\n\ndef g():\n    pass\n"


def view(**fields: Any) -> TextChunk:
    return component("views", "text-chunk", **fields).build()


def test_words_lines_and_characters_are_whole_and_what_lies_between_is_left() -> None:
    pair = view(length=2)
    text = "one  two\tthree\nfour five"
    parts = {pair.sample(text, seed) for seed in range(100)}
    assert parts == {"one  two", "two\tthree", "three\nfour", "four five"}
    pair = view(length=2, unit="lines")
    parts = {pair.sample(CODE, seed) for seed in range(200)}
    assert parts == {
        "def f(x):\n    if x:", "    if x:\n\n        return 1", "        return 1\n    return 2",
        "    return 2\n\n\ndef g():", "def g():\n    pass",
    }  # fmt: skip
    assert {view(length=3, unit="characters").sample("ab c d", seed) for seed in range(50)} == {"ab c", "b c d"}
    assert view(length=2, unit="lines").sample("a\r\nb\r\nc", 0) in ("a\r\nb", "b\r\nc")


def test_a_short_text_is_read_whole() -> None:
    for unit, text in (("words", " a b "), ("lines", CODE), ("characters", "  ab ")):
        assert view(length=50, unit=unit).sample(text, 3) == text
    assert view(length=2).sample(" a b ", 3) == " a b "


def test_every_place_is_equally_likely_and_the_seed_decides() -> None:
    text = " ".join(str(i) for i in range(10))
    chunk = view(length=3)
    counts = Counter(chunk.sample(text, seed) for seed in range(4000))
    assert len(counts) == 8
    assert min(counts.values()) > 400
    assert max(counts.values()) < 600
    assert all(chunk.sample(text, s) == view(length=3).sample(text, s) for s in range(20))


def test_one_of_several_texts_is_chosen_independently_of_the_place() -> None:
    texts = ["a b c", "d e f"]
    chunk = view(length=1)
    counts = Counter(chunk.sample(texts, seed) for seed in range(3000))
    assert set(counts) == set("abcdef")
    assert min(counts.values()) > 420


@settings(deadline=None, max_examples=80)
@given(
    text=st.text(min_size=1, max_size=80).filter(str.strip), seed=st.integers(0, 2**63 - 1),
    unit=st.sampled_from(["words", "characters", "lines"]), length=st.integers(1, 6),
)  # fmt: skip
def test_a_chunk_is_a_part_with_a_word_in_it_and_its_span_says_where(
    text: str, seed: int, unit: str, length: int
) -> None:
    chunk = view(length=length, unit=unit)
    part = chunk.sample(text, seed)
    assert part.strip()
    start, stop = (chunk.parameters(text, seed)["span"] * len(text)).round().int().tolist()
    assert text[start:stop] == part


def test_spans_reach_the_batch() -> None:
    encoder = component("encoders", "text-transformer", width=8, depth=1, heads=1).build()
    reader = Reader({"code": encoder}, {"code": [view(length=1, unit="lines"), view(length=2, unit="lines")]})
    items = [reader.read(Sample(str(i), {"code": CODE}), 0) for i in range(4)]
    batch = reader.collate(items)
    spans = batch.params["code"][1]["span"]
    assert spans.shape == (4, 2)
    start, stop = (spans[0] * len(CODE)).round().int().tolist()
    ids = encoder.prepare(CODE[start:stop])["ids"]
    assert torch.equal(batch.inputs["code"][1]["ids"][0, : len(ids)], ids)


def test_configs() -> None:
    assert view(role="local").role == "local"
    with pytest.raises(ConfigError, match="did you mean 'lines'"):
        view(unit="line")
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        view(length=0)
