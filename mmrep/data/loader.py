"""Batches in an order that depends on the seed and the epoch alone, and that can be resumed anywhere.

The order of samples is drawn in the main process; workers only read and collate what they are told to. So neither
their number nor their timing changes a batch, and the position of a run is one integer. For a stream this means that
the raw records pass through the main process (cheap beside decoding them), and that resuming reads again, without
decoding, what came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmrep.config import ConfigError
from mmrep.data.batch import Batch
from mmrep.data.lengths import from_column, measured
from mmrep.data.order import Order, Record
from mmrep.data.reader import Item, Reader
from mmrep.data.sample import Quarantined, Sample, stable_hash
from mmrep.data.source import Source
from mmrep.registry import near
from mmrep.tokens import Inputs


class BatchLoader:
    """Batches of a source for one of ``world_size`` processes.

    Iterating yields the rest of the current epoch, from `position` on, and then goes to the next epoch; resumed at the
    end of an epoch, that is no batch at all, since another process may have some left to be told about. Global batch
    ``k`` of an epoch is the same set of samples in the same order for any number of processes and workers if the
    source is map-style; each process gets a contiguous slice of it, of sizes that differ by at most one. Of a stream
    each process reads its own part, which depends on the number of processes; the parts may be uneven.

    Args:
        source: what to read.
        reader: how to read it.
        batch_size: samples of a *global* batch, bad ones included; with ``max_tokens``, at most.
        seed: of the order.
        rank: this process.
        world_size: number of processes.
        workers: reading processes; 0 reads in this one.
        shuffle: draw a new order each epoch; False keeps the source's.
        drop_last: leave out the last batch of an epoch if it is not full.
        cache: keep in memory what was prepared of fields without sample-level views, and the raw values of the other
            fields, so that an epoch after the first reads nothing from the source and decodes nothing of the former.
            Map-style sources, ``workers=0``; all of it must fit in memory.
        buffer: a shuffled stream draws from this many records.
        distinct_groups: no two samples of one ``group`` in a global batch. Map-style sources; see `Batching`.
        bucket_by: samples in which this field is of similar length share a batch. Map-style sources; see `Batching`.
        lengths: a column that holds the lengths of that field; None = every sample is prepared once to learn them.
        max_tokens: with ``bucket_by``: a global batch ends before its samples times its longest would exceed this.
        micro_batch: samples of one process that are computed at a time; a larger batch comes in parts.
        pin_memory: page-lock the tensors, for a GPU.

    Raises:
        ConfigError: the source has fewer samples than a batch, a field is no column of it, or the options exclude
            each other.
    """

    def __init__(
        self,
        source: Source,
        reader: Reader,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        cache: bool = False,
        buffer: int = 1000,
        distinct_groups: bool = False,
        bucket_by: str | None = None,
        lengths: str | None = None,
        max_tokens: int | None = None,
        micro_batch: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        if cache and (workers or source.streaming):
            why = "a stream is never read twice" if source.streaming else "each worker would fill a cache of its own"
            raise ConfigError([f"cache: needs a map-style source and workers=0, since {why}"])
        source.require_columns(list(dict.fromkeys(reader.columns.values())), "fields")
        self._order = Order(
            source=source, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, shuffle=shuffle,
            drop_last=drop_last, buffer=buffer, distinct_groups=distinct_groups, max_tokens=max_tokens,
            lengths=_lengths(source, reader, bucket_by, lengths, max_tokens),
        )  # fmt: skip
        self._options: dict[str, Any] = {
            "dataset": _Readings(source, reader, cache),
            "batch_sampler": self._order,
            "collate_fn": _Collate(reader, packed=workers > 0, micro_batch=micro_batch),
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": pin_memory,
            # Its own, or every epoch would advance torch's global generator, and a resumed run would differ.
            "generator": torch.Generator().manual_seed(stable_hash(seed)),
        }
        # Nothing here may refer back to this object: in a cycle, the workers would take 5 seconds each to collect.
        self._loader: DataLoader[Item | Quarantined] | None = None

    @property
    def epoch(self) -> int:
        """Full passes done."""
        return self._order.epoch

    @property
    def position(self) -> int:
        """Batches handed out of the current epoch."""
        return self._order.position

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches an epoch, the same for every process; None for a stream."""
        return self._order.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        loader = self._loader = DataLoader(**self._options) if self._loader is None else self._loader
        for batch in loader:
            self._order.position += 1
            yield _unpacked(batch)
        if self.position == 0:
            raise ConfigError([f"batch_size: process {self._order.rank} found no full batch in its part of the stream; "
                               f"it needs {self._order.local_size} samples"])  # fmt: skip
        self.end_epoch()

    def end_epoch(self) -> None:
        """Go to the start of the next epoch, also if this process has batches left: when another one has none."""
        self._order.end_epoch()

    def close(self) -> None:
        """Stop the workers; iterating again starts new ones."""
        self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: every batch handed out counts as done. The same on every process."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another loader of the same data stood.

        Raises:
            ValueError: the order would be another: other data length, batch size or seed, or, for a stream, another
                number of processes.
        """
        self._order.load_state_dict(state)


def evaluation_items(
    source: Source, reader: Reader, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Sample | Quarantined, Item | Quarantined]]:
    """Every record of this process's part once, in the source's order, with its reading."""
    source.require_columns(list(dict.fromkeys(reader.columns.values())), "fields")
    for sample in source.stream(rank, world_size):
        yield sample, reader.read(sample, 0)


def evaluation_batches(
    source: Source, reader: Reader, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Every sample once, in the source's order, in batches.

    Args:
        source: what to read.
        reader: how to read it.
        batch_size: samples a batch of *one* process.
        rank: this process.
        world_size: number of processes; a process's last batch may be smaller than the others', or empty.
        workers: reading processes.
    """
    options = {"rank": rank, "world_size": world_size, "workers": workers, "shuffle": False, "drop_last": False}
    loader = BatchLoader(source, reader, batch_size=batch_size * world_size, **options)
    yield from loader


def _lengths(
    source: Source, reader: Reader, field: str | None, column: str | None, max_tokens: int | None
) -> Tensor | None:
    if field is None:
        given = [name for name, value in (("lengths", column), ("max_tokens", max_tokens)) if value is not None]
        if given:
            raise ConfigError([f"{name}: means something only with bucket_by" for name in given])
        return None
    if field not in reader.fields:
        fields = reader.fields
        raise ConfigError([f"bucket_by: unknown field {field!r}{near(field, fields)} Fields: {', '.join(fields)}"])
    return measured(source, field, reader.encoders[field]) if column is None else from_column(source, column)


class _Readings(Dataset[Item | Quarantined]):
    """Reads what the plan names; the part of the loader that runs in workers."""

    def __init__(self, source: Source, reader: Reader, cache: bool) -> None:
        self.source = source
        self.reader = reader
        self.kept: dict[int, tuple[Item, Sample]] | None = {} if cache else None

    def __getitem__(self, key: tuple[Record, int]) -> Item | Quarantined:
        record, epoch = key
        if not isinstance(record, int):
            return self.reader.read(record, epoch)
        if self.kept is None:
            return self.reader.read(self.source.record(record), epoch)
        if record in self.kept:
            kept, rest = self.kept[record]
            return self.reader.read(rest, epoch, kept) if rest.fields else self.reader.again(kept, epoch)
        sample = self.source.record(record)
        item = self.reader.read(sample, epoch)
        if isinstance(item, Item) and isinstance(sample, Sample):
            again = {self.reader.columns[field] for field in item.inputs if field not in self.reader.fixed}
            rest = {column: sample.fields[column] for column in again}
            self.kept[record] = item.only(self.reader.fixed), replace(sample, fields=rest)
        return item


class _Collate:
    """Collates in the worker. Single items travel as bytes: torch would spend a file descriptor on each tensor."""

    def __init__(self, reader: Reader, packed: bool, micro_batch: int | None) -> None:
        self.reader = reader
        self.packed = packed
        self.micro_batch = micro_batch

    def __call__(self, items: Sequence[Item | Quarantined]) -> Batch:
        batch = self.reader.collate(items, self.micro_batch)
        for part in (batch, *batch.parts) if self.packed else ():
            part.items = {field: [_pack(item) for item in found] for field, found in part.items.items()}
        return batch


def _pack(item: Inputs) -> Any:
    return {
        name: (value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, value in item.items()
    }


def _unpack(item: Any) -> Inputs:
    return {
        name: torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
        for name, (dtype, shape, data) in item.items()
    }


def _unpacked(batch: Batch) -> Batch:
    for part in (batch, *batch.parts):
        for field, items in part.items.items():
            if any(isinstance(value, tuple) for item in items for value in item.values()):
                part.items[field] = [_unpack(item) for item in items]
    return batch
