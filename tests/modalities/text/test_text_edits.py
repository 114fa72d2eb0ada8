"""Edited texts: which words are left, how often, and that it is a function of the seed."""

from __future__ import annotations

from collections import Counter

import pytest

from mmrep.config import component

TEXT = "one two three four five six seven eight nine ten"


def edit(**fields):
    return component("views", "text-edit", **{"swap": 0.0, "insert": 0.0, "delete": 0.0, **fields}).build()


def read(view, text=TEXT, n=200):
    return [view.sample(text, seed * 7919) for seed in range(n)]


def test_a_swap_keeps_the_words_and_moves_two():
    found = read(edit(swap=0.1))
    assert all(sorted(text.split()) == sorted(TEXT.split()) for text in found)
    moved = Counter(sum(a != b for a, b in zip(text.split(), TEXT.split(), strict=True)) for text in found)
    assert set(moved) <= {0, 2}
    assert moved[2] / 200 == pytest.approx(0.9, abs=0.08)


def test_insertion_puts_words_of_the_text_in_and_deletion_leaves_words_out():
    for text in read(edit(insert=0.2)):
        more = Counter(text.split()) - Counter(TEXT.split())
        assert sum(more.values()) == 2
        assert set(more) <= set(TEXT.split())
    kept = [text.split() for text in read(edit(delete=0.3))]
    assert sum(map(len, kept)) / 2000 == pytest.approx(0.7, abs=0.05)
    assert all(words == sorted(words, key=TEXT.split().index) for words in kept)


def test_half_a_word_is_a_probability_and_one_word_always_stays():
    lengths = Counter(len(text.split()) for text in read(edit(insert=0.05)))
    assert set(lengths) == {10, 11}
    assert lengths[11] / 200 == pytest.approx(0.5, abs=0.1)
    assert {len(text.split()) for text in read(edit(delete=1.0))} == {1}
    assert len(set(read(edit(delete=1.0)))) == 10


def test_it_reads_one_of_several_captions_by_the_seed_alone():
    view = edit(swap=0.1, insert=0.1, delete=0.1)
    assert read(view) == read(view)
    assert len(set(read(view))) > 150
    assert {text for text in read(edit(), ["a", "b", "c"])} == {"a", "b", "c"}
    assert view.sample("  ", 3) == "  "
