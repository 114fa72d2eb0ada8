"""Contrast among the samples of a class, weighted by hardness, and hard pairs made by mixing features (Core-tuning)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmrep.world import LocalWorld, World


class HardPairs(NamedTuple):
    """For each row: what is like it and is not, ``positive`` and ``negative`` [n, D], and which classes are in them.

    A row ``share * a + (1 - share) * b`` is of class ``kinds[:, 0]`` by its share and of ``kinds[:, 1]`` by the rest.
    ``found`` bool [n] is false where the batch holds no other class, so that nothing can be mixed.
    """

    positive: Tensor
    positive_share: Tensor
    negative: Tensor
    negative_share: Tensor
    positive_kinds: Tensor
    negative_kinds: Tensor
    found: Tensor


def mix_hard_pairs(
    features: Tensor, labels: Tensor, shares: Tensor, choice: Tensor, *, floor: float = 0.8, world: World | None = None
) -> HardPairs:
    """Hard pairs of Core-tuning (Zhang et al. 2021, arXiv:2102.06605, section 4.2) from the features of a batch.

    The hard positive of a row is ``s x_p + (1 - s) x_q``: p is the row of its class, of all processes, whose cosine to
    it is least (the row itself, where its class has no other), q the row of another class whose cosine is greatest. The
    hard negative is ``t x_r + (1 - t) x``: r is a row of another class, drawn at random, and ``t = max(t', floor)``, so
    that it is nearly of the other class. Which rows are chosen has no gradient; what is mixed has.

    Args:
        features: [n, D], float.
        labels: int64 [n].
        shares: [n, 2], s and t' in [0, 1]; the paper draws them from Beta(alpha, alpha).
        choice: [n] in [0, 1), which of the rows of other classes is r.
        floor: least share of the other row in a hard negative.
        world: the processes that share the batch.
    """
    world = world or LocalWorld()
    everyone, kinds = world.gather(features), world.gather(labels)
    own = world.offset(len(features)) + torch.arange(len(features), device=features.device)
    with torch.no_grad():
        cosine = F.normalize(features, dim=1) @ F.normalize(everyone, dim=1).T
        same = labels[:, None] == kinds
        # A row is as like itself as can be: it is the least like it of its class only where it is alone there.
        farthest = torch.where(same, cosine, torch.inf).argmin(1) if len(kinds) else own
        nearest = torch.where(same, -torch.inf, cosine).argmax(1) if len(kinds) else own
        rank = (~same).cumsum(1)  # the k-th row of another class is the first whose count is k
        wanted = (choice.double() * (~same).sum(1)).long() + 1
        drawn = (rank >= wanted[:, None]).int().argmax(1) if len(kinds) else own
    s, t = shares[:, :1].to(features), shares[:, 1:].to(features).clamp_min(floor)
    return HardPairs(
        positive=s * everyone[farthest] + (1 - s) * everyone[nearest],
        positive_share=s[:, 0],
        negative=t * everyone[drawn] + (1 - t) * features,
        negative_share=t[:, 0],
        positive_kinds=torch.stack([kinds[farthest], kinds[nearest]], 1),
        negative_kinds=torch.stack([kinds[drawn], labels], 1),
        found=(~same).any(1),
    )


def supervised_contrast(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.07,
    focal: bool = True,
    positive: Tensor | None = None,
    negative: Tensor | None = None,
    found: Tensor | None = None,
    world: World | None = None,
) -> Tensor:
    r"""Each row against all others: those of its class are to be the likely ones.

    With A(i) all other rows of all processes and i's own hard pair, P(i) those of A(i) that have its label, and its
    hard positive::

        p_ij = exp(z_i . z_j / temperature) / sum_{k in A(i)} exp(z_i . z_k / temperature)
        loss = mean over i with P(i) not empty of  -1/|P(i)| sum_{j in P(i)} (1 - p_ij) log p_ij

    That is Core-tuning's focal contrast (arXiv:2102.06605, equation 5); without ``focal``, and so without (1 - p_ij),
    it is supervised contrast :math:`L^{sup}_{out}` (Khosla et al. 2020, arXiv:2004.11362, equation 2). The matrix of
    [n, N] similarities is held whole: a batch with labels is small.

    Args:
        z: [n, D] of unit length, in float32 or float64.
        labels: int64 [n].
        temperature: above 0.
        focal: weigh a pair by how unlikely it still is.
        positive: [n, D] of unit length, another row of each row's class, which no other row sees. None = none.
        negative: likewise of no row's class.
        found: bool [n], false where ``positive`` and ``negative`` of the row mean nothing.
        world: the processes that share the batch.

    Returns:
        0-D; its mean over processes is the loss of one process on the whole batch.
    """
    world = world or LocalWorld()
    keys, kinds = world.gather(z), world.gather(labels)
    logits, pairs = z @ keys.T, labels[:, None] == kinds
    own = world.offset(len(z)) + torch.arange(len(z), device=z.device)
    there = torch.ones_like(pairs)
    there[torch.arange(len(own), device=own.device), own] = False
    for rows, like in ((positive, True), (negative, False)):
        if rows is not None:
            here = torch.ones_like(labels, dtype=torch.bool) if found is None else found
            logits = torch.cat([logits, (z * rows).sum(1, keepdim=True)], 1)
            there = torch.cat([there, here[:, None]], 1)
            pairs = torch.cat([pairs, torch.full_like(here[:, None], like)], 1)
    pairs = pairs & there
    logs = (logits / temperature).masked_fill(~there, -torch.inf)
    # A row that is alone in the world has no likely other: its zeros are left out below, and no NaN may come from them.
    logs = logs.masked_fill(~there.any(1, keepdim=True), 0.0).log_softmax(1).masked_fill(~pairs, 0.0)
    weight = 1 - logs.exp() if focal else torch.ones_like(logs)
    each = -(weight * logs * pairs).sum(1) / pairs.sum(1).clamp_min(1)
    anchors = world.sum(pairs.any(1).sum())
    return each.sum() * (world.size / anchors.clamp_min(1))
