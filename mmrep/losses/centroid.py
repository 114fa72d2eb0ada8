"""Contrast of each field of a tuple with the centroid of the others, whichever of them are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmrep.losses._batch import Exchange, check_exchange, scalar
from mmrep.losses._tiles import Tile, lengths
from mmrep.losses._tuples import agree, anchors, check_fields, check_tuples, common_dtype
from mmrep.losses.infonce import Duplicates, check_duplicates, info_nce
from mmrep.world import LocalWorld, World

_SHORT = 1e-3
"""A mean shorter than this is not lengthened to 1: fields that cancel have no common direction."""


def centroid(
    embeddings: Sequence[Tensor],
    *,
    scale: Tensor | float,
    group: Tensor | None = None,
    valid: Tensor | None = None,
    anchor: int | None = None,
    duplicates: Duplicates = "positive",
    world: World | None = None,
    exchange: Exchange = "gather",
    tile: Tile | None = None,
) -> dict[str, Tensor]:
    r"""InfoNCE between each field and the leave-one-out centroid.

    Of tuple i, P(i) are the fields that are present, two at least. The centroid without field k is ``c_ik``, the mean
    of x_im over m in P(i), m != k, brought to unit length (a mean shorter than 0.001 is divided by that)::

        L_k  = info_nce(x_ik, c_ik) in both directions, over the tuples with k in P(i)
        loss = sum_k n_k L_k / sum_k n_k, with n_k the number of those tuples on all ranks

    so that every pair of a tuple and a field that it has counts the same. CentroBind (arXiv:2410.02086) contrasts
    with the mean of all fields, the field itself included, which it can agree with alone; here it is left out.

    Samples of one group are what `mmrep.losses.info_nce` makes of them: positives, or masked. Cost and memory are those
    of M calls of it.

    Args, returns and raises: see `mmrep.losses._tuples.TupleLoss`; incomplete tuples take part. ``anchor``: only this
    field is contrasted with the centroid of the others. duplicates, exchange, tile: as `mmrep.losses.info_nce`.
    """
    check_fields("Centroid", Centroid.fields, len(embeddings))
    check_tuples(embeddings, group, valid)
    turns = anchors(anchor, len(embeddings))
    world = world or LocalWorld()
    dtype = common_dtype(embeddings)
    present = embeddings[0].new_ones(len(embeddings[0]), len(embeddings), dtype=torch.bool) if valid is None else valid
    # Filled, not multiplied: what is in an absent row is never read, not even NaN.
    fields = [x.to(dtype).masked_fill(~present[:, k : k + 1], 0) for k, x in enumerate(embeddings)]
    fields = agree(fields, group, world)
    several = present.sum(1) > 1
    takes_part = torch.stack([present[:, k] & several for k in turns], 1)
    counts = world.sum(torch.cat([takes_part.sum(0), takes_part.any(1).sum().reshape(1)]))
    number, total = scalar(scale, fields[0]), fields[0].new_zeros(())
    for place, turn in enumerate(turns):
        loss = info_nce(
            fields[turn], _without(fields, turn, present), scale=number, group=group, valid=takes_part[:, place],
            duplicates=duplicates, world=world, exchange=exchange, tile=tile,
        )  # fmt: skip
        total = total + counts[place] * loss
    return {"loss": total / counts[:-1].sum().clamp_min(1), "n": counts[-1]}


class Centroid(nn.Module):
    """`centroid` as a component; see there for the equation."""

    fields: ClassVar[tuple[int, int | None]] = (2, None)
    takes_partial: ClassVar[bool] = True
    draws_negatives = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Fields of a ``centroid`` loss.

        Attributes:
            duplicates: tuples of one group are each other's positives, or are masked out of the denominators.
            exchange: "gather" or "ring", see `mmrep.losses.InfoNCE.Config`.
        """

        duplicates: Duplicates = "positive"
        exchange: Exchange = "gather"

        def __post_init__(self) -> None:
            check_exchange(self.exchange)
            check_duplicates(self.duplicates)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def bounds(dim: int, fields: int) -> tuple[float, float]:
        """Those of pairs: a centroid is a unit vector."""
        return 1.0, 100.0

    def forward(
        self,
        embeddings: Sequence[Tensor],
        *,
        scale: Tensor | float,
        group: Tensor | None = None,
        valid: Tensor | None = None,
        anchor: int | None = None,
        world: World | None = None,
    ) -> dict[str, Tensor]:
        """Return ``loss`` and ``n``; arguments as `centroid`."""
        c = self.config
        return centroid(
            embeddings, scale=scale, group=group, valid=valid, anchor=anchor,
            duplicates=c.duplicates, world=world, exchange=c.exchange,
        )  # fmt: skip


def _without(fields: list[Tensor], left_out: int, present: Tensor) -> Tensor:
    """Centroid [n, D] of the other fields that are present, of unit length; 0 where there are none."""
    others = [k for k in range(len(fields)) if k != left_out]
    count = present[:, others].sum(1, keepdim=True).clamp_min(1)
    mean = torch.stack([fields[k] for k in others]).sum(0) / count
    return mean / lengths(mean).clamp_min(_SHORT).unsqueeze(1)
