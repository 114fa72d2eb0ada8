"""A held-out source, embedded once and shared by every evaluation, report and index that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from mmrep.data.sample import Quarantined, Sample
from mmrep.data.source import Source
from mmrep.evaluate._parts import Part, embed_part, merge
from mmrep.model import Model
from mmrep.training.collectives import world


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
    """Embed every field of every readable sample of ``source`` with the deterministic reading, in this process.

    Args:
        model: the model; put in eval mode and left as it was.
        source: what to read.
        fields: tower by column.
        batch_size: samples per forward pass.
        limit: read at most this many samples.
    """
    return _set(embed_part(model, source, fields, batch_size=batch_size, limit=limit, rank=0, size=1), source)


@torch.no_grad()
def encode_together(
    model: Model, source: Source, fields: Mapping[str, str], *, batch_size: int = 64, limit: int | None = None
) -> EncodedSet | None:
    """As `encode_source`, each process embedding its share of the records; all of them must call it, with equal models.

    Every record is embedded by one process, so none is counted twice, however many there are.

    Returns:
        The whole set in the source's order on the first process, None on the others.
    """
    here = world()
    if here.size == 1:
        return encode_source(model, source, fields, batch_size=batch_size, limit=limit)
    part = embed_part(model, source, fields, batch_size=batch_size, limit=limit, rank=here.rank, size=here.size)
    if here.rank:
        dist.gather_object(part)
        return None
    samples, part.samples = part.samples, {}
    parts: list[Any] = [None] * here.size
    dist.gather_object(part, parts)
    parts[0].samples = samples
    return _set(merge(parts), source)


def _set(part: Part, source: Source) -> EncodedSet:
    return EncodedSet(
        samples=[part.samples[place] for place in part.places],
        embeddings=part.embeddings,
        present=part.present,
        quarantined=list(part.bad.values()),
        class_names=None if source.class_names is None else list(source.class_names),
    )
