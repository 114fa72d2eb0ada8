"""From one rank's paired rows to what it must compute: its own queries against every rank's keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmrep.world import LocalWorld, World


@dataclass(frozen=True)
class PairBatch:
    """Valid rows only, in float32 (or float64 where the inputs are).

    Attributes:
        a: [n, D], this rank's rows.
        b: [n, D], paired with ``a`` row by row.
        keys: [N + H, D], every rank's ``b`` in rank order, then every rank's hard negatives.
        pairs: N, the number of valid pairs of all ranks.
        own: where this rank's pairs are among the first N keys.
        groups: [n], numbers in 0..N-1; equal for pairs that are positives of each other. None: each pair for itself.
        key_groups: [N + H], the same for the keys; -1 for a hard negative.
        scale: 0-D.
        world: the ranks.
    """

    a: Tensor
    b: Tensor
    keys: Tensor
    pairs: int
    own: slice
    groups: Tensor | None
    key_groups: Tensor | None
    scale: Tensor
    world: World

    def reduce(self, local_sum: Tensor) -> Tensor:
        """Global mean over pairs, up to the convention of `mmrep.world`; exactly 0 with a zero gradient if none."""
        return local_sum * (self.world.size / max(self.pairs, 1))


def pair_batch(
    a: Tensor,
    b: Tensor,
    *,
    scale: Tensor | float,
    negatives: Tensor | None,
    group: Tensor | None,
    valid: Tensor | None,
    world: World | None,
) -> PairBatch:
    """Check, drop invalid rows, cast, and gather. All ranks call it together."""
    _check(a, b, negatives, group, valid)
    world = world or LocalWorld()
    dtype = torch.float64 if a.dtype == b.dtype == torch.float64 else torch.float32
    if valid is not None:
        # Selecting (not masking) makes "neither anchor nor positive nor negative" true by construction.
        rows = valid.nonzero().squeeze(1)
        a, b, group = a[rows], b[rows], None if group is None else group[rows]
    a, b = a.to(dtype), b.to(dtype)
    a = _agree(a, negatives, group, world)
    all_b = world.gather(b)
    offset = world.offset(len(b))
    own = slice(offset, offset + len(b))
    groups = key_groups = None
    if group is not None:
        # Renumbered to 0..N-1 (where each first stands in sorted order), so that -1 is free for hard negatives.
        everyone = world.gather(group)
        key_groups = torch.searchsorted(everyone.sort().values, everyone)
        groups = key_groups[own]
    keys = all_b
    if negatives is not None:
        # Gathered apart from b: one gather of [b; negatives] would interleave the two by rank.
        extra = world.gather(negatives.to(dtype))
        keys = torch.cat([all_b, extra])
        key_groups = None if key_groups is None else torch.cat([key_groups, key_groups.new_full((len(extra),), -1)])
    return PairBatch(a, b, keys, len(all_b), own, groups, key_groups, scalar(scale, a), world)


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """``value`` as 0-D in the dtype and device of ``like``; a [1] parameter (as FSDP2 needs) is welcome."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"scale and bias are single numbers, got a tensor of shape {tuple(value.shape)}")
        return value.reshape(()).to(device=like.device, dtype=like.dtype)
    return like.new_tensor(value)


def _agree(a: Tensor, negatives: Tensor | None, group: Tensor | None, world: World) -> Tensor:
    """Make sure that all ranks will make the same collective calls, forward and backward."""
    if world.size == 1:
        return a
    here = torch.tensor([negatives is not None, group is not None, a.requires_grad], dtype=torch.int64, device=a.device)
    with_negatives, with_group, with_grad = (int(count) for count in world.sum(here).cpu())
    for name, count in (("negatives", with_negatives), ("group", with_group)):
        if count not in (0, world.size):
            raise ValueError(
                f"`{name}` was given on {count} of {world.size} ranks; give it on all or on none "
                "(a rank with nothing to add gives a tensor of zero rows)"
            )
    # A rank whose rows are constants (an absent modality) still takes part in the backward collectives.
    return a.detach().requires_grad_() if with_grad and torch.is_grad_enabled() and not a.requires_grad else a


def _check(a: Tensor, b: Tensor, negatives: Tensor | None, group: Tensor | None, valid: Tensor | None) -> None:
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
