"""A held-out source, embedded once and shared by every evaluation, report and index that reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmrep.data.reader import failure
from mmrep.data.sample import Quarantined, Sample
from mmrep.data.source import Source
from mmrep.embed.encode import encode_items
from mmrep.model import Model
from mmrep.progress import progress
from mmrep.tokens import Inputs


@dataclass
class EncodedSet:
    """The embeddings of a source.

    Attributes:
        samples: the n samples that could be read, in the source's order.
        embeddings: per field, float32 [n, dim]; rows of samples without the field are zero.
        present: per field, bool [n].
        quarantined: the samples that could not be read.
        class_names: names of integer labels, where the source knows them.
    """

    samples: list[Sample]
    embeddings: dict[str, NDArray[np.float32]]
    present: dict[str, NDArray[np.bool_]]
    quarantined: list[Quarantined] = field(default_factory=list)
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def groups(self) -> list[str]:
        """Per sample, what makes two samples relevant to each other: its group, or its id where it has none."""
        return [f"id:{s.id}" if s.group is None else f"group:{s.group}" for s in self.samples]

    def raw(self, index: int, field: str) -> Any:
        """The raw value of a field of sample ``index``."""
        return self.samples[index].fields[field]


@torch.no_grad()
def encode_source(
    model: Model, source: Source, fields: Mapping[str, str], *, batch_size: int = 64, limit: int | None = None
) -> EncodedSet:
    """Embed every field of every readable sample of ``source`` with the deterministic reading.

    Args:
        model: the model; put in eval mode and left as it was.
        source: what to read.
        fields: tower by column.
        batch_size: samples per forward pass.
        limit: read at most this many samples.
    """
    samples: list[Sample] = []
    bad: list[Quarantined] = []
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in fields}
    present: dict[str, list[bool]] = {name: [] for name in fields}
    was_training = model.training
    model.eval()
    total = None if source.streaming else min(len(source), limit or len(source))
    try:
        with progress(total=total, desc="embed", unit="sample", show=True) as bar:
            records = islice(source.stream(), limit)
            while window := list(islice(records, batch_size * 8)):
                bar.update(len(window))
                bad.extend(record for record in window if isinstance(record, Quarantined))
                whole = [record for record in window if isinstance(record, Sample)]
                items, read = _prepare(model, whole, fields, bad)
                samples.extend(read)
                for name, tower_name in fields.items():
                    have = [i for i, item in enumerate(items) if name in item]
                    block = torch.zeros(len(items), model.dim)
                    if have:
                        tower = model.tower(tower_name)
                        chosen = [items[i][name] for i in have]
                        block[have] = encode_items(tower, chosen, batch_size, model.device, tower.normalize)
                    parts[name].append(block)
                    present[name].extend(name in item for item in items)
    finally:
        model.train(was_training)
    return EncodedSet(
        samples=samples,
        embeddings={n: torch.cat([torch.zeros(0, model.dim), *p]).numpy() for n, p in parts.items()},
        present={n: np.array(p, dtype=bool) for n, p in present.items()},
        quarantined=bad,
        class_names=None if source.class_names is None else list(source.class_names),
    )


def _prepare(
    model: Model, window: Iterable[Sample], fields: Mapping[str, str], bad: list[Quarantined]
) -> tuple[list[dict[str, Inputs]], list[Sample]]:
    items: list[dict[str, Inputs]] = []
    read: list[Sample] = []
    for sample in window:
        item: dict[str, Inputs] = {}
        name = ""
        try:
            for name, tower in fields.items():
                if sample.fields.get(name) is not None:
                    item[name] = model.tower(tower).encoder.prepare(sample.fields[name])
        except Exception as error:  # classified, counted and, where no value is to blame, raised again: see `failure`
            bad.append(failure(error, sample.id, name))
            continue
        items.append(item)
        read.append(sample)
    return items, read
