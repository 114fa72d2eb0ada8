"""From one rank's paired rows to what it must compute: its own queries against every rank's keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmrep.losses._ring import Ring, number_groups
from mmrep.world import LocalWorld, World

Exchange = Literal["gather", "ring"]


@dataclass(frozen=True)
class PairBatch:
    """Valid rows only, in float32 (or float64 where the inputs are).

    Attributes:
        a: [n, D], this rank's rows.
        b: [n, D], paired with ``a`` row by row.
        keys: [m, D], every rank's ``b`` in rank order, then every rank's hard negatives; in a ring, this rank's ``b``,
            then this rank's hard negatives.
        pairs: N, the number of valid pairs of all ranks.
        first: where this rank's pairs start among those N.
        own: where this rank's pairs are among the keys.
        groups: [n], numbers in 0..N-1; equal for pairs that are positives of each other. None: each pair for itself.
        key_groups: [m], the same for the keys; -1 for a hard negative.
        scale: 0-D.
        world: the ranks.
        ring: how the keys come to the other ranks; None where they have been gathered.
    """

    a: Tensor
    b: Tensor
    keys: Tensor
    pairs: int
    first: int
    own: slice
    groups: Tensor | None
    key_groups: Tensor | None
    scale: Tensor
    world: World
    ring: Ring | None

    def reduce(self, local_sum: Tensor) -> Tensor:
        """Global mean over pairs, up to the convention of `mmrep.world`; exactly 0 with a zero gradient if none."""
        return local_sum * (self.world.size / max(self.pairs, 1))

    def own_columns(self, columns: Tensor) -> Tensor:
        """This rank's [n] of column sums [m]; of gathered keys, the rows of one rank are only a part of each column."""
        if self.ring is not None:
            return columns[self.own]
        # Only these partial sums travel, never a second set of keys.
        return self.world.logsumexp(columns[: self.pairs])[self.own]

    def shared(self, x: Tensor) -> Tensor:
        """``x`` [n, D] as the keys are: of all ranks if gathered, of this one if they travel."""
        return x if self.ring is not None else self.world.gather(x)

    def numbers(self) -> tuple[Tensor, Tensor]:
        """``groups`` and ``key_groups`` where each pair is a group by itself unless told otherwise."""
        if self.groups is not None and self.key_groups is not None:
            return self.groups, self.key_groups
        pairs = self.own.stop - self.own.start if self.ring is not None else self.pairs
        key_groups = torch.arange(len(self.keys), device=self.keys.device)
        key_groups[pairs:] = -1
        if self.ring is not None:
            key_groups[:pairs] += self.first
        return key_groups[self.own], key_groups


def pair_batch(
    a: Tensor,
    b: Tensor,
    *,
    scale: Tensor | float,
    negatives: Tensor | None,
    group: Tensor | None,
    valid: Tensor | None,
    world: World | None,
    exchange: Exchange = "gather",
) -> PairBatch:
    """Check, drop invalid rows, cast, and gather or prepare the ring. All ranks call it together."""
    check_exchange(exchange)
    check_pairs(a, b, negatives, group, valid)
    world = world or LocalWorld()
    dtype = torch.float64 if a.dtype == b.dtype == torch.float64 else torch.float32
    if valid is not None:
        # Selecting (not masking) makes "neither anchor nor positive nor negative" true by construction.
        rows = valid.nonzero().squeeze(1)
        a, b, group = a[rows], b[rows], None if group is None else group[rows]
    a, b, negatives = a.to(dtype), b.to(dtype), None if negatives is None else negatives.to(dtype)
    a, b, negatives = _agree(a, b, negatives, group, world, exchange)
    exchanged = _gathered if exchange == "gather" else _in_a_ring
    return exchanged(a, b, negatives, group, scalar(scale, a), world)


def _gathered(
    a: Tensor, b: Tensor, negatives: Tensor | None, group: Tensor | None, scale: Tensor, world: World
) -> PairBatch:
    keys = all_b = world.gather(b)
    first = world.offset(len(b))
    own = slice(first, first + len(b))
    groups = key_groups = None
    if group is not None:
        # Renumbered to 0..N-1 (where each first stands in sorted order), so that -1 is free for hard negatives.
        everyone = world.gather(group)
        key_groups = torch.searchsorted(everyone.sort().values, everyone)
        groups = key_groups[own]
    if negatives is not None:
        # Gathered apart from b: one gather of [b; negatives] would interleave the two by rank.
        extra = world.gather(negatives)
        keys, key_groups = torch.cat([all_b, extra]), _with_negatives(key_groups, extra)
    return PairBatch(a, b, keys, len(all_b), first, own, groups, key_groups, scale, world, None)


def _in_a_ring(
    a: Tensor, b: Tensor, negatives: Tensor | None, group: Tensor | None, scale: Tensor, world: World
) -> PairBatch:
    pairs = Ring.of(world, b)
    ring, keys, groups, key_groups = pairs, b, None, None
    if group is not None:
        groups = key_groups = number_groups(group, Ring.of(world, group))
    if negatives is not None:
        keys, key_groups = torch.cat([b, negatives]), _with_negatives(key_groups, negatives)
        ring = Ring.of(world, keys)
    first, own = sum(pairs.sizes[: world.rank]), slice(0, len(b))
    return PairBatch(a, b, keys, sum(pairs.sizes), first, own, groups, key_groups, scale, world, ring)


def _with_negatives(key_groups: Tensor | None, negatives: Tensor) -> Tensor | None:
    return None if key_groups is None else torch.cat([key_groups, key_groups.new_full((len(negatives),), -1)])


def check_exchange(exchange: str) -> None:
    """Refuse what is no `Exchange`."""
    if exchange not in ("gather", "ring"):
        raise ValueError(f"exchange is 'gather' or 'ring', got {exchange!r}")


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """``value`` as 0-D in the dtype and device of ``like``; a [1] parameter (as FSDP2 needs) is welcome."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"scale and bias are single numbers, got a tensor of shape {tuple(value.shape)}")
        return value.reshape(()).to(device=like.device, dtype=like.dtype)
    return like.new_tensor(value)


def _agree(
    a: Tensor, b: Tensor, negatives: Tensor | None, group: Tensor | None, world: World, exchange: Exchange
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make sure that all ranks will make the same collective calls, forward and backward."""
    if world.size == 1:
        return a, b, negatives
    needs_grad = [x is not None and x.requires_grad for x in (a, b, negatives)]
    here = [negatives is not None, group is not None, exchange == "ring", *needs_grad]
    table = [int(count) for count in world.sum(torch.tensor(here, dtype=torch.int64, device=a.device)).cpu()]
    for name, count in zip(("negatives", "group"), table[:2], strict=True):
        if count not in (0, world.size):
            raise ValueError(
                f"`{name}` was given on {count} of {world.size} ranks; give it on all or on none "
                "(a rank with nothing to add gives a tensor of zero rows)"
            )
    if table[2] not in (0, world.size):
        raise ValueError(f"exchange was 'ring' on {table[2]} of {world.size} ranks; choose one for all")

    def agreed(x: Tensor, count: int) -> Tensor:
        # A rank whose rows are constants (an absent modality) still takes part in the backward collectives.
        return x.detach().requires_grad_() if count and torch.is_grad_enabled() and not x.requires_grad else x

    with_a, with_b, with_negatives = table[3:]
    return agreed(a, with_a), agreed(b, with_b), None if negatives is None else agreed(negatives, with_negatives)


def check_pairs(a: Tensor, b: Tensor, negatives: Tensor | None, group: Tensor | None, valid: Tensor | None) -> None:
    """Refuse shapes and dtypes that do not fit."""
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a and b are paired rows of one shape [n, D], got {tuple(a.shape)} and {tuple(b.shape)}")
    for name, x in (("a", a), ("b", b), ("negatives", negatives)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must hold floating-point embeddings, got {x.dtype}")
    if negatives is not None and (negatives.ndim != 2 or negatives.shape[1] != a.shape[1]):
        raise ValueError(f"negatives must be [h, {a.shape[1]}], as wide as a and b, got {tuple(negatives.shape)}")
    if group is not None and (group.shape != a.shape[:1] or group.is_floating_point() or group.dtype == torch.bool):
        raise ValueError(f"group must be [{len(a)}] integers, one per pair, got {tuple(group.shape)} {group.dtype}")
    if valid is not None and (valid.shape != a.shape[:1] or valid.dtype != torch.bool):
        raise ValueError(f"valid must be [{len(a)}] booleans, one per pair, got {tuple(valid.shape)} {valid.dtype}")
