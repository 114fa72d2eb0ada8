"""Places and curves along series of different lengths in one batch: reading, warping, permuting, interpolating."""

from __future__ import annotations

import torch
from torch import Tensor


def at(steps: Tensor, places: Tensor) -> Tensor:
    """Read ``steps`` [B, L, …] at int64 ``places`` [B, L']; places past either end read the nearest step."""
    places = places.clamp(0, max(steps.shape[1] - 1, 0))
    if steps.ndim == 2:
        return steps.gather(1, places)
    return steps.gather(1, places[..., None].expand(-1, -1, steps.shape[2]))


def piecewise(knots: Tensor, count: Tensor, length: int) -> Tensor:
    """Linear interpolation between equally spaced knots: [B, K + 1, C] to [B, length, C].

    Args:
        knots: float [B, K + 1, C]; the first stands at step 0, the last at step ``count`` - 1.
        count: int64 [B], how many steps each sample has; later ones get the last knot.
        length: L of the batch.
    """
    segments = knots.shape[1] - 1
    steps = torch.arange(length, device=knots.device, dtype=torch.float32)
    place = (steps / (count - 1).clamp_min(1)[:, None]).clamp_max(1) * segments
    low = place.floor().long().clamp_max(segments - 1)
    rest = (place - low)[..., None]
    return at(knots, low) * (1 - rest) + at(knots, low + 1) * rest


def warp(speed: Tensor, count: Tensor, length: int) -> Tensor:
    """Where to read a series that is played at a changing speed, from its first step to its last: float [B, length].

    Args:
        speed: float [B, K], positive; of K equally long segments of the output.
        count: int64 [B]; steps past it read the last one.
        length: L of the batch.
    """
    reached = torch.cat([speed.new_zeros(len(speed), 1), speed.cumsum(1)], 1)
    reached = reached / reached[:, -1:]
    last = (count - 1).clamp_min(0)[:, None]
    # The last knot is exactly 1 and no rounding leads above it, so no step past the end of a series is ever read.
    return piecewise(reached[..., None], count, length)[..., 0] * last


def permutation(u: Tensor, count: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cut each series into equal segments and shuffle them.

    Args:
        u: float [B, most + 1] in [0, 1); the first says how many segments, 1 .. ``most`` (and at most ``count``), the
            others in which order.
        count: int64 [B].
        length: L of the batch.

    Returns:
        The segment that stands at each place, int64 [B, most], -1 past the last; and the step of the input that each
        step of the output is, int64 [B, length], of steps past ``count`` the step itself.
    """
    most = u.shape[1] - 1
    segments = (1 + (u[:, 0] * most).long()).minimum(count.clamp_min(1))[:, None]
    index = torch.arange(most, device=u.device)
    order = torch.where(index < segments, u[:, 1:], 2.0).argsort(1)
    exists = index < segments
    bounds = torch.arange(most + 1, device=u.device).minimum(segments) * count[:, None] // segments
    start, size = bounds[:, :-1].gather(1, order), bounds.diff(dim=1).gather(1, order)
    ends = torch.where(exists, size, 0).cumsum(1)
    steps = torch.arange(length, device=u.device).expand(len(u), -1).contiguous()
    slot = torch.searchsorted(ends, steps, right=True).clamp_max(most - 1)
    moved = start.gather(1, slot) + steps - (ends - size).gather(1, slot)
    return order.masked_fill(~exists, -1), torch.where(steps < count[:, None], moved, steps)
