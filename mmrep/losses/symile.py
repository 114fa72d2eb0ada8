"""Symile: contrast by the multilinear inner product of a tuple, against shuffled or all other tuples; by tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmrep.losses._logsumexp import tiled_logsumexp
from mmrep.losses._tiles import Tile, blocks, recomputed
from mmrep.losses._tuples import TupleBatch, anchors, check_fields, tuple_batch
from mmrep.world import World

Negatives = Literal["shuffled", "all"]

_PRODUCTS = 2**20
"""Numbers in the products of anchors with one field that are held at a time, where all combinations are negatives."""


def symile(
    embeddings: Sequence[Tensor],
    *,
    scale: Tensor | float,
    group: Tensor | None = None,
    valid: Tensor | None = None,
    anchor: int | None = None,
    negatives: Negatives = "shuffled",
    seed: Tensor | int = 0,
    world: World | None = None,
    tile: Tile | None = None,
) -> dict[str, Tensor]:
    r"""Contrast of tuples by ``<x_1, …, x_M> = sum_d x_1[d] … x_M[d]`` (arXiv:2411.01053).

    Each field in turn is the anchor, and the loss the mean over them. With C the complete tuples of all ranks, s_i the
    product of tuple i, and T the negatives, each a choice of one row j_k of every other field k::

        mean_{i in C} [log(exp(scale * s_i) + sum_{t in T} exp(scale * <a_i, x_t>)) - scale * s_i]

    ``shuffled`` (their O(N)): T has N members: the tuples stand on a random circle, and a member takes its row of each
    next field from the next tuple. So each row is in T once, and for M > 2 no member of T is a tuple of the batch. The
    circle is of the global batch, drawn from ``seed``, the same on all ranks. (Their code draws a permutation for each
    field and has N - 1 members for an anchor, among which may be its own tuple again.)
    ``all`` (their O(N^2)): every combination, for at most three fields.

    A member of T whose rows are all of the anchor's group is no negative of that anchor; where one row is of another
    group, the combination is wrong, and remains. With M = 2 this is the first direction of InfoNCE for each anchor.

    Cost for each anchor field: n x N x D multiply-adds for ``shuffled`` and n x N^2 x D for ``all``, three times that
    backward; memory O(N M D) and a tile.

    The product of vectors with equal entries, perfectly aligned, is ``D^(-(M - 2) / 2)``: the scale must be larger by
    the inverse than for pairs, see `Symile.bounds`.

    Args, returns and raises: see `mmrep.losses._tuples.TupleLoss`; the part ``product`` is the mean of s_i.
    negatives: which. seed: of the order. tile: rows and columns held at a time.
    """
    _check_negatives(negatives)
    check_fields("Symile", Symile.fields, len(embeddings))
    if negatives == "all" and len(embeddings) > 3:
        raise ValueError(f"all combinations of {len(embeddings)} fields are too many; use negatives='shuffled'")
    turns = anchors(anchor, len(embeddings))
    batch = tuple_batch(embeddings, scale=scale, group=group, valid=valid, world=world)
    everyone = [batch.world.gather(x) for x in batch.fields]
    products = _product(batch.fields).sum(1)
    total = products.new_zeros(())
    start = torch.as_tensor(seed, device=products.device)
    for turn in turns:
        positives = batch.scale * products
        rest = [x for k, x in enumerate(everyone) if k != turn]
        if negatives == "all" and len(rest) == 2:
            rows = _combinations(batch, batch.fields[turn], rest[0], rest[1], tile)
        else:
            rows = _shuffled(batch, batch.fields[turn], rest, start + turn, tile)
        total = total + (torch.logaddexp(rows, positives) - positives).sum() / len(turns)
    return batch.result(total, product=products)


class Symile(nn.Module):
    """`symile` as a component; see there for the equation. In training mode, every call has another order."""

    fields: tuple[int, int | None] = (2, None)
    takes_partial: ClassVar[bool] = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Fields of a ``symile`` loss.

        Attributes:
            negatives: "shuffled": N of them. "all": the N^2 combinations, of at most three fields.
            seed: of the orders that shuffle.
        """

        negatives: Negatives = "shuffled"
        seed: int = 0

        def __post_init__(self) -> None:
            _check_negatives(self.negatives)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        if config.negatives == "all":
            self.fields = (2, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))  # so that a resumed run goes on alike

    @property
    def draws_negatives(self) -> bool:
        """Whether the order of the tuples matters."""
        return self.config.negatives == "shuffled"

    @staticmethod
    def bounds(dim: int, fields: int) -> tuple[float, float]:
        """Those of pairs, times ``D^((M - 2) / 2)``."""
        factor = dim ** ((fields - 2) / 2)
        return factor, 100 * factor

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
        """Return ``loss``, ``n`` and ``product``; arguments as `symile`."""
        calls = self.get_buffer("calls").to(embeddings[0].device)
        seed = self.config.seed * 1_000_003 + calls * len(embeddings)
        if self.training:
            self.get_buffer("calls").add_(1)
        negatives = self.config.negatives
        return symile(
            embeddings,
            scale=scale,
            group=group,
            valid=valid,
            anchor=anchor,
            negatives=negatives,
            seed=seed,
            world=world,
        )


def _check_negatives(negatives: str) -> None:
    if negatives not in ("shuffled", "all"):
        raise ValueError(f"negatives is 'shuffled' or 'all', got {negatives!r}")


def _product(fields: Sequence[Tensor]) -> Tensor:
    """Elementwise, [n, D]."""
    product = fields[0]
    for x in fields[1:]:
        product = product * x
    return product


def shuffles(tuples: int, fields: int, seed: Tensor) -> list[Tensor]:
    """For each of the fields an order [N] of the tuples; at no place do two of them agree, where N allows it.

    The tuples stand on a random circle, each field's order begins one further along it.
    """
    places = torch.arange(tuples, device=seed.device)
    circle = _mix(seed * 2**32 + places).argsort()
    return [circle.roll(-field) for field in range(fields)]


def _mix(z: Tensor) -> Tensor:
    """Different int64 numbers to different ones without order: splitmix64 (Steele, Lea and Flood, OOPSLA 2014).

    On the device, so that no step waits for it, and the same on all of them.
    """
    z = z * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
    z = (z ^ _shift(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit integers (torch's shift carries the sign down)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _shuffled(batch: TupleBatch, anchor: Tensor, rest: list[Tensor], seed: Tensor, tile: Tile | None) -> Tensor:
    """Log-sum-exp [n] over the shuffled negatives."""
    orders = shuffles(batch.tuples, len(rest), seed)
    keys = _product([x[order] for x, order in zip(rest, orders, strict=True)])
    groups = torch.stack([batch.all_groups[order] for order in orders])
    groups = torch.where((groups == groups[0]).all(0), groups[0], -1)
    rows, _ = tiled_logsumexp(anchor, keys, batch.scale, query_groups=batch.groups, key_groups=groups, tile=tile)
    return rows


def _combinations(batch: TupleBatch, anchor: Tensor, first: Tensor, second: Tensor, tile: Tile | None) -> Tensor:
    """Log-sum-exp [n] over all rows of the two other fields; those of some rows of the first at a time."""

    def rows(anchor: Tensor, some: Tensor, second: Tensor, scale: Tensor, groups: Tensor) -> Tensor:
        queries = (anchor.unsqueeze(1) * some).flatten(0, 1)
        own = batch.groups.unsqueeze(1)
        query_groups = torch.where(own == groups, own, -1).flatten()
        found, _ = tiled_logsumexp(
            queries, second, scale, query_groups=query_groups, key_groups=batch.all_groups, tile=tile
        )
        # A number, not -inf, where all are of one group: the gradient of a sum of nothing would be NaN.
        return found.masked_fill(found == -torch.inf, nothing).view(len(anchor), len(some)).logsumexp(1)

    nothing = torch.finfo(anchor.dtype).min / 4
    total = anchor.new_full((len(anchor),), nothing)
    for chunk in blocks(len(first), max(1, _PRODUCTS // max(anchor.numel(), 1))):
        part = recomputed(rows, anchor, first[chunk], second, batch.scale, batch.all_groups[chunk])
        total = torch.logaddexp(total, part)
    return total
