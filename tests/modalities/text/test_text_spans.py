"""The view of DeCLUTR: lengths, places, and positives that keep to their anchor."""

from __future__ import annotations

import pytest

from mmrep.config import ConfigError, component
from mmrep.data.reader import Reader
from mmrep.data.sample import Sample

N = 100
TEXT = " ".join(str(i) for i in range(N))
SIZES = {"shortest": 10, "longest": 40}


def view(**fields):
    return component("views", "text-spans", **{**SIZES, **fields}).build()


def words(span):
    found = [int(w) for w in span.split(" ")]
    assert found == list(range(found[0], found[-1] + 1))
    return found[0], found[-1] + 1


def test_lengths_are_beta_and_anchors_begin_anywhere():
    anchors = [words(view().sample(TEXT, seed)) for seed in range(400)]
    positives = [words(view(follows=0).sample(TEXT, seed)) for seed in range(400)]
    for spans, mean in ((anchors, 10 + 30 * 4 / 6), (positives, 10 + 30 * 2 / 6)):
        lengths = [stop - start for start, stop in spans]
        assert min(lengths) >= 10
        assert max(lengths) <= 40
        assert abs(sum(lengths) / 400 - mean) < 0.8
        deviation = (sum((n - sum(lengths) / 400) ** 2 for n in lengths) / 400) ** 0.5
        assert abs(deviation - 30 * (8 / 36 / 7) ** 0.5) < 0.6  # of Beta(4, 2) and of Beta(2, 4)
    starts = [start / (N - (stop - start)) for start, stop in anchors]
    assert abs(sum(starts) / 400 - 0.5) < 0.04
    assert min(start for start, _ in anchors) == 0
    assert max(stop for _, stop in anchors) == N


def test_positives_overlap_touch_or_lie_within_and_differ_by_their_number():
    kinds = dict.fromkeys(("within", "overlap", "touch"), 0)
    apart = 0
    for seed in range(400):
        (a, b), (c, d) = (words(view(**f).sample(TEXT, seed)) for f in ({}, {"follows": 0}))
        assert c <= b
        assert d >= a
        kinds["within" if a <= c and d <= b else "touch" if c == b or d == a else "overlap"] += 1
        apart += view(follows=0, number=2).sample(TEXT, seed) != view(follows=0).sample(TEXT, seed)
    assert min(kinds.values()) > 4
    assert apart > 370


def test_short_texts_are_read_whole_and_the_span_is_told():
    assert view().sample(" a  b\n", 3) == " a  b\n"
    assert view(follows=0).sample("a b", 3) == "a b"
    assert view().sample([TEXT, "other"], 4) == view().sample(TEXT, 4)
    assert 10 <= len(view().sample(" ".join("abcdefghijkl"), 3).split()) <= 12
    start, stop = (view().parameters(TEXT, 7)["span"] * len(TEXT)).round().int().tolist()
    assert TEXT[start:stop] == view().sample(TEXT, 7)
    with pytest.raises(ConfigError, match="fewer than the shortest"):
        view(longest=9)


def test_the_reader_gives_a_positive_the_numbers_of_its_anchor():
    encoder = component("encoders", "text-transformer", max_length=400).build()
    views = {"x": [view(), view(follows=0), view(follows=0, number=2)]}
    reader = Reader({"x": encoder}, views)
    for number in range(40):
        item = reader.read(Sample(id=str(number), fields={"x": TEXT}), 0)
        spans = [(p["span"] * len(TEXT)).round().int().tolist() for p in item.params["x"]]
        (a, b), *positives = spans
        assert all(c <= b + 1 and d >= a - 1 for c, d in positives)
        assert positives[0] != positives[1]
