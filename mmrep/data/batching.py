"""Which samples of an epoch share a batch: plain, no two of a group, or of similar length.

All of it is arithmetic on whole epochs in the main process: a function of the order drawn and of a seed, with a number
of batches that is the same in every epoch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrep.config import ConfigError

BUCKETS = 32
"""Ranges of length: with more there is less padding, with fewer more samples can meet."""
LEAST_BATCHES = 4
"""Batches of a bucket at least, so that a sample always has several times a batch's samples to meet."""


@dataclass(frozen=True)
class Bucket:
    """Samples of similar length: places ``start`` to ``stop`` of the epoch sorted by length, dealt into ``batches``."""

    start: int
    stop: int
    batches: int

    @property
    def smallest(self) -> int:
        """Samples of its smallest batch; the largest has at most one more."""
        return (self.stop - self.start) // self.batches


class Batching:
    """Deals the samples of an epoch into global batches.

    *Groups.* No batch holds two samples of one group. The members of a group are dealt to batches one after another
    (McNaughton's wrap-around rule for scheduling, Management Science 6, 1959), which gives as many full batches as the
    groups allow at all. Only a group with more members than there are batches leaves some of them, others each epoch,
    out of the epoch; without ``drop_last`` there are as many batches as its members need instead.

    *Lengths.* The epoch is sorted by length and cut into buckets of `LEAST_BATCHES` batches or more; within a bucket,
    chance decides who meets whom, and batches come in random order. With ``max_tokens`` the batches of a bucket have as
    many samples as its longest one allows, so that samples times longest never exceeds it, and no sample is left out:
    ``drop_last`` means nothing then. Cuts depend on the sorted lengths alone, so they are the same in every epoch.

    Args:
        samples: of an epoch.
        batch_size: samples of a batch; with ``max_tokens``, at most.
        drop_last: leave out what does not fill a batch.
        groups: int64, a code by record number; equal codes never share a batch.
        lengths: int64, tokens by record number.
        max_tokens: samples times longest of a batch at most.
        most_repeats: how often an epoch holds one record at most.

    Attributes:
        steps: batches of every epoch.

    Raises:
        ConfigError: the groups or lengths allow no such batches.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        drop_last: bool,
        groups: Tensor | None = None,
        lengths: Tensor | None = None,
        max_tokens: int | None = None,
        most_repeats: int = 1,
    ) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.groups = groups
        self.lengths = lengths
        known = groups if groups is not None else lengths
        self._each_once = most_repeats == 1 and (known is None or len(known) == samples)
        self._exact = drop_last and max_tokens is None
        self._buckets: list[Bucket] | None = None
        self._largest_group = 0 if groups is None else int(torch.bincount(groups).max()) * most_repeats
        if lengths is not None:
            self._buckets = self._cut_by_length(lengths, max_tokens)
        elif groups is not None:
            steps = self._steps_of_groups(groups)
            self._buckets = [Bucket(0, steps * batch_size if self._exact else samples, steps)]
        if self._buckets is None:
            self.steps = samples // batch_size if self._exact else -(-samples // batch_size)
        else:
            self.steps = sum(bucket.batches for bucket in self._buckets)

    @property
    def used(self) -> int:
        """Samples of an epoch that are in a batch."""
        if self._buckets is None:
            return self.steps * self.batch_size if self._exact else self.samples
        return self._buckets[-1].stop

    @property
    def smallest(self) -> int:
        """Samples of the smallest batch."""
        return min((bucket.smallest for bucket in self._buckets), default=0) if self._buckets else self.batch_size

    def batches(self, order: Tensor, seed: int | None) -> Sequence[Tensor]:
        """The batches of one epoch.

        Args:
            order: int64 [samples], the record numbers of the epoch in the order drawn.
            seed: of further shuffling; None = the order is to be kept where that is possible.

        Returns:
            Per batch, int64 places in ``order``.
        """
        places = torch.arange(len(order))
        if self._buckets is None:
            return places[: self.used].split(self.batch_size)
        groups = None if self.groups is None else self.groups[order]
        if groups is not None and self._largest_group > self.steps:
            places = places[rank_within(groups) < self.steps]
        places = places[: self.used]
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        if self.lengths is not None:
            places = places[_sorted(self.lengths[order[places]])]
        found: list[Tensor] = []
        for bucket in self._buckets:
            part = _shuffled(places[bucket.start : bucket.stop], generator if self.lengths is not None else None)
            found.extend(_deal(part, None if groups is None else groups[part], bucket.batches))
        return [found[i] for i in _shuffled(torch.arange(len(found)), generator).tolist()]

    def _steps_of_groups(self, groups: Tensor) -> int:
        most, full = self._largest_group, self.samples // self.batch_size
        if not self._exact:
            return max(-(-self.samples // self.batch_size), most)
        if not self._each_once:
            # The weights of a mixture draw other members of a group each epoch: only a count that all allow is known.
            if most > full:
                raise ConfigError([
                    f"distinct_groups: a group can have {most} samples in an epoch of this mixture, more than the "
                    f"epoch has batches ({full}); lower batch_size or the weight of its part"
                ])  # fmt: skip
            return full
        sizes = torch.bincount(groups)
        steps = bisect_left(  # full batches need `batch_size` samples each, and a group gives each at most one
            range(1, full + 1), True, key=lambda n: int(sizes.clamp(max=n).sum()) < n * self.batch_size
        )
        if steps == 0:
            raise ConfigError([
                f"batch_size: without two samples of one group, a batch of {self.batch_size} needs as many groups, and "
                f"the data has {int((sizes > 0).sum())}"
            ])  # fmt: skip
        return steps

    def _cut_by_length(self, lengths: Tensor, max_tokens: int | None) -> list[Bucket]:
        if max_tokens is not None and not self._each_once:
            raise ConfigError([
                "max_tokens: the weights of this mixture draw other samples each epoch, so the number of batches "
                "cannot be known; leave out the weights, or use bucket_by without max_tokens"
            ])  # fmt: skip
        if max_tokens is not None and int(lengths.max()) > max_tokens:
            raise ConfigError([f"max_tokens: {max_tokens} is less than the longest sample, of {int(lengths.max())} "
                               f"tokens; raise it or make the encoder cut shorter"])  # fmt: skip
        total = self.samples - self.samples % self.batch_size if self._exact else self.samples
        ends = None if max_tokens is None else lengths.sort().values.clamp(min=1).tolist()
        finest = sum(bucket.batches for bucket in self._cut(total, ends, max_tokens or 0, 1))
        buckets = self._cut(total, ends, max_tokens or 0, max(LEAST_BATCHES, -(-finest // BUCKETS)))
        least = min(bucket.batches for bucket in buckets)
        if self._largest_group > least:
            raise ConfigError([
                f"distinct_groups: with bucket_by, a group can have at most {least} samples here (the batches of a "
                f"range of lengths), and one has {self._largest_group}; leave out one of the two"
            ])  # fmt: skip
        return buckets

    def _cut(self, total: int, ends: list[int] | None, max_tokens: int, batches: int) -> list[Bucket]:
        """Cut ``total`` samples, sorted by length, into buckets of ``batches`` batches each."""

        def size(stop: int) -> int:
            return self.batch_size if ends is None else min(self.batch_size, max_tokens // ends[stop - 1])

        found: list[Bucket] = []
        stop = total
        while stop:
            start = stop - batches * size(stop)
            # From the longest down: what is left for the last, larger bucket are the shortest, whose padding is cheap.
            if start > 0 and start >= batches * size(start):
                found.append(Bucket(start, stop, batches))
            else:
                start = 0
                found.append(Bucket(start, stop, -(-stop // size(stop))))
            stop = start
        return found[::-1]


def codes(groups: Iterable[Any]) -> Tensor:
    """A number for each group, int64; a sample without a group (None) has one of its own."""
    known: dict[Any, int] = {}
    fresh = iter(range(1 << 62))
    return torch.tensor([next(fresh) if g is None else known[g] if g in known else known.setdefault(g, next(fresh))
                         for g in groups])  # fmt: skip


def _deal(places: Tensor, groups: Tensor | None, batches: int) -> list[Tensor]:
    """Deal to ``batches`` batches whose sizes differ by at most one; no group meets itself unless it is too large."""
    if groups is None:
        return list(places.tensor_split(batches))
    _, first, inverse = np.unique(groups.numpy(), return_index=True, return_inverse=True)
    together = places[_sorted(torch.from_numpy(first[inverse]))]  # groups in the order of their first members
    return [together[batch::batches] for batch in range(batches)]


def rank_within(values: Tensor) -> Tensor:
    """How many equal values stand before each, int64."""
    order = _sorted(values)
    ordered = values[order]
    starts = torch.ones(len(values), dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    places = torch.arange(len(values))
    ranks = torch.empty_like(places)
    ranks[order] = places - torch.where(starts, places, 0).cummax(0).values
    return ranks


def _sorted(values: Tensor) -> Tensor:
    return torch.sort(values, stable=True).indices


def _shuffled(values: Tensor, generator: torch.Generator | None) -> Tensor:
    return values if generator is None else values[torch.randperm(len(values), generator=generator)]
