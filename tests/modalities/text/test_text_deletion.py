"""The view that deletes words."""

from __future__ import annotations

from collections import Counter

import pytest

from mmrep.config import ConfigError, component

TEXT = " ".join(f"w{i}" for i in range(10))


def view(**fields):
    return component("views", "text-delete", **fields).build()


def test_every_word_goes_with_the_probability_and_the_rest_keeps_its_order():
    counts, sizes = Counter(), []
    for seed in range(400):
        left = view(ratio=0.6).sample(TEXT, seed).split(" ")
        assert [w for w in TEXT.split() if w in left] == left
        counts.update(left)
        sizes.append(len(left))
    assert all(abs(counts[w] / 400 - 0.4) < 0.08 for w in TEXT.split())
    assert abs(sum(sizes) / 400 - 4) < 0.2
    assert len(set(sizes)) > 6  # a share of words, not a number of them
    assert view().sample(TEXT, 3) == view().sample(TEXT, 3)
    assert view(ratio=0).sample(TEXT, 3) == TEXT


def test_one_word_stays_and_any_may():
    left = Counter(view(ratio=0.999).sample("a b c", seed) for seed in range(300))
    assert set(left) == {"a", "b", "c"}
    assert min(left.values()) > 60
    assert view(ratio=0.9).sample("  alone\n", 0) == "alone"
    assert view(ratio=0).sample(["first one", "second"], 5) == "first one"
    with pytest.raises(ConfigError, match="ratio"):
        view(ratio=1.0)
