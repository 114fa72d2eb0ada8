"""Label-free measures of a space: is it collapsed, do its modalities meet, is it evenly used."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrep.evaluate._arrays import ArrayLike, as_matrix, as_pair, products, spans, working_dtype


@torch.no_grad()
def effective_rank(embeddings: ArrayLike, *, center: bool = True, eps: float = 1e-7) -> float:
    """exp(entropy) of the singular values: the number of directions in use (RankMe, arXiv:2210.02885).

    With sigma the singular values of the [N, D] matrix, p = sigma / sum(sigma) + eps and the result is
    exp(-sum p log p), between 1 and min(N, D) up to terms of the order of eps.

    RankMe takes the raw matrix (`center=False`). A constant vector added to every row then looks like a collapse:
    features of rank 16 can measure 16, and 3.4 after adding 50. Therefore the mean is removed by default. `eps` is the
    paper's 1e-7; it matters: each null direction adds eps·log(1/eps) to the entropy, so that with 1e-5 rank 16 in
    512 dimensions reads as 17.

    Returns:
        0.0 when centred rows differ by less than the rounding of their dtype (complete collapse: what is left is noise,
        whose rank would look healthy), else the effective rank. Computed in fp64.
    """
    raw = as_matrix(embeddings, "embeddings")
    _need(raw, 2 if center else 1)
    x = raw.double()
    centred = x - x.mean(dim=0) if center else x
    if centred.norm() <= torch.finfo(raw.dtype).eps * x.norm():
        return 0.0
    sigma = torch.linalg.svdvals(centred)
    p = sigma / sigma.sum() + eps
    return math.exp(-(p * p.log()).sum().item())


@torch.no_grad()
def modality_gap(left: ArrayLike, right: ArrayLike) -> float:
    """Distance of the centroids of two sets of unit vectors (arXiv:2203.02053), in [0, 2].

    Args:
        left: [N, D], normalised here.
        right: [M, D], normalised here; the rows need not be pairs.
    """
    a, b = as_pair(left, right, ("left", "right"))
    _need(a, 1)
    _need(b, 1)
    return (_unit(a).double().mean(dim=0) - _unit(b).double().mean(dim=0)).norm().item()


@torch.no_grad()
def alignment(left: ArrayLike, right: ArrayLike, *, alpha: float = 2.0) -> float:
    """Mean of |x - y|^alpha over positive pairs of unit vectors (arXiv:2005.10242): 0 is perfect.

    Args:
        left: [N, D], normalised here.
        right: [N, D], normalised here; row i is the positive of row i of `left`.
        alpha: above 0.
    """
    a, b = as_pair(left, right, ("left", "right"))
    if len(a) != len(b):
        raise ValueError(f"alignment is over pairs, got {len(a)} and {len(b)} rows")
    _need(a, 1)
    return (_unit(a) - _unit(b)).double().norm(dim=1).pow(alpha).mean().item()


@torch.no_grad()
def uniformity(embeddings: ArrayLike, *, t: float = 2.0, tile: int = 2048) -> float:
    """Log of the mean of exp(-t |x - y|^2) over distinct rows of unit norm (arXiv:2005.10242).

    0 is complete collapse, lower is more even; the limit on a high-dimensional sphere is -2t.

    Args:
        embeddings: [N, D], N at least 2, normalised here.
        t: above 0.
        tile: rows at once; the N x N matrix is never built.
    """
    x = as_matrix(embeddings, "embeddings")
    _need(x, 2)
    x = _unit(x)
    total = torch.tensor(-torch.inf, dtype=torch.float64, device=x.device)
    for rows in spans(len(x), tile):
        for columns in spans(len(x), tile):
            squared = (2 - 2 * products(x[rows], x[columns])).clamp_min(0)
            if rows == columns:
                squared.fill_diagonal_(torch.inf)  # a row is no pair with itself
            total = torch.logaddexp(total, torch.logsumexp(-t * squared.flatten().double(), dim=0))
    return total.item() - math.log(len(x) * (len(x) - 1))


@torch.no_grad()
def dimension_spread(embeddings: ArrayLike) -> dict[str, float]:
    """Standard deviation of each coordinate of unit vectors, times sqrt(D) (collapse gauge of arXiv:2011.10566).

    An even spread over the sphere gives 1 in every coordinate, a collapse 0.

    Args:
        embeddings: [N, D], N at least 2, normalised here.

    Returns:
        `mean`, `min`, `max` over the coordinates, and `dead`: the share of coordinates below 0.01.
    """
    x = as_matrix(embeddings, "embeddings")
    _need(x, 2)
    spread = _unit(x).double().std(dim=0, correction=0) * math.sqrt(x.shape[1])
    return {
        "mean": spread.mean().item(),
        "min": spread.min().item(),
        "max": spread.max().item(),
        "dead": (spread < 0.01).double().mean().item(),
    }


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(working_dtype(x)), dim=1)


def _need(x: Tensor, rows: int) -> None:
    if len(x) < rows or not x.shape[1]:
        raise ValueError(f"this measure needs {rows} rows or more, got shape {tuple(x.shape)}")
