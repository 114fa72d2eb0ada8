"""Honest baselines: what is reached without learning the alignment."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from mmrep.data.source import Source
from mmrep.encoder import BadSampleError
from mmrep.evaluate.encoded import EncodedSet
from mmrep.evaluate.retrieval import top_k
from mmrep.model import Model, Tower

_MAX_TRAIN = 20_000


@torch.no_grad()
def nearest_input(
    untrained: Model, train: Source, test: EncodedSet, *, near: tuple[str, str], described: tuple[str, str], k: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Describe each held-out item by its nearest training item in raw inputs (pixels, for pictures).

    An item's vector is the mean of the *descriptions* of its ``k`` nearest training items, nearest by Euclidean
    distance of the encoder's prepared inputs; a description is the pooled, unprojected feature of the untrained tower
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
    (near_field, near_tower), (text_field, text_tower) = near, described
    tower = untrained.tower(text_tower)
    samples = [s for s in islice(train.stream(), _MAX_TRAIN) if _has(s.fields, near_field, text_field)]
    raw_train = _flat(untrained.tower(near_tower), [s.fields[near_field] for s in samples], near_field)
    raw_test = _flat(untrained.tower(near_tower), [s.fields[near_field] for s in test.samples], near_field)
    # Nearest by Euclidean distance = largest (x·y - |y|²/2): one more coordinate turns it into an inner product.
    keys = torch.cat([raw_train, -raw_train.pow(2).sum(1, keepdim=True) / 2], 1)
    queries = torch.cat([raw_test, torch.ones(len(raw_test), 1)], 1)
    _, index = top_k(queries, keys, k)
    described_train = _features(tower, [s.fields[text_field] for s in samples])
    items = F.normalize(described_train[index].mean(1), dim=1)
    return items.numpy(), _features(tower, [s.fields[text_field] for s in test.samples]).numpy()


def _has(fields: dict[str, object], *names: str) -> bool:
    return all(fields.get(name) is not None for name in names)


def _flat(tower: Tower, values: list[object], field: str) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    for value in values:
        try:
            item = tower.encoder.prepare(value)
        except BadSampleError:
            continue
        rows.append(torch.cat([v.reshape(-1).float() for v in item.values()]))
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"baseline 'nearest-input': field {field!r} has inputs of different sizes")
    return torch.stack(rows) / 255


def _features(tower: Tower, values: list[object], batch_size: int = 64) -> torch.Tensor:
    was_training = tower.training
    tower.eval()
    items = [tower.encoder.prepare(value) for value in values]
    out = [
        tower.features(tower.encoder.collate(items[i : i + batch_size])).float()
        for i in range(0, len(items), batch_size)
    ]
    tower.train(was_training)
    return F.normalize(torch.cat(out), dim=1)
