"""Batches in an order that depends on the seed and the epoch alone, and that can be resumed anywhere.

The order of samples is drawn in the main process; workers only read and collate what they are told to. So neither
their number nor their timing changes a batch, and the position of a run is one integer. For a stream this means that
the raw records pass through the main process (cheap beside decoding them), and that resuming reads again, without
decoding, what came before.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mmrep.config import ConfigError
from mmrep.data.batch import Batch
from mmrep.data.reader import Item, Reader
from mmrep.data.sample import Quarantined, Sample, stable_hash
from mmrep.data.source import Source
from mmrep.tokens import Inputs

Record = int | Sample | Quarantined
"""What a worker is told to read: the index of a record, or a record of a stream."""


class BatchLoader:
    """Batches of a source for one of ``world_size`` processes.

    Iterating yields the rest of the current epoch, from `position` on, and then goes to the next epoch. Global batch
    ``k`` of an epoch is the same set of samples in the same order for any number of processes and workers if the
    source is map-style; each process gets a contiguous slice of it, of sizes that differ by at most one. Of a stream
    each process reads its own part, which depends on the number of processes; the parts may be uneven.

    Args:
        source: what to read.
        reader: how to read it.
        batch_size: samples of a *global* batch, bad ones included.
        seed: of the order.
        rank: this process.
        world_size: number of processes.
        workers: reading processes; 0 reads in this one.
        shuffle: draw a new order each epoch; False keeps the source's.
        drop_last: leave out the last batch of an epoch if it is not full.
        cache: keep in memory what was prepared of fields without sample-level views, so that an epoch after the first
            decodes nothing of them. Map-style sources, ``workers=0``; the prepared data must fit in memory.
        buffer: a shuffled stream draws from this many records.
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
        pin_memory: bool = False,
    ) -> None:
        if batch_size < world_size:
            raise ConfigError([f"batch_size: {batch_size} samples cannot be divided among {world_size} processes"])
        if cache and (workers or source.streaming):
            why = "a stream is never read twice" if source.streaming else "each worker would fill a cache of its own"
            raise ConfigError([f"cache: needs a map-style source and workers=0, since {why}"])
        source.require_columns(reader.fields, "fields")
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.buffer = buffer
        self.epoch = 0
        self.position = 0
        self.length = None if source.streaming else len(source)
        if self.length is not None and drop_last and self.length < batch_size:
            raise ConfigError([f"batch_size: one batch takes {batch_size} samples and the data has {self.length}; "
                               f"lower batch_size to {self.length} or less"])  # fmt: skip
        self._loader = DataLoader(
            _Readings(source, reader, cache),
            batch_sampler=_Plan(self),  # type: ignore[arg-type]
            collate_fn=_Collate(reader, packed=workers > 0),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            # Its own, or every epoch would advance torch's global generator, and a resumed run would differ.
            generator=torch.Generator().manual_seed(stable_hash(seed)),
        )

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches an epoch, the same for every process; None for a stream."""
        if self.length is None:
            return None
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        start = self.position
        for batch in self._loader:
            self.position += 1
            yield _unpacked(batch)
        if self.position == 0:
            raise ConfigError([f"batch_size: process {self.rank} found no full batch in its part of the stream; "
                               f"it needs {self._local_size()} samples"])  # fmt: skip
        nothing_was_left = self.position == start
        self.end_epoch()
        if nothing_was_left:
            yield from self

    def end_epoch(self) -> None:
        """Go to the start of the next epoch, also if this process has batches left: when another one has none."""
        self.epoch += 1
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: every batch handed out counts as done. The same on every process."""
        state = {"epoch": self.epoch, "position": self.position, **self._identity()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another loader of the same data stood.

        Raises:
            ValueError: the order would be another: other data length, batch size or seed, or, for a stream, another
                number of processes.
        """
        words = {"length": "number of samples", "batch_size": "global batch size", "world_size": "number of processes"}
        changed = [
            f"the {words.get(key, key)} was {state.get(key)} and is {value}"
            for key, value in self._identity().items()
            if state.get(key) != value
        ]
        if changed:
            raise ValueError(f"cannot resume in the same order of samples: {'; '.join(changed)}")
        self.epoch, self.position = state["epoch"], state["position"]

    def _identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = {
            "seed": self.seed, "batch_size": self.batch_size, "length": self.length, "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }  # fmt: skip
        return identity | ({"world_size": self.world_size, "buffer": self.buffer} if self.length is None else {})

    def plan(self) -> Iterator[list[tuple[Record, int]]]:
        """The records of each batch that is left of this epoch, with the epoch."""
        epoch = self.epoch
        batches = self._from_stream(epoch) if self.length is None else self._from_order(epoch)
        for batch in batches:
            yield [(record, epoch) for record in batch]

    def _from_order(self, epoch: int) -> Iterator[Sequence[Record]]:
        assert self.length is not None and self.steps_per_epoch is not None
        order = torch.arange(self.length)
        if self.shuffle:
            generator = torch.Generator().manual_seed(stable_hash(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator)
        for step in range(self.position, self.steps_per_epoch):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield batch[share(len(batch), self.rank, self.world_size)].tolist()

    def _from_stream(self, epoch: int) -> Iterator[Sequence[Record]]:
        seed = stable_hash(self.seed, epoch) if self.shuffle else None
        records: Iterator[Sample | Quarantined] = self.source.stream(self.rank, self.world_size, seed)
        if seed is not None:
            records = _shuffled(records, self.buffer, random.Random(stable_hash(seed, self.rank)))
        size = self._local_size()
        records = islice(records, self.position * size, None)
        while batch := list(islice(records, size)):
            if len(batch) == size or not self.drop_last:
                yield batch

    def _local_size(self) -> int:
        return len(range(self.batch_size)[share(self.batch_size, self.rank, self.world_size)])


def share(n: int, rank: int, world_size: int) -> slice:
    """The contiguous slice of ``n`` things that belongs to ``rank``; sizes differ by at most one."""
    return slice(rank * n // world_size, (rank + 1) * n // world_size)


def evaluation_items(
    source: Source, reader: Reader, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Sample | Quarantined, Item | Quarantined]]:
    """Every record of this process's part once, in the source's order, with its reading."""
    source.require_columns(reader.fields, "fields")
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


class _Plan:
    """The loader's plan, drawn anew for each epoch by torch's DataLoader."""

    def __init__(self, loader: BatchLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[tuple[Record, int]]]:
        return self.loader.plan()


class _Readings(Dataset[Item | Quarantined]):
    """Reads what the plan names; the part of the loader that runs in workers."""

    def __init__(self, source: Source, reader: Reader, cache: bool) -> None:
        self.source = source
        self.reader = reader
        self.kept: dict[int, Item] | None = {} if cache else None

    def __getitem__(self, key: tuple[Record, int]) -> Item | Quarantined:
        record, epoch = key
        if not isinstance(record, int):
            return self.reader.read(record, epoch)
        if self.kept is None:
            return self.reader.read(self.source.record(record), epoch)
        kept = self.kept.get(record)
        if kept is not None and len(self.reader.fixed) == len(self.reader.fields):
            return self.reader.again(kept, epoch)
        item = self.reader.read(self.source.record(record), epoch, kept)
        if kept is None and isinstance(item, Item):
            fixed = {field: inputs for field, inputs in item.inputs.items() if field in self.reader.fixed}
            self.kept[record] = Item(item.id, item.label, item.group, item.seed, fixed, item.keys)
        return item


class _Collate:
    """Collates in the worker. Single items travel as bytes: torch would spend a file descriptor on each tensor."""

    def __init__(self, reader: Reader, packed: bool) -> None:
        self.reader = reader
        self.packed = packed

    def __call__(self, items: Sequence[Item | Quarantined]) -> Batch:
        batch = self.reader.collate(items)
        if self.packed:
            batch.items = {field: [_pack(item) for item in found] for field, found in batch.items.items()}
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
    for field, items in batch.items.items():
        if any(isinstance(value, tuple) for item in items for value in item.values()):
            batch.items[field] = [_unpack(item) for item in items]
    return batch


def _shuffled(records: Iterable[Any], buffer: int, generator: random.Random) -> Iterator[Any]:
    """Draw from a window of ``buffer`` records that moves through the stream."""
    held: list[Any] = []
    for record in records:
        if len(held) < buffer:
            held.append(record)
            continue
        place = generator.randrange(buffer)
        yield held[place]
        held[place] = record
    generator.shuffle(held)
    yield from held
