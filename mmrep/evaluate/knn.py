"""Classification by weighted nearest neighbours: a measure of frozen embeddings with nothing to train or tune."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from mmrep.evaluate._arrays import ArrayLike, as_labels, as_pair, working_dtype
from mmrep.evaluate.retrieval import top_k


@torch.no_grad()
def knn_metrics(
    train: ArrayLike,
    train_labels: ArrayLike,
    test: ArrayLike,
    test_labels: ArrayLike,
    *,
    k: int = 20,
    temperature: float = 0.07,
    standardize: bool = False,
    tile: int = 2048,
) -> dict[str, float]:
    """Accuracy of the vote of the k training items of largest cosine s, each with the weight exp(s / temperature).

    The rule is that of Wu et al. (arXiv:1805.01978), used with k = 20 and temperature 0.07 by DINO (arXiv:2104.14294).

    Args:
        train: [N, D], normalised here.
        train_labels: [N], integers or strings.
        test: [M, D], normalised here.
        test_labels: [M]; a class that no training item has counts as missed.
        k: neighbours that vote, at most N.
        temperature: above 0; smaller trusts the nearest more.
        standardize: give every dimension mean 0 and deviation 1 over the training items first, as the linear probe
            does. The cosines of embeddings that share a large part (of masked autoencoders often above 0.99) tell
            nothing apart otherwise.
        tile: rows scored at once.

    Returns:
        `accuracy`; `mean_per_class`: averaged over the test classes; `majority`: accuracy of always answering the most
        frequent training class; `items`: M. Where classes draw, the expected value of a random choice is counted.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    x, y = as_pair(train, test, ("train", "test"))
    if not 1 <= k <= len(x):
        raise ValueError(f"k must be from 1 to {len(x)}, the number of training items, got {k}")
    if not len(y):
        raise ValueError("there are no test items")
    known, answers = as_labels(train_labels, len(x), "train_labels"), as_labels(test_labels, len(y), "test_labels")
    classes, codes = np.unique(known, return_inverse=True)
    x, y = (m.to(working_dtype(m)) for m in (x, y))
    if standardize:
        mean, deviation = x.mean(0), x.std(0, correction=0)
        x, y = ((m - mean) / torch.where(deviation > 0, deviation, 1) for m in (x, y))
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    scores, indices = top_k(y, x, k, tile=tile)
    # relative to the nearest neighbour, so that no temperature can overflow or leave a row without weight
    weights = ((scores - scores[:, :1]).double() / temperature).exp()
    correct = np.zeros(len(y))
    for row in range(0, len(y), tile):
        rows = slice(row, row + tile)
        voters = torch.from_numpy(codes.astype(np.int64)).to(indices.device)[indices[rows]]
        votes = weights.new_zeros(len(voters), len(classes)).scatter_add_(1, voters, weights[rows]).cpu().numpy()
        winners = np.isclose(votes, votes.max(axis=1, keepdims=True), rtol=1e-9, atol=0)
        right = winners & (answers[rows, None] == classes[None, :])
        correct[rows] = right.sum(axis=1) / winners.sum(axis=1)
    frequent = classes[np.bincount(codes).argmax()]
    return {
        "accuracy": float(correct.mean()),
        "mean_per_class": float(np.mean([correct[answers == label].mean() for label in np.unique(answers)])),
        "majority": float((answers == frequent).mean()),
        "items": float(len(y)),
    }
