"""The processes that share one batch, as a loss or an objective sees them.

A batch-coupled loss is given a `World` and imports no collectives itself: `LocalWorld` is the one-process case, and
``mmrep.training.collectives.DistributedWorld`` implements the same verbs over ``torch.distributed``.

The convention, everywhere: **the mean over ranks of what a loss returns is the loss of one process on the concatenated
batch**, because DDP and FSDP average gradients over ranks. A loss therefore returns
``world.size * local_sum / global_count``, and the gradient that arrives at a shared tensor is the *sum* over ranks of
the gradients of their returned values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class World(Protocol):
    """What a loss may ask of the other ranks. Every rank must make the same calls in the same order."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def rank(self) -> int:
        """This process, ``0 <= rank < size``."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate ``x`` [n_rank, ...] over ranks, in rank order, to [sum of n_rank, ...]; n may differ or be 0.

        Differentiable: the gradients of all ranks are summed into the rows of the rank that owns them.
        """
        ...

    def logsumexp(self, x: Tensor) -> Tensor:
        """``log(sum over ranks of exp(x))`` elementwise, equal on all ranks; differentiable. -inf means no mass."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Sum of ``x`` over ranks, elementwise, equal on all ranks; differentiable for floating-point ``x``."""
        ...

    def offset(self, n: int) -> int:
        """Where this rank's ``n`` rows start in what `gather` returns for them."""
        ...

    def sizes(self, x: Tensor) -> list[int]:
        """Rows of ``x`` [n_rank, ...] on every rank, in rank order; where `shift` begins, as it exchanges blind.

        Raises:
            ValueError: on every rank, with a table, where dtype or trailing shape differ.
        """
        ...

    def shift(self, x: Tensor, rows: int) -> Tensor:
        """Send ``x`` [n, ...] to the next rank (the last to the first); return the ``rows`` rows that arrive.

        Not differentiable: it is for the passes of an autograd function. After ``size`` shifts a block is home again.
        """
        ...


@dataclass(frozen=True)
class LocalWorld:
    """A single process: every verb is the identity."""

    size: int = 1
    rank: int = 0

    def gather(self, x: Tensor) -> Tensor:
        """See `World.gather`."""
        return x

    def logsumexp(self, x: Tensor) -> Tensor:
        """See `World.logsumexp`."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """See `World.sum`."""
        return x

    def offset(self, n: int) -> int:
        """See `World.offset`."""
        return 0

    def sizes(self, x: Tensor) -> list[int]:
        """See `World.sizes`."""
        return [len(x)]

    def shift(self, x: Tensor, rows: int) -> Tensor:
        """See `World.shift`."""
        return x
