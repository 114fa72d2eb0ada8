"""SigLIP's pairwise sigmoid loss between two fields, with hard negatives, groups and missing rows; tiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmrep.losses._batch import Exchange, PairBatch, check_exchange, pair_batch, scalar
from mmrep.losses._sigmoid import tiled_sigmoid_sum
from mmrep.losses._tiles import Tile
from mmrep.world import World


def siglip(
    a: Tensor,
    b: Tensor,
    *,
    scale: Tensor | float,
    bias: Tensor | float,
    negatives: Tensor | None = None,
    group: Tensor | None = None,
    valid: Tensor | None = None,
    world: World | None = None,
    exchange: Exchange = "gather",
    tile: Tile | None = None,
) -> Tensor:
    """Classify every pair of the global batch as matching or not (arXiv:2303.15343, equation 1).

    With V the valid pairs of all ranks, and z_ij = +1 where i and j are of one group (i = j included), else -1::

        loss = 1/|V| sum_{i in V} sum_{j in V or hard negatives} softplus(-z_ij * (scale * a_i . b_j + bias))

    Args:
        a: [n, D] this rank's rows; the caller has normalised them. bf16 and fp16 are cast to float32 before any product
            and autocast is off inside; two float64 inputs stay float64.
        b: [n, D], paired with ``a``.
        scale: inverse temperature > 0, one number (not its logarithm); it gets its exact gradient.
        bias: one number, -10 at the start in the paper; it gets its exact gradient.
        negatives: [h, D] more rows that match no ``a``, any number on each rank (0 too, but given on all or none).
        group: [n] integers; pairs of equal number, on any rank, match each other. None: every pair only itself.
        valid: [n] booleans; a false row takes no part. It is never read.
        world: the ranks that share the batch; None is one process.
        exchange: how the keys of the other ranks come here, see `SigLIP.Config`; the result is the same.
        tile: rows and columns held at a time.

    Returns:
        0-D. Its mean over ranks is the loss of one process on the concatenated batch (see `mmrep.world`). Without any
        valid pair it is exactly 0, with zero gradients.

    Raises:
        ValueError: shapes or dtypes do not fit, on this rank or between ranks.
    """
    batch = pair_batch(a, b, scale=scale, negatives=negatives, group=group, valid=valid, world=world, exchange=exchange)
    return _loss(batch, bias=bias, tile=tile)


class SigLIP(nn.Module):
    """`siglip` as a component; see there for the equation."""

    needs_bias = True
    takes_soft = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Fields of a ``siglip`` loss.

        Attributes:
            exchange: "gather": every rank holds the keys of all, memory grows with the global batch. "ring": blocks of
                keys visit one rank after another, memory stays at O(local batch) and a tile. The price: the keys travel
                a second time for the backward pass, with four products where there were three, and all ranks wait for
                each other at every visit.
        """

        exchange: Exchange = "gather"

        def __post_init__(self) -> None:
            check_exchange(self.exchange)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        *,
        scale: Tensor | float,
        bias: Tensor | float | None = None,
        negatives: Tensor | None = None,
        group: Tensor | None = None,
        valid: Tensor | None = None,
        world: World | None = None,
    ) -> dict[str, Tensor]:
        """Return ``loss`` and ``n``, the global number of valid pairs (int64); arguments as `siglip`."""
        if bias is None:
            raise ValueError("SigLIP needs a bias: a learned scalar, -10 at the start in the paper")
        exchange = self.config.exchange
        batch = pair_batch(
            a, b, scale=scale, negatives=negatives, group=group, valid=valid, world=world, exchange=exchange
        )
        loss = _loss(batch, bias=bias)
        return {"loss": loss, "n": torch.tensor(batch.pairs, device=loss.device)}


def _loss(batch: PairBatch, *, bias: Tensor | float, tile: Tile | None = None) -> Tensor:
    groups, key_groups = batch.numbers()
    with torch.autocast(batch.a.device.type, enabled=False):
        number = scalar(bias, batch.a)
        total = tiled_sigmoid_sum(
            batch.a, batch.keys, batch.scale, number, groups, key_groups, ring=batch.ring, tile=tile
        )
        return batch.reduce(total)
