"""Zero-shot classification against loops, with the wrong ways of averaging prompts made visible."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mmrep.evaluate import class_embeddings, expand_templates, zero_shot_metrics, zero_shot_probabilities
from mmrep.evaluate.zero_shot import TEMPLATES


def unit(x):
    return x / np.linalg.norm(x)


def test_templates_are_expanded_class_by_class():
    assert expand_templates(["cat", "{dog}"], ["{}", "a {}"]) == ["cat", "a cat", "{dog}", "a {dog}"]
    assert len(expand_templates(["cat"])) == len(set(TEMPLATES))


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "0 and 1"),
        (["a"], [], "1 and 0"),
        (["a"], ["a photo"], "'a photo' has no {}"),
        ("cat", ["{}"], "lists of strings"),
        (["a"], "{}", "lists of strings"),
    ],
)
def test_bad_templates_are_named(names, templates, message):
    with pytest.raises(ValueError, match=message):
        expand_templates(names, templates)


def test_class_embeddings_normalise_average_normalise():
    rng = np.random.default_rng(0)
    table = {prompt: rng.normal(size=5) * rng.uniform(0.1, 50) for prompt in expand_templates(["abc", "d"])}
    calls = []

    def encode(prompts):
        calls.append(prompts)
        return np.stack([table[prompt] for prompt in prompts])

    got = class_embeddings(encode, ["abc", "d"]).numpy()
    assert len(calls) == 1
    for row, name in zip(got, ["abc", "d"], strict=True):
        prompts = [template.replace("{}", name) for template in TEMPLATES]
        want = unit(np.mean([unit(table[prompt]) for prompt in prompts], axis=0))
        np.testing.assert_allclose(row, want, atol=1e-12)
        assert np.abs(row - unit(np.mean([table[prompt] for prompt in prompts], axis=0))).max() > 0.01


def test_an_encoder_that_loses_prompts_is_refused():
    with pytest.raises(ValueError, match="1 embeddings for 5 prompts"):
        class_embeddings(lambda prompts: np.ones((1, 3)), ["a"])


def slow(items, classes, labels, k):
    """Expected top-k hit by writing down every order of the classes that the scores allow."""
    hits = []
    for item, label in zip(items, labels, strict=True):
        scores = classes @ item
        allowed = [p for p in itertools.permutations(range(len(classes))) if all(np.diff(scores[list(p)]) <= 0)]
        hits.append(np.mean([label in p[:k] for p in allowed]))
    return np.array(hits)


def test_accuracies_are_expected_over_ties():
    rng = np.random.default_rng(1)
    signs = np.array(list(itertools.product([-0.5, 0.5], repeat=4)))  # unit vectors with exact and often equal products
    items, classes, labels = signs[rng.integers(0, 16, 40)], signs[rng.integers(0, 16, 6)], rng.integers(0, 5, 40)
    got = zero_shot_metrics(items * rng.uniform(1, 9, (40, 1)).round(), classes, labels, ks=(1, 3, 9), tile=7)
    for k in (1, 3, 9):
        assert got[f"top{k}"] == pytest.approx(slow(items, classes, labels, k).mean(), abs=1e-12)
        assert got[f"chance_top{k}"] == min(k / 6, 1)
    first = slow(items, classes, labels, 1)
    assert got["mean_per_class"] == pytest.approx(np.mean([first[labels == c].mean() for c in np.unique(labels)]))
    assert got["mean_per_class"] != pytest.approx(got["top1"])
    assert 0 < got["ties"] < 40


def test_a_collapsed_model_scores_chance():
    got = zero_shot_metrics(np.ones((30, 4)), np.ones((8, 4)), np.arange(30) % 8)
    assert got["top1"] == got["mean_per_class"] == got["chance_top1"] == 1 / 8
    assert got["top5"] == got["chance_top5"] == 5 / 8
    assert got["ties"] == 30


def test_sklearn_agrees_where_nothing_ties():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    items, classes = torch.randn(200, 8, generator=g), torch.nn.functional.normalize(torch.randn(12, 8, generator=g))
    labels = torch.randint(0, 12, (200,), generator=g)
    scores = (items @ classes.T).numpy()
    got = zero_shot_metrics(items, classes, labels, tile=64)
    assert got["top1"] == pytest.approx(metrics.accuracy_score(labels, scores.argmax(1)))
    assert got["top5"] == pytest.approx(metrics.top_k_accuracy_score(labels, scores, k=5, labels=np.arange(12)))
    assert got["mean_per_class"] == pytest.approx(metrics.balanced_accuracy_score(labels, scores.argmax(1)))


def test_probabilities_are_softmax_or_sigmoid_of_scaled_cosines():
    rng = np.random.default_rng(2)
    items, classes = rng.normal(size=(9, 4)) * 3, np.stack([unit(rng.normal(size=4)) for _ in range(5)])
    labels = rng.integers(0, 5, 9)
    cosines = np.stack([classes @ unit(item) for item in items])
    soft = np.stack([np.exp(10 * row) / np.exp(10 * row).sum() for row in cosines])
    sigmoid = 1 / (1 + np.exp(-(10 * cosines - 3)))
    for bias, want in ((None, soft), (-3.0, sigmoid)):
        np.testing.assert_allclose(zero_shot_probabilities(items, classes, scale=10, bias=bias).numpy(), want)
        got = zero_shot_metrics(items, classes, labels, scale=10, bias=bias, tile=4)
        assert got["true_class_probability"] == pytest.approx(want[np.arange(9), labels].mean())
    assert "true_class_probability" not in zero_shot_metrics(items, classes, labels)


@pytest.mark.parametrize(
    ("labels", "kwargs", "message"),
    [
        ([0, 3], {}, "integers from 0 to 2"),
        ([-1, 0], {}, "integers from 0 to 2"),
        ([0.0, 1.0], {}, "integers from 0 to 2"),
        ([0], {}, "one entry for each of the 2 rows"),
        ([0, 1], {"bias": 1.0}, "bias is given without scale"),
    ],
)
def test_mistakes_are_named(labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        zero_shot_metrics(np.ones((2, 4)), np.ones((3, 4)), labels, **kwargs)
