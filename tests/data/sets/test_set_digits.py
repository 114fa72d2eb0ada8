"""The digits of scikit-learn as a source."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from mmrep.config import component


def build(split, **options):
    return component("sources", "digits", split=split, **options).build()


def test_pictures_and_labels_are_those_of_scikit_learn():
    everything, found = load_digits(), build("all")
    assert len(found) == 1797
    sample = found[17]
    assert sample.label == int(everything.target[17])
    picture = sample.fields["image"]
    assert picture.dtype == np.uint8
    np.testing.assert_allclose(picture / 255 * 16, everything.images[17], atol=0.04)


def test_parts_are_disjoint_and_together_all():
    sources = {split: build(split) for split in ("train", "validation", "test")}
    parts = {split: {source[i].id for i in range(len(source))} for split, source in sources.items()}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 1797
    assert abs(len(parts["test"]) / 1797 - 0.2) < 0.04
    assert {sources["test"][i].label for i in range(100)} == set(range(10))


def test_each_digit_has_a_name_and_ways_to_say_it():
    source = build("all", label="name")
    sample = source[17]
    assert sample.fields["digit"] == 7
    assert sample.label == sample.fields["name"] == "seven"
    assert "the digit seven" in sample.fields["caption"]
    assert len(set(source.column("name"))) == 10
