"""InfoNCE between two fields, with hard negatives, groups of positives and missing rows; never an N x N matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmrep.losses._batch import Exchange, PairBatch, check_exchange, pair_batch
from mmrep.losses._logsumexp import tiled_logsumexp
from mmrep.losses._ring import group_means
from mmrep.losses._soft import Soften
from mmrep.losses._tiles import Tile, row_dots
from mmrep.world import World

Duplicates = Literal["positive", "mask"]


def info_nce(
    a: Tensor,
    b: Tensor,
    *,
    scale: Tensor | float,
    negatives: Tensor | None = None,
    group: Tensor | None = None,
    valid: Tensor | None = None,
    symmetric: bool = True,
    duplicates: Duplicates = "positive",
    soft: Tensor | None = None,
    soft_weight: float = 0.5,
    soft_temperature: float = 0.05,
    world: World | None = None,
    exchange: Exchange = "gather",
    tile: Tile | None = None,
) -> Tensor:
    r"""Contrast the pairs ``(a[i], b[i])`` against all other rows of the global batch.

    With logits ``s_ij = scale * a_i . b_j``, P(i) the pairs of the same group as i (i itself included), V the valid
    pairs of all ranks, h the hard negatives of all ranks and ``s_ih = scale * a_i . negatives_h``::

        rows    = mean_{i in V} [log(sum_{j in V} exp s_ij + sum_h exp s_ih) - mean_{p in P(i)} s_ip]
        columns = mean_{j in V} [log(sum_{i in V} exp s_ij) - mean_{p in P(j)} s_pj]
        loss    = (rows + columns) / 2, or rows alone if not symmetric

    Without groups this is CLIP's loss (arXiv:2103.00020, figure 3; InfoNCE, arXiv:1807.03748, equation 4). With groups
    it is :math:`L^{sup}_{out}` of supervised contrast (arXiv:2004.11362, equation 2) between two fields: the mean over
    positives is outside the logarithm, and all positives are in the denominator.

    With ``soft`` features f the target of a row is softened by the similarity of the pairs in their (frozen) space, as
    in SoftCLIP (arXiv:2303.17561, equation 6): the mean positive logit above is replaced by
    ``(1 - soft_weight) * mean_{p in P(i)} s_ip + soft_weight * sum_{j in V} q_ij s_ij`` with
    ``q_ij = softmax_j(cos(f_i - mean f, f_j - mean f) / soft_temperature)``, and likewise for columns.

    Args:
        a: [n, D] this rank's rows; the caller has normalised them. bf16 and fp16 are cast to float32 before any product
            and autocast is off inside; two float64 inputs stay float64.
        b: [n, D], paired with ``a``.
        scale: inverse temperature > 0, one number (not its logarithm); it gets its exact gradient.
        negatives: [h, D] more keys for the ``a`` to ``b`` direction only, any number on each rank (0 too, but given on
            all ranks or none). They have no group: the caller answers for their being negatives.
        group: [n] integers; pairs of equal number, on any rank, are positives of each other. None: all differ.
        valid: [n] booleans; a false row is no anchor, no positive and no negative. It is never read.
        symmetric: add the ``b`` to ``a`` direction.
        duplicates: what the other pairs of a group are: "positive" as above, or "mask": left out of the denominators,
            so that P(i) = {i} and a pair's duplicates neither attract nor repel.
        soft: [n, F] features of the pairs in a frozen space; never with ``duplicates="mask"``. No gradient reaches it.
        soft_weight: share of the soft target, 0 to 1.
        soft_temperature: of the softmax over similarities; the smaller, the closer to the pair itself.
        world: the ranks that share the batch; None is one process.
        exchange: how the keys of the other ranks come here, see `InfoNCE.Config`; the result is the same.
        tile: rows and columns held at a time.

    Returns:
        0-D. Its mean over ranks is the loss of one process on the concatenated batch (see `mmrep.world`). Without any
        valid pair it is exactly 0, with zero gradients.

    Raises:
        ValueError: shapes or dtypes do not fit, on this rank or between ranks.
    """
    check_duplicates(duplicates)
    batch = pair_batch(a, b, scale=scale, negatives=negatives, group=group, valid=valid, world=world, exchange=exchange)
    softening = _soften(batch, soft, valid, soft_weight, soft_temperature, duplicates, tile)
    return _loss(batch, symmetric=symmetric, duplicates=duplicates, softening=softening, tile=tile)


class InfoNCE(nn.Module):
    """`info_nce` as a component; see there for the equation."""

    needs_bias = False
    takes_soft = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Fields of an ``info-nce`` loss.

        Attributes:
            symmetric: contrast in both directions.
            duplicates: pairs of one group are each other's positives, or are masked out of the denominators.
            soft_weight: share of the soft target, where the objective gives soft features.
            soft_temperature: of the similarities in the space of the soft features.
            exchange: "gather": every rank holds the keys of all, memory grows with the global batch. "ring": blocks of
                keys visit one rank after another, memory stays at O(local batch) and a tile. The price: the keys travel
                a second time for the backward pass, and all ranks wait for each other at every visit.
        """

        symmetric: bool = True
        duplicates: Duplicates = "positive"
        soft_weight: float = 0.5
        soft_temperature: float = 0.05
        exchange: Exchange = "gather"

        def __post_init__(self) -> None:
            check_exchange(self.exchange)
            check_duplicates(self.duplicates)
            _check_soft(self.soft_weight, self.soft_temperature)

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
        soft: Tensor | None = None,
        world: World | None = None,
    ) -> dict[str, Tensor]:
        """Return ``loss`` and ``n``, the global number of valid pairs (int64); arguments as `info_nce`.

        ``bias`` is there so that losses can be exchanged, and refused if given: a constant cannot change a softmax.
        """
        if bias is not None:
            raise ValueError("InfoNCE takes no bias: its gradient would be zero. Use SigLIP, or leave the bias out")
        c = self.config
        batch = pair_batch(
            a, b, scale=scale, negatives=negatives, group=group, valid=valid, world=world, exchange=c.exchange
        )
        softening = _soften(batch, soft, valid, c.soft_weight, c.soft_temperature, c.duplicates)
        loss = _loss(batch, symmetric=c.symmetric, duplicates=c.duplicates, softening=softening)
        return {"loss": loss, "n": torch.tensor(batch.pairs, device=loss.device)}


def check_duplicates(duplicates: str) -> None:
    """Refuse what is no `Duplicates`."""
    if duplicates not in ("positive", "mask"):
        raise ValueError(f"duplicates is 'positive' or 'mask', got {duplicates!r}")


def _check_soft(weight: float, temperature: float) -> None:
    if not 0 <= weight <= 1 or temperature <= 0:
        raise ValueError(f"soft_weight is from 0 to 1 and soft_temperature above 0, got {weight} and {temperature}")


Softening = tuple[Soften, float]


def _soften(
    batch: PairBatch,
    soft: Tensor | None,
    valid: Tensor | None,
    weight: float,
    temperature: float,
    duplicates: Duplicates,
    tile: Tile | None = None,
) -> Softening | None:
    if soft is None:
        return None
    _check_soft(weight, temperature)
    if duplicates == "mask":
        raise ValueError("soft targets give weight to other pairs of a group, duplicates='mask' takes it: choose one")
    rows = len(batch.a) if valid is None else len(valid)
    if soft.ndim != 2 or len(soft) != rows:
        raise ValueError(f"soft must be [{rows}, F], one row per pair, got {tuple(soft.shape)}")
    features = soft if valid is None else soft[valid]
    soften = Soften(features, temperature, batch.world, batch.a.dtype, gathered=batch.ring is None, tile=tile)
    return soften, weight


def _loss(
    batch: PairBatch,
    *,
    symmetric: bool,
    duplicates: Duplicates,
    softening: Softening | None = None,
    tile: Tile | None = None,
) -> Tensor:
    with torch.autocast(batch.a.device.type, enabled=False):
        masked = batch.groups is not None and duplicates == "mask"
        positives = _positive_logits(batch, own_only=masked or batch.groups is None)
        rows, columns = tiled_logsumexp(
            batch.a,
            batch.keys,
            batch.scale,
            query_groups=batch.groups if masked else None,
            key_groups=batch.key_groups if masked else None,
            ring=batch.ring,
            tile=tile,
        )
        if masked:
            rows = torch.logaddexp(rows, positives)  # the pair itself is of its own group, so it was left out too
        row_positives = column_positives = positives
        if softening is not None:
            soft, weight = softening
            everyone = batch.b if batch.ring is not None else batch.keys[: batch.pairs]
            row_positives = torch.lerp(positives, soft.logits(batch.a, everyone, batch.scale), weight)
        if not symmetric:
            return batch.reduce((rows - row_positives).sum())
        if softening is not None:
            soft, weight = softening
            column_positives = torch.lerp(positives, soft.logits(batch.b, batch.shared(batch.a), batch.scale), weight)
        columns = batch.own_columns(columns)
        if masked:
            columns = torch.logaddexp(columns, positives)
        return batch.reduce(((rows - row_positives) + (columns - column_positives)).sum() / 2)


def _positive_logits(batch: PairBatch, *, own_only: bool) -> Tensor:
    """Mean over P(i) of s_ip, [n].

    The rows of a group pair with the columns of the same group, so that the column direction, mean over P(j) of s_pj,
    has the same sum over the batch, and needs no gathered ``a``.
    """
    positives = batch.b
    if not own_only and batch.ring is not None:
        assert batch.groups is not None
        positives = group_means(batch.b, batch.groups, batch.world)
    elif not own_only:
        assert batch.key_groups is not None
        groups, all_b = batch.key_groups[: batch.pairs], batch.keys[: batch.pairs]
        sums = torch.zeros_like(all_b).index_add(0, groups, all_b)
        counts = torch.bincount(groups, minlength=batch.pairs).clamp_min(1)
        positives = (sums / counts.unsqueeze(1))[batch.groups]
    return batch.scale * row_dots(batch.a, positives)
