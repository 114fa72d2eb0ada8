"""The part of a source that one process embeds, and the whole that the first process makes of all parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

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
class Part:
    """What one process embedded; a place is the number of a record in the source's order.

    Attributes:
        places: of the m samples that could be read, ascending.
        embeddings: per field, float32 [m, dim]; rows of samples without the field are zero.
        present: per field, bool [m].
        bad: what could not be read, by place.
        samples: by place, every record of the *source* that is a sample, if this process keeps them.
    """

    places: list[int] = field(default_factory=list)
    embeddings: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    present: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    bad: dict[int, Quarantined] = field(default_factory=dict)
    samples: dict[int, Sample] = field(default_factory=dict)


def embed_part(
    model: Model, source: Source, fields: Mapping[str, str], *, batch_size: int, limit: int | None, rank: int, size: int
) -> Part:
    """Embed every ``size``-th record of the source, from record ``rank`` on.

    The first process also keeps all samples. It reads the raw records of all parts for that, which is cheap: what costs
    is to decode and to embed them. A stream is read whole by every process, since its parts have an order of their own.
    """
    part = Part()
    vectors: dict[str, list[torch.Tensor]] = {name: [] for name in fields}
    present: dict[str, list[bool]] = {name: [] for name in fields}
    was_training = model.training
    model.eval()
    reads_all = rank == 0 or source.streaming
    window_size = batch_size * 8 * (size if reads_all else 1)
    try:
        with progress(total=_length(source, limit), desc="embed", unit="sample", show=rank == 0) as bar:
            records = _all(source, limit) if reads_all else _every(source, limit, rank, size)
            while window := list(islice(records, window_size)):
                bar.update(len(window))
                items = _prepare(model, window, fields, part, rank, size)
                for name, tower_name in fields.items():
                    have = [i for i, item in enumerate(items) if name in item]
                    block = torch.zeros(len(items), model.dim)
                    if have:
                        tower = model.tower(tower_name)
                        chosen = [items[i][name] for i in have]
                        block[have] = encode_items(tower, chosen, batch_size, model.device, tower.normalize)
                    vectors[name].append(block)
                    present[name].extend(name in item for item in items)
    finally:
        model.train(was_training)
    part.embeddings = {n: torch.cat([torch.zeros(0, model.dim), *v]).numpy() for n, v in vectors.items()}
    part.present = {n: np.array(p, dtype=bool) for n, p in present.items()}
    _fuse(model, part)
    return part


def _fuse(model: Model, part: Part) -> None:
    """Add the embeddings of those fusions of which the source has a member: as if they were fields."""
    was_training = model.training
    model.eval()
    for name, fusion in model.config.fusions.items():
        members = [member for member in fusion.of if member in part.embeddings]
        if not members:
            continue
        embeddings = {m: torch.from_numpy(part.embeddings[m]).to(model.device) for m in members}
        present = {m: torch.from_numpy(part.present[m]).to(model.device) for m in members}
        part.embeddings[name] = model.fuse(name, embeddings, present).cpu().numpy()
        part.present[name] = np.logical_or.reduce([part.present[m] for m in members])
    model.train(was_training)


def merge(parts: Sequence[Part]) -> Part:
    """All parts in the source's order, each record once; the first part has the samples."""
    places = np.array([place for part in parts for place in part.places], dtype=np.int64)
    order = np.argsort(places)
    merged = Part(places=places[order].tolist(), samples=parts[0].samples)
    assert len(set(merged.places)) == len(places), "a record was embedded twice"
    for name in parts[0].embeddings:
        merged.embeddings[name] = np.concatenate([part.embeddings[name] for part in parts])[order]
        merged.present[name] = np.concatenate([part.present[name] for part in parts])[order]
    found = {place: note for part in parts for place, note in part.bad.items()}
    merged.bad = {place: found[place] for place in sorted(found)}
    return merged


def _length(source: Source, limit: int | None) -> int | None:
    if source.streaming:
        return None
    return len(source) if limit is None else min(len(source), limit)


def _all(source: Source, limit: int | None) -> Iterator[tuple[int, Sample | Quarantined]]:
    return enumerate(islice(source.stream(), limit))


def _every(source: Source, limit: int | None, rank: int, size: int) -> Iterator[tuple[int, Sample | Quarantined]]:
    length = _length(source, limit)
    assert length is not None
    return ((index, source.record(index)) for index in range(rank, length, size))


def _prepare(
    model: Model,
    window: Sequence[tuple[int, Sample | Quarantined]],
    fields: Mapping[str, str],
    part: Part,
    rank: int,
    size: int,
) -> list[dict[str, Inputs]]:
    """Prepare this process's records of the window; note their places, the samples to keep and what is bad."""
    items: list[dict[str, Inputs]] = []
    for place, record in window:
        if rank == 0 and isinstance(record, Sample):
            part.samples[place] = record
        if place % size != rank:
            continue
        if isinstance(record, Quarantined):
            part.bad[place] = record
            continue
        item: dict[str, Inputs] = {}
        name = ""
        try:
            for name, tower in fields.items():
                if record.fields.get(name) is not None:
                    item[name] = model.tower(tower).encoder.prepare(record.fields[name])
        except Exception as error:  # classified, counted and, where no value is to blame, raised again: see `failure`
            part.bad[place] = failure(error, record.id, name)
            continue
        items.append(item)
        part.places.append(place)
    return items
