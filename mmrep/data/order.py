"""Which records make up which batch: a function of seed, epoch and position, that workers have no part in."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mmrep.config import ConfigError
from mmrep.data.batching import Batching, codes, rank_within
from mmrep.data.sample import Quarantined, Sample, stable_hash
from mmrep.data.source import Source

logger = logging.getLogger(__name__)
Record = int | Sample | Quarantined
"""What is to be read: the index of a record, or a record of a stream."""


@dataclass(kw_only=True)
class Order:
    """The batches of one of ``world_size`` processes; iterating yields what is left of the epoch.

    Attributes:
        source: what is read.
        batch_size: samples of a *global* batch; with ``max_tokens``, at most.
        seed: of the order.
        rank: this process.
        world_size: number of processes.
        shuffle: draw a new order each epoch; False keeps the source's.
        drop_last: leave out the last batch of an epoch if it is not full.
        buffer: a shuffled stream draws from this many records.
        distinct_groups: no two samples of one group in a global batch; map-style sources that know their groups.
        lengths: int64, by record number: samples of similar length share a batch. Map-style sources.
        max_tokens: with ``lengths``: samples times longest of a global batch at most.
        epoch: the current epoch.
        position: batches of it that are done.

    Raises:
        ConfigError: the source has fewer samples than a batch, a batch fewer than there are processes, or the groups
            and lengths allow no such batches.
    """

    source: Source
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    drop_last: bool = True
    buffer: int = 1000
    distinct_groups: bool = False
    lengths: Tensor | None = None
    max_tokens: int | None = None
    epoch: int = 0
    position: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < self.world_size:
            raise ConfigError([f"batch_size: {self.batch_size} samples cannot be divided among "
                               f"{self.world_size} processes"])  # fmt: skip
        self._batching: Batching | None = None
        self.length: int | None = None
        if self.source.streaming:
            self._refuse_for_streams()
            return
        self.length = self.source.epoch_length if self.shuffle else len(self.source)
        if self.drop_last and self.max_tokens is None and self.length < self.batch_size:
            raise ConfigError([f"batch_size: one batch takes {self.batch_size} samples and the data has {self.length}; "
                               f"lower batch_size to {self.length} or less"])  # fmt: skip
        self._batching = Batching(
            self.length, self.batch_size, drop_last=self.drop_last, groups=self._groups(), lengths=self.lengths,
            max_tokens=self.max_tokens, most_repeats=self.source.most_repeats if self.shuffle else 1,
        )  # fmt: skip
        if self.max_tokens is not None and self._batching.smallest < self.world_size:
            raise ConfigError([f"max_tokens: {self.max_tokens} allows batches of {self._batching.smallest} samples, "
                               f"which cannot be divided among {self.world_size} processes"])  # fmt: skip
        left_out = self.length - self._batching.used
        if self.distinct_groups and left_out >= self.batch_size:
            logger.warning(
                "distinct_groups: %d of %d samples are left out of each epoch, others each time, since the largest "
                "groups have more samples than there are full batches (%d)", left_out, self.length, self._batching.steps
            )  # fmt: skip

    @property
    def local_size(self) -> int:
        """Samples of a full batch of this process."""
        return len(range(self.batch_size)[share(self.batch_size, self.rank, self.world_size)])

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches an epoch, the same for every process; None for a stream."""
        return None if self._batching is None else self._batching.steps

    def __iter__(self) -> Iterator[list[tuple[Record, int]]]:
        """The records of each batch that is left, with the epoch."""
        epoch = self.epoch
        if self._batching is not None:
            yield from self._from_indices(epoch, self._batching)
            return
        for batch in self._from_stream(epoch):
            yield [(record, reading(epoch, getattr(record, "times", 0))) for record in batch]

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
        now = self._identity()
        changed = [
            f"the {words.get(key, key)} was {state.get(key)} and is {now.get(key)}"
            for key in dict.fromkeys([*now, *state])
            if key not in ("epoch", "position") and state.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(f"cannot resume in the same order of samples: {'; '.join(changed)}")
        self.epoch, self.position = state["epoch"], state["position"]

    def _identity(self) -> dict[str, Any]:
        keys = ["seed", "batch_size", "length", "shuffle", "drop_last"]
        found = {key: getattr(self, key) for key in keys + (["world_size", "buffer"] if self.length is None else [])}
        if self._batching is not None:  # only what is in use, so that older states can still be loaded
            options = {"groups": self._batching.groups, "lengths": self.lengths}
            found |= {key: _digest(value) for key, value in options.items() if value is not None}
            found |= {"max_tokens": self.max_tokens} if self.max_tokens is not None else {}
        return found

    def _groups(self) -> Tensor | None:
        if not self.distinct_groups:
            return None
        try:
            return codes(self.source.groups())
        except ConfigError as error:
            raise ConfigError([f"distinct_groups: {problem}" for problem in error.problems]) from error

    def _refuse_for_streams(self) -> None:
        options = {"distinct_groups": self.distinct_groups, "bucket_by": self.lengths is not None,
                   "max_tokens": self.max_tokens is not None}  # fmt: skip
        problems = [
            f"{name}: needs a map-style source; what a stream holds is not known before it is read"
            for name, used in options.items()
            if used
        ]
        if problems:
            raise ConfigError(problems)

    def _from_indices(self, epoch: int, batching: Batching) -> Iterator[list[tuple[Record, int]]]:
        seed = stable_hash(self.seed, epoch) if self.shuffle else None
        order = torch.arange(len(self.source)) if seed is None else self.source.epoch_order(seed)
        times = rank_within(order) if seed is not None and self.source.most_repeats > 1 else torch.zeros_like(order)
        further = None if seed is None else stable_hash(seed, "batches")
        for batch in batching.batches(order, further)[self.position :]:
            mine = batch[share(len(batch), self.rank, self.world_size)]
            records = zip(order[mine].tolist(), times[mine].tolist(), strict=True)
            yield [(record, reading(epoch, again)) for record, again in records]

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


def reading(epoch: int, times: int) -> int:
    """What a sample's views derive from: its epoch, and another number each time that the epoch reads it again."""
    return epoch + (times << 32)


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


def _digest(values: Tensor) -> str:
    return hashlib.blake2b(values.numpy().tobytes(), digest_size=8).hexdigest()
