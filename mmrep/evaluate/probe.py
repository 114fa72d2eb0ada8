"""Linear probe: how much of the labels a linear classifier reads from frozen embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmrep.evaluate._arrays import ArrayLike, as_labels, as_matrix

STRENGTHS: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse L2 strengths (scikit-learn's `C`) that are tried, ascending."""


def linear_probe(
    train: ArrayLike,
    train_labels: ArrayLike,
    test: ArrayLike,
    test_labels: ArrayLike,
    *,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
    validation_share: float = 0.2,
    strengths: Sequence[float] = STRENGTHS,
    max_iter: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Logistic regression on standardised features; its L2 strength is chosen on a validation split, never on the test.

    Each strength is fitted on the training part with that part's mean and scale; the best on validation is fitted again
    on training and validation together, with the statistics of both. The test items enter only the final prediction.

    Args:
        train: [N, D].
        train_labels: [N] integers or strings.
        test: [M, D].
        test_labels: [M]; a class that no training item has counts as missed.
        validation: (embeddings, labels); None takes `validation_share` of the training items, stratified by class.
        validation_share: in (0, 1).
        strengths: values of `C` to try; the smaller of two equally good ones wins.
        max_iter: of the solver.
        seed: of the split.

    Returns:
        `accuracy`; `mean_per_class`: averaged over the test classes; `majority`: accuracy of always answering the most
        frequent training class; `C`; `validation_accuracy`; `items`: M.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, labels = _labelled(train, train_labels, "train")
    y, answers = _labelled(test, test_labels, "test")
    if not len(y):
        raise ValueError("there are no test items")
    if validation is None:
        classes, counts = np.unique(labels, return_counts=True)
        if (counts < 2).any():
            raise ValueError(
                f"class {classes[counts.argmin()]!r} has one training item: none to hold out; pass validation=(x, y)"
            )
        held = max(round(validation_share * len(x)), len(classes))
        fit, hold = train_test_split(np.arange(len(x)), test_size=held, stratify=labels, random_state=seed)
        x, v, labels, v_labels = x[fit], x[hold], labels[fit], labels[hold]
    else:
        v, v_labels = _labelled(*validation, "validation")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"a probe needs two classes or more, the training labels have {len(np.unique(labels))}")
    if {x.shape[1]} != {v.shape[1], y.shape[1]}:
        raise ValueError(f"train, validation and test have {x.shape[1]}, {v.shape[1]} and {y.shape[1]} dimensions")

    def probe(strength: float):
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=max_iter))

    scores = {strength: float(probe(strength).fit(x, labels).score(v, v_labels)) for strength in sorted(strengths)}
    best = max(scores, key=lambda strength: (scores[strength], -strength))
    everything = np.concatenate([labels, v_labels])
    correct = probe(best).fit(np.concatenate([x, v]), everything).predict(y) == answers
    classes, counts = np.unique(everything, return_counts=True)
    return {
        "accuracy": float(correct.mean()),
        "mean_per_class": float(np.mean([correct[answers == label].mean() for label in np.unique(answers)])),
        "majority": float((answers == classes[counts.argmax()]).mean()),
        "C": float(best),
        "validation_accuracy": scores[best],
        "items": float(len(y)),
    }


def _labelled(values: ArrayLike, labels: ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    matrix = as_matrix(values, name)
    return matrix.double().cpu().numpy(), as_labels(labels, len(matrix), f"{name} labels")
