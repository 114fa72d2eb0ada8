"""Boxes on a lattice, many samples at once: how long they are, where they lie, and filling up a count with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrep.masks.masker import draw, lowest, ranked

Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0, lt=1)]
Aspect = Annotated[float, Field(gt=0)]
Temporal = Literal["full"] | Share


def ordered(name: str, pair: tuple[float, float]) -> None:
    """Refuse a range whose lower end is above its upper end.

    Raises:
        ValueError: naming the field.
    """
    if pair[0] > pair[1]:
        raise ValueError(f"{name}={list(pair)} runs from high to low; write [{pair[1]:g}, {pair[0]:g}]")


def between(pair: tuple[float, float], u: Tensor) -> Tensor:
    """Uniform numbers ``u`` in [0, 1), stretched to a range."""
    return pair[0] + (pair[1] - pair[0]) * u


def whole(u: Tensor, count: Tensor) -> Tensor:
    """Uniform numbers ``u`` in [0, 1) as integers from 0 to ``count`` - 1, both included."""
    return (u * count).long().minimum(count - 1).clamp_min(0)


def lengths(area: Tensor, aspect: Tensor, sizes: Tensor, temporal: float | str = "full") -> Tensor:
    """The lengths int64 [..., C] of a box along each axis.

    The last two axes are rows and columns; on one axis a box is a span of ``area``. The axes before (the frames of a
    video) are covered for the share ``temporal``.

    Args:
        area: float [...], tokens of one frame that the box should cover.
        aspect: float [...], height over width.
        sizes: int64 [..., C] of the lattice.
        temporal: share of each leading axis, or ``"full"``.
    """
    columns = sizes[..., -1].clamp_min(1)
    rows = sizes[..., -2].clamp_min(1) if sizes.shape[-1] > 1 else torch.ones_like(columns)
    # A box that is as high as the lattice makes up for it in width, and the other way round.
    height = (area * aspect).sqrt().clamp_min(1).minimum(rows)
    width = (area / height).clamp_min(1).minimum(columns)
    height = (area / width).clamp_min(1).minimum(rows)
    plane = [part.round().long() for part in (height, width)[-sizes.shape[-1] :]]
    part = 1.0 if isinstance(temporal, str) else temporal
    leading = (sizes[..., :-2] * part).round().long().clamp_min(1)
    return torch.cat([leading, torch.stack(plane, -1)], -1)


def inside(places: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Bool [..., N]: the tokens at ``places`` [..., N, C] in the box from ``start`` [..., C] of ``length`` [..., C]."""
    offset = places - start[..., None, :]
    return ((offset >= 0) & (offset < length[..., None, :])).all(-1)


def fill(
    places: Tensor,
    sizes: Tensor,
    among: Tensor,
    wanted: Tensor,
    seeds: Tensor,
    length: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Lay boxes until exactly ``wanted`` tokens are covered: bool [B * groups, N].

    Each box lies over a token that is not covered yet, drawn at random, any of its own tokens on that one; where it
    would stick out of the lattice it is moved in. Of the last box so many of the tokens it adds are left out, drawn at
    random, that the count comes out.

    Args:
        places: int64 [B * groups, N, C], see `mmrep.masks._lattice.lattice`.
        sizes: int64 [B * groups, C].
        among: bool [B * groups, N]; the tokens that may be covered.
        wanted: int64 [B * groups], at most the number ``among``.
        seeds: int64 [B]. Uses 0, 1 and the even ones from 4 of `draw` are taken.
        length: from the number of the box and the tokens still missing, int64 [B * groups], to its lengths int64
            [B * groups, C].
    """
    if len(seeds) == 0:
        return among
    (_, N, C), groups = places.shape, len(among) // len(seeds)
    anchors = ranked(draw(seeds, groups, N, 0), among)
    trim, covered = draw(seeds, groups, N, 1), torch.zeros_like(among)
    box = 0
    while bool(((missing := wanted - covered.sum(1)) > 0).any()):
        extent = length(box, missing).minimum(sizes).clamp_min(1)
        anchor = anchors.masked_fill(covered, N).argmin(1)
        at = places.gather(1, anchor[:, None, None].expand(-1, 1, C))[:, 0]
        start = at - whole(draw(seeds, groups, C, 4 + 2 * box), extent)
        start = start.minimum(sizes - extent).clamp_min(0)
        fresh = inside(places, start, extent) & among & ~covered
        covered |= lowest(trim, fresh, missing.clamp_min(0))
        box += 1
    return covered
