"""kNN and linear probe against loops and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from mmrep.evaluate import knn_metrics, linear_probe


def blobs(seed, n, classes=4, dim=6, noise=1.2):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    return centres[labels] + noise * rng.normal(size=(n, dim)), labels


def slow_knn(train, train_labels, test, test_labels, k, temperature):
    correct = []
    for item, answer in zip(test, test_labels, strict=True):
        cosines = [float(item @ x / np.linalg.norm(item) / np.linalg.norm(x)) for x in train]
        votes = dict.fromkeys(train_labels.tolist(), 0.0)
        for i in sorted(range(len(train)), key=lambda i: -cosines[i])[:k]:
            votes[train_labels[i]] += np.exp(cosines[i] / temperature)
        correct.append(max(votes, key=votes.__getitem__) == answer)
    return np.array(correct)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (15, 0.5), (15, 5.0)])
def test_knn_is_the_weighted_vote(k, temperature):
    (x, labels), (y, answers) = blobs(0, 80), blobs(1, 60)
    got = knn_metrics(x, labels, y, answers, k=k, temperature=temperature, tile=16)
    correct = slow_knn(x, labels, y, answers, k, temperature)
    assert got["accuracy"] == pytest.approx(correct.mean())
    assert got["mean_per_class"] == pytest.approx(np.mean([correct[answers == c].mean() for c in range(4)]))
    oracle = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    assert got["accuracy"] == pytest.approx(oracle.fit(x, labels).score(y, answers))


def test_knn_weights_change_the_answer():
    """Two far neighbours of class b outvote one near neighbour of class a only when the temperature is high."""
    train, labels = np.array([[1.0, 0.1], [1.0, 1.0], [1.0, 1.1]]), np.array(["a", "b", "b"])
    near = knn_metrics(train, labels, np.array([[1.0, 0.0]]), np.array(["a"]), k=3, temperature=0.07)
    far = knn_metrics(train, labels, np.array([[1.0, 0.0]]), np.array(["a"]), k=3, temperature=100.0)
    assert (near["accuracy"], far["accuracy"]) == (1.0, 0.0)


def test_knn_survives_a_tiny_temperature_and_far_neighbours():
    got = knn_metrics(np.array([[-1.0, 0.0], [-1.0, 0.1]]), [0, 1], np.array([[1.0, 0.0]]), [1], k=2, temperature=1e-4)
    assert got["accuracy"] == 1.0


def test_knn_standardized_sees_past_what_all_embeddings_share():
    """A large common part makes all cosines 1; a dimension that never changes must not divide by zero."""
    (x, labels), (y, answers) = blobs(0, 80), blobs(1, 60)
    scales = np.array([1, 100, 1, 1, 1, 1])
    wide, other = (np.hstack([m * scales + 1e4, np.full((len(m), 1), 3.0)]) for m in (x, y))
    got = knn_metrics(wide, labels, other, answers, k=7, standardize=True)
    a, b = ((m - x.mean(0)) / x.std(0) for m in (x, y))
    assert got["accuracy"] == pytest.approx(slow_knn(a, labels, b, answers, 7, 0.07).mean())
    assert got["accuracy"] > knn_metrics(wide, labels, other, answers, k=7)["accuracy"] + 0.1


def test_knn_counts_a_draw_as_its_expected_value_and_an_unknown_class_as_missed():
    train = np.array([[1.0, 1.0], [1.0, -1.0]])
    got = knn_metrics(train, ["a", "b"], np.array([[1.0, 0.0], [1.0, 0.0]]), ["a", "z"], k=2)
    assert got["accuracy"] == 0.25
    assert got["majority"] == 0.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 3}, "k must be from 1 to 2"),
        ({"temperature": 0.0, "k": 1}, "temperature must be above 0"),
    ],
)
def test_knn_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        knn_metrics(np.ones((2, 2)), [0, 1], np.ones((1, 2)), [0], **kwargs)


def test_probe_chooses_on_validation_and_refits_on_both():
    (x, labels), (v, v_labels), (y, answers) = (
        blobs(0, 60, noise=2.5),
        blobs(1, 50, noise=2.5),
        blobs(2, 200, noise=2.5),
    )
    strengths = (1e-4, 1e-2, 1.0)
    got = linear_probe(x, labels, y, answers, validation=(v, v_labels), strengths=strengths)

    def accuracy(c, x, labels, test, answers):
        mean, scale = x.mean(0), x.std(0)
        model = LogisticRegression(C=c, max_iter=1000).fit((x - mean) / scale, labels)
        return model.score((test - mean) / scale, answers)

    scores = [accuracy(c, x, labels, v, v_labels) for c in strengths]
    best = strengths[int(np.argmax(scores))]
    assert len(set(scores)) > 1
    assert got["C"] == best
    assert got["validation_accuracy"] == max(scores)
    want = accuracy(best, np.concatenate([x, v]), np.concatenate([labels, v_labels]), y, answers)
    assert got["accuracy"] == pytest.approx(want)


def test_probe_is_blind_to_the_test_items_and_to_the_scale_of_a_feature():
    (x, labels), (y, answers) = blobs(0, 120), blobs(1, 50)
    alone = [linear_probe(x, labels, y[i : i + 1], answers[i : i + 1], strengths=(0.1,))["accuracy"] for i in range(50)]
    together = linear_probe(x, labels, y, answers, strengths=(0.1,))["accuracy"]
    assert np.mean(alone) == pytest.approx(together)
    scale, shift = np.array([1e-4, 1, 1e4, 1, 1, 1]), np.array([0, 1e3, 0, 0, 0, 0])
    assert linear_probe(x * scale + shift, labels, y * scale + shift, answers, strengths=(0.1,))["accuracy"] == together


def test_probe_reads_a_linear_label_and_not_noise():
    (x, labels), (y, answers) = blobs(0, 200, noise=0.3), blobs(1, 100, noise=0.3)
    names = np.array(["ant", "bee", "cow", "dog"])
    good = linear_probe(torch.from_numpy(x), names[labels], torch.from_numpy(y), names[answers])
    assert good["accuracy"] > 0.95
    assert good["mean_per_class"] > 0.95
    collapsed = linear_probe(np.ones((200, 6)), labels, np.ones((100, 6)), answers)
    assert collapsed["accuracy"] == collapsed["majority"] < 0.5


@pytest.mark.parametrize(
    ("labels", "kwargs", "message"),
    [
        ([0, 0, 0, 1], {}, "class .*1.* has one training item"),
        ([0, 0, 0, 0], {}, "two classes or more"),
        ([0, 0, 1], {}, "one entry for each of the 4 rows"),
        ([0, 0, 1, 1], {"validation": (np.ones((2, 3)), [0, 1])}, "4, 3 and 4 dimensions"),
    ],
)
def test_probe_mistakes_are_named(labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        linear_probe(np.eye(4), labels, np.eye(4), [0, 0, 1, 1], **kwargs)
