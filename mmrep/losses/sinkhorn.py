"""Assignment of samples to prototypes in equal shares, by Sinkhorn's algorithm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmrep.world import LocalWorld, World


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, *, iterations: int = 3, world: World | None = None) -> Tensor:
    """Soft assignments whose rows sum to 1 and whose columns come to have equal sums (Cuturi 2013, arXiv:1306.0895).

    As in SwAV (arXiv:2006.09882, section 3.1) and DINOv2: ``exp(logits / temperature)``, then so many times columns and
    then rows are brought to their sums. Done in logarithms, where no row can overflow or vanish, whatever its offset.
    One call is for one view: the shares are of what it is given.

    Args:
        logits: [n, K], this rank's rows, of any length; cast to float32 unless float64.
        temperature: > 0.
        iterations: >= 1.
        world: the ranks whose rows are assigned together; all of them call it.

    Returns:
        [n, K], without gradient.
    """
    world = world or LocalWorld()
    x = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    K = x.shape[1]
    rows = world.sum(torch.tensor(len(x), device=x.device)).clamp_min(1).to(x.dtype)
    for _ in range(iterations):
        x = x - world.logsumexp(x.logsumexp(0)) + rows.log() - math.log(K)
        x = x - x.logsumexp(1, keepdim=True)
    return x.exp()
