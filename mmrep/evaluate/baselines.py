"""Honest baselines: what is reached without learning the alignment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from mmrep.data.sample import Sample
from mmrep.data.source import Source
from mmrep.encoder import BadSampleError, Encoder
from mmrep.evaluate.encoded import EncodedSet
from mmrep.evaluate.retrieval import top_k
from mmrep.model import Model, Tower
from mmrep.tokens import Inputs

_MAX_TRAIN = 20_000


@torch.no_grad()
def nearest_input(
    untrained: Model, train: Source, test: EncodedSet, *, near: tuple[str, str], described: tuple[str, str], k: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Describe each held-out item by its nearest training item in raw inputs (`Encoder.summary`; pixels, for pictures).

    An item's vector is the mean of the *descriptions* of its ``k`` nearest training items, nearest by Euclidean
    distance of the encoder's summaries; a description is the pooled, unprojected feature of the untrained tower
    (a pretrained text encoder's sentence embedding, where the tower starts from one).

    Args:
        untrained: the model before training.
        train: the training source.
        test: the held-out set.
        near: (field, tower) compared by raw input; its prepared inputs must have one size.
        described: (field, tower) that describes.
        k: neighbours averaged; tuned on validation if at all.

    Returns:
        Unit vectors of the items and of the queries (the held-out ``described`` field), each [n, width].

    Raises:
        ValueError: the ``near`` field's inputs differ in size, so that raw distance has no meaning.
    """
    train_near, train_text, _ = _read(untrained, _samples(train), near, described)
    test_near, test_text, rows = _read(untrained, test.samples, near, described)
    # Nearest by Euclidean distance = largest (x·y - |y|²/2): one more coordinate turns it into an inner product.
    encoder = untrained.tower(near[1]).encoder
    keys = _flat(encoder, train_near, near[0])
    keys = torch.cat([keys, -keys.pow(2).sum(1, keepdim=True) / 2], 1)
    queries = _flat(encoder, test_near, near[0])
    _, index = top_k(torch.cat([queries, torch.ones(len(queries), 1)], 1), keys, k)
    tower = untrained.tower(described[1])
    items = F.normalize(_features(tower, train_text)[index].mean(1), dim=1)
    return _scatter(items, rows, len(test)), _scatter(_features(tower, test_text), rows, len(test))


@torch.no_grad()
def lookup(
    untrained: Model, train: Source, test: EncodedSet, near: tuple[str, str]
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Look a known thing up: compare raw inputs with the training item of the query's own group.

    Args:
        untrained: the model before training; its encoder prepares the inputs.
        train: the training source.
        test: the held-out set.
        near: (field, tower) compared by raw input.

    Returns:
        Vectors of the items and of the queries whose inner product is minus half the squared distance; None if some
        group of the held-out set has no training item, so that there is nothing to look up.
    """
    inputs, _, rows = _read(untrained, _samples(train), near, near)
    samples = _samples(train)
    known = {samples[row].group: item for row, item in zip(reversed(rows), reversed(inputs), strict=True)}
    if any(sample.group is None or sample.group not in known for sample in test.samples):
        return None
    test_inputs, _, test_rows = _read(untrained, test.samples, near, near)
    encoder = untrained.tower(near[1]).encoder
    items = _flat(encoder, test_inputs, near[0])
    queries = _flat(encoder, [known[test.samples[row].group] for row in test_rows], near[0])
    half = [-values.pow(2).sum(1, keepdim=True) / 2 for values in (items, queries)]
    items = torch.cat([items, half[0], torch.ones_like(half[0])], 1)
    queries = torch.cat([queries, torch.ones_like(half[1]), half[1]], 1)
    return _scatter(items, test_rows, len(test)), _scatter(queries, test_rows, len(test))


def _samples(source: Source) -> list[Sample]:
    return [record for record in islice(source.stream(), _MAX_TRAIN) if isinstance(record, Sample)]


def _read(
    model: Model, samples: Sequence[Sample], *fields: tuple[str, str]
) -> tuple[list[Inputs], list[Inputs], list[int]]:
    """The prepared inputs of both fields of the samples that have both and can be read, and their positions."""
    read: list[tuple[Inputs, ...]] = []
    rows: list[int] = []
    for row, sample in enumerate(samples):
        if any(sample.fields.get(name) is None for name, _ in fields):
            continue
        try:
            read.append(tuple(model.tower(tower).encoder.prepare(sample.fields[name]) for name, tower in fields))
        except BadSampleError:
            continue  # the run has counted and listed it
        rows.append(row)
    return [first for first, _ in read], [second for _, second in read], rows


def _flat(encoder: Encoder, items: Sequence[Inputs], field: str) -> torch.Tensor:
    rows = [encoder.summary(item) for item in items]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"baseline 'nearest-input': field {field!r} has inputs of different sizes")
    return torch.stack(rows)


def _features(tower: Tower, items: Sequence[Inputs], batch_size: int = 64) -> torch.Tensor:
    was_training = tower.training
    tower.eval()
    out = [
        tower.features(tower.encoder.collate(items[i : i + batch_size])).float()
        for i in range(0, len(items), batch_size)
    ]
    tower.train(was_training)
    return F.normalize(torch.cat(out), dim=1)


def _scatter(values: torch.Tensor, rows: list[int], n: int) -> NDArray[np.float32]:
    """[n, width] with ``values`` at ``rows`` and zeros elsewhere."""
    return torch.zeros(n, values.shape[1]).index_copy(0, torch.tensor(rows), values).numpy()
