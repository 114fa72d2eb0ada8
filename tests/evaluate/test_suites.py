"""The evaluations of a recipe, on sets made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmrep.data.sample import Sample
from mmrep.evaluate.encoded import EncodedSet
from mmrep.evaluate.evaluation import Bench
from mmrep.evaluate.suites import KNN, LinearProbe, Retrieval


class Given(Bench):
    """A bench with one set."""

    def __init__(self, encoded):
        self._given = encoded

    def encoded(self, name):
        return self._given


def test_a_picture_that_is_named_in_five_languages_is_one_item():
    # Of each of 4 things one picture and five words; the picture of the thing before scores best, the right one second.
    samples = [
        Sample(f"{thing}-{word}", {"image": Path(f"{thing}.png"), "word": f"{thing}-{word}"}, group=str(thing))
        for thing in range(4) for word in range(5)
    ]  # fmt: skip
    picture = np.repeat(np.eye(4, dtype=np.float32), 5, 0)
    word = 0.5 * picture + np.roll(picture, 5, 0)
    everywhere = np.ones(20, dtype=bool)
    some = everywhere.copy()
    some[9] = False  # as a source says it: without the field
    del samples[9].fields["image"]
    bench = Given(EncodedSet(samples, {"image": picture, "word": word}, {"image": some, "word": everywhere}))

    def rows(distinct):
        config = Retrieval.Config(data="d", between=("word", "image"), ks=(1, 2, 6), baselines=(), distinct=distinct)
        return {(r["direction"], r["who"]): r for r in Retrieval(config).run(bench)}

    counted, plain = rows(True), rows(False)
    assert [counted["word→image", "model"][key] for key in ("R@1", "R@2", "items", "queries")] == [0, 1, 4, 20]
    assert [plain["word→image", "model"][key] for key in ("R@1", "R@2", "R@6", "items")] == [0, 0, 1, 19]
    assert counted["word→image", "chance"]["R@1"] == pytest.approx(0.25)
    assert counted["image→word", "model"]["queries"] == 4  # the words differ, the pictures do not
    assert counted["image→word", "model"]["items"] == 20
    samples[0].fields["image"] = Path("other.png")
    assert rows(True)["word→image", "model"]["items"] == 5


def test_probes_may_learn_from_a_source_of_their_own():
    # Two classes on two axes, and one training item of a third, whose one test item is missed by the linear probe.
    def of(labels):
        samples = [Sample(f"{i}", {"x": i}, label=label) for i, label in enumerate(labels)]
        x = np.eye(3, dtype=np.float32)[["abc".index(label) for label in labels]]
        x = x + 0.01 * np.random.default_rng(len(labels)).standard_normal(x.shape, dtype=np.float32)
        return EncodedSet(samples, {"x": x}, {"x": np.ones(len(labels), dtype=bool)})

    class Sets(Bench):
        def __init__(self):
            pass

        def encoded(self, name):
            return {"known": of("aaaabbbbc"), "test": of("aabbc")}[name]

        encoded_untrained = encoded

        def encoded_train(self):
            raise AssertionError("the run's own training data have no labels")

        encoded_train_untrained = encoded_train

    given = {"data": "test", "field": "x", "train": "known", "baselines": ("untrained",)}
    for evaluation, right in ((KNN(KNN.Config(k=1, **given)), 1.0), (LinearProbe(LinearProbe.Config(**given)), 0.8)):
        rows = {row["who"]: row["accuracy"] for row in evaluation.run(Sets())}
        assert rows["model"] == rows["untrained"] == pytest.approx(right)
