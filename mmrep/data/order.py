"""Which records make up which batch: a function of seed, epoch and position, that workers have no part in."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from mmrep.config import ConfigError
from mmrep.data.sample import Quarantined, Sample, stable_hash
from mmrep.data.source import Source

Record = int | Sample | Quarantined
"""What is to be read: the index of a record, or a record of a stream."""


@dataclass(kw_only=True)
class Order:
    """The batches of one of ``world_size`` processes; iterating yields what is left of the epoch.

    Attributes:
        source: what is read.
        batch_size: samples of a *global* batch.
        seed: of the order.
        rank: this process.
        world_size: number of processes.
        shuffle: draw a new order each epoch; False keeps the source's.
        drop_last: leave out the last batch of an epoch if it is not full.
        buffer: a shuffled stream draws from this many records.
        epoch: the current epoch.
        position: batches of it that are done.

    Raises:
        ConfigError: the source has fewer samples than a batch, or a batch fewer than there are processes.
    """

    source: Source
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    drop_last: bool = True
    buffer: int = 1000
    epoch: int = 0
    position: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < self.world_size:
            raise ConfigError([f"batch_size: {self.batch_size} samples cannot be divided among "
                               f"{self.world_size} processes"])  # fmt: skip
        self.length = None if self.source.streaming else len(self.source)
        if self.length is not None and self.drop_last and self.length < self.batch_size:
            raise ConfigError([f"batch_size: one batch takes {self.batch_size} samples and the data has {self.length}; "
                               f"lower batch_size to {self.length} or less"])  # fmt: skip

    @property
    def local_size(self) -> int:
        """Samples of a full batch of this process."""
        return len(range(self.batch_size)[share(self.batch_size, self.rank, self.world_size)])

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches an epoch, the same for every process; None for a stream."""
        if self.length is None:
            return None
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[Record, int]]]:
        """The records of each batch that is left, with the epoch."""
        epoch = self.epoch
        for batch in self._from_stream(epoch) if self.length is None else self._from_indices(epoch, self.length):
            yield [(record, epoch) for record in batch]

    def end_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch += 1
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """Position, and what the order depends on. The same on every process."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position.

        Raises:
            ValueError: the order would be another one than that of the state.
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
        keys = ["seed", "batch_size", "length", "shuffle", "drop_last"]
        return {key: getattr(self, key) for key in keys + (["world_size", "buffer"] if self.length is None else [])}

    def _from_indices(self, epoch: int, length: int) -> Iterator[Sequence[Record]]:
        order = torch.arange(length)
        if self.shuffle:
            order = torch.randperm(length, generator=torch.Generator().manual_seed(stable_hash(self.seed, epoch)))
        if self.drop_last:
            order = order[: length - length % self.batch_size]
        for batch in order.split(self.batch_size)[self.position :]:
            yield batch[share(len(batch), self.rank, self.world_size)].tolist()

    def _from_stream(self, epoch: int) -> Iterator[Sequence[Record]]:
        seed = stable_hash(self.seed, epoch) if self.shuffle else None
        records: Iterator[Sample | Quarantined] = self.source.stream(self.rank, self.world_size, seed)
        if seed is not None:
            records = _shuffled(records, self.buffer, random.Random(stable_hash(seed, self.rank)))
        size = self.local_size
        records = islice(records, self.position * size, None)
        while batch := list(islice(records, size)):
            if len(batch) == size or not self.drop_last:
                yield batch


def share(n: int, rank: int, world_size: int) -> slice:
    """The contiguous slice of ``n`` things that belongs to ``rank``; sizes differ by at most one."""
    return slice(rank * n // world_size, (rank + 1) * n // world_size)


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
