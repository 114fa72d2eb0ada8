"""Counting pairs that two orders disagree on, in N log N: what a loss over pairs of pairs comes down to."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def count_below(ranks: Tensor, starts: Tensor, stops: Tensor, limits: Tensor) -> Tensor:
    """For each question, how many of ``ranks[start:stop]`` are below its limit.

    A wavelet matrix: from the highest bit of the ranks to the lowest, all of them are sorted by that bit (stably), and
    every question follows the half that its limit goes to, with the count of the half below it. That is
    O((N + Q) log N) time and O(N + Q) memory, in whole-tensor operations.

    Args:
        ranks: int64 [N], not negative.
        starts: int64 [Q], 0 <= start <= stop.
        stops: int64 [Q], at most N.
        limits: int64 [Q], not negative.

    Returns:
        int64 [Q].
    """
    found = torch.zeros_like(limits)
    if not len(ranks):
        return found
    bits = int(torch.stack([ranks.max(), limits.max() if len(limits) else ranks.max()]).max()).bit_length()
    for bit in reversed(range(bits)):
        low = ranks >> bit & 1 == 0
        before = torch.cat([ranks.new_zeros(1), low.cumsum(0)])  # of every place, the low ones before it
        high = limits >> bit & 1 == 1
        a, b = before[starts], before[stops]
        found += torch.where(high, b - a, 0)  # all of the lower half are below the limit
        starts = torch.where(high, before[-1] + starts - a, a)
        stops = torch.where(high, before[-1] + stops - b, b)
        ranks = torch.cat([ranks[low], ranks[~low]])
    return found


def violations(own: Tensor, wanted: Tensor, margin: float, mine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of which pairs ``(p, q)`` with ``wanted_p > wanted_q`` it is not true that ``own_p >= own_q + margin``.

    Args:
        own: [P].
        wanted: [P].
        margin: not negative.
        mine: int64 [M], the indices that are asked for.

    Returns:
        Three int64 [M]: for each index asked for, in how many such pairs it is ``p``; in how many it is ``q``; and how
        many others have the same ``wanted``. A pair counts for both of its members or for neither, however ``own`` and
        ``margin`` round.
    """
    levels, sizes = cast("tuple[Tensor, Tensor]", cast(Any, wanted).unique(return_inverse=True, return_counts=True)[1:])
    values, order = own.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=own.device)
    # Of each, the first place in the order of `own` that is too near above, or higher; it grows with `own`.
    near = torch.searchsorted(values, values - margin, right=True)
    reach = torch.searchsorted(near, place[mine], right=True)
    ranks, here = levels[order], levels[mine]
    first, ends = near[place[mine]], torch.full_like(mine, len(own))
    starts, stops = torch.cat([first, torch.zeros_like(mine)]), torch.cat([ends, reach])
    as_higher, not_lower = count_below(ranks, starts, stops, torch.cat([here, here + 1])).chunk(2)
    return as_higher, reach - not_lower, sizes[here] - 1
