"""Contrast of one vector of a sample with several of another kind, of which none is a negative of its own sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmrep.world import LocalWorld, World


def layerwise(
    queries: Tensor, keys: Tensor, *, temperature: float, chosen: Tensor | None = None, world: World | None = None
) -> Tensor:
    """The modified NT-Xent of self-guided contrastive learning (Kim et al. 2021, arXiv:2106.07345, section 3.2, Opt3).

    ``-log(e(i, ik) / (e(i, ik) + sum_{m != i, l} e(i, ml)))``, a mean over samples i and their keys k, with ``e(i, ml)
    = exp(cos(q_i, h_ml) / temperature)``: every key of another sample is a negative, the other keys of the own are not.

    Args:
        queries: [n, D] of this process, n >= 0.
        keys: [n, K, D] of the same samples: one a layer.
        temperature: above 0.
        chosen: bool [n, K]; which keys count, as positives and as negatives; at least one of a sample. None = all.
        world: the processes.

    Returns:
        0-D, float32 (or float64 where the queries are); its mean over processes is the loss of the whole batch. 0 with
        a zero gradient if there are no samples.

    Raises:
        ValueError: keys that do not belong to the queries.
    """
    world = world or LocalWorld()
    if queries.ndim != 2 or keys.ndim != 3 or keys.shape[::2] != queries.shape:
        raise ValueError(f"queries are [n, D] and keys [n, K, D], got {tuple(queries.shape)} and {tuple(keys.shape)}")
    n, K = keys.shape[:2]
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    chosen = torch.ones(n, K, dtype=torch.bool, device=keys.device) if chosen is None else chosen
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = F.normalize(queries.to(dtype), dim=-1), F.normalize(keys.to(dtype), dim=-1)
        everyone, counted, first = world.gather(keys), world.gather(chosen.long()).bool(), world.offset(n)
        logits = torch.einsum("nd,mkd->nmk", queries, everyone) / temperature
        logits = logits.masked_fill(~counted, -torch.inf)
        own = torch.arange(n, device=keys.device)
        positives = (queries[:, None] * keys).sum(2) / temperature
        others = logits.index_put((own, own + first), logits.new_tensor(-torch.inf)).flatten(1)
        # Of a single sample there is no other: log 0, and a loss of 0.
        negatives = others.logsumexp(1, keepdim=True) if len(everyone) > 1 else torch.full_like(positives, -torch.inf)
        each = (torch.logaddexp(positives, negatives) - positives).masked_fill(~chosen, 0).sum(1)
        total = (each / chosen.sum(1).clamp_min(1)).sum() + everyone.sum() * 0
    count = world.sum(torch.tensor(n, device=keys.device)).clamp_min(1)
    return total * (world.size / count)
