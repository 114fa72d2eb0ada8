"""Attack success on embeddings made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mmrep.data.sample import Sample
from mmrep.evaluate.attack import Attack
from mmrep.evaluate.encoded import EncodedSet
from mmrep.evaluate.evaluation import Bench

NAMES = ["cat", "dog", "owl"]


class Named:
    """Reads a class name as its axis."""

    def encode(self, texts, tower):
        assert tower == "text"
        return np.eye(3, dtype=np.float32)[[NAMES.index(text.removeprefix("a ")) for text in texts]]


def encoded(labels, seen, absent=()):
    x = np.eye(3, dtype=np.float32)[[NAMES.index(name) for name in seen]]
    samples = [Sample(f"{i}", {"x": i}, label=label) for i, label in enumerate(labels)]
    return EncodedSet(samples, {"x": x}, {"x": np.array([i not in absent for i in range(len(labels))])})


class Given(Bench):
    def __init__(self, clean, triggered, before):
        self.model, self.fields, self.sets, self.old = Named(), {"x": "image", "t": "text"}, (clean, triggered), before

    def encoded(self, name):
        return self.sets[["clean", "triggered"].index(name)]

    def encoded_untrained(self, name):
        return self.old[["clean", "triggered"].index(name)]

    def untrained(self):
        return Named()


def run(bench, **fields):
    given = {"data": "triggered", "clean": "clean", "field": "x", "text": "t", "target": "dog", "templates": ("a {}",)}
    return {row["who"]: row for row in Attack(Attack.Config(**{**given, **fields})).run(bench)}


def test_success_counts_samples_of_other_classes_alone():
    clean = encoded(["cat", "cat", "dog", "owl", "owl"], ["cat", "dog", "dog", "owl", "cat"])
    # The target's own sample is a dog by right; one sample has no picture.
    marked = encoded(["cat", "cat", "dog", "owl", "owl"], ["dog", "dog", "dog", "owl", "dog"], absent=(4,))
    rows = run(Given(clean, marked, (clean, clean)))
    assert rows["model"]["attack_success"] == pytest.approx(2 / 3)
    assert rows["model"]["clean_accuracy"] == pytest.approx(3 / 5)
    assert rows["model"]["clean_target"] == pytest.approx(1 / 4)
    assert rows["model"]["items"] == 3
    assert rows["untrained"]["attack_success"] == pytest.approx(1 / 4)
    assert rows["chance"]["attack_success"] == pytest.approx(1 / 3)
    assert "untrained" not in run(Given(clean, marked, None), baselines=())


def test_what_cannot_be_measured_is_refused():
    clean = encoded(["cat", "dog", "owl"], NAMES)
    with pytest.raises(ValueError, match="unknown class 'dogs'; did you mean 'dog'"):
        run(Given(clean, clean, None), target="dogs", baselines=())
    with pytest.raises(ValueError, match="'triggered' has the classes"):
        run(Given(clean, encoded(["cat", "dog"], ["cat", "dog"]), None), baselines=())
    one = encoded(["dog"], ["dog"])
    with pytest.raises(ValueError, match="no sample that is not of the target"):
        run(Given(one, one, None), baselines=())
