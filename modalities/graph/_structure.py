"""Where a node stands in its graph: random walks, the Laplacian's spectrum, shortest paths.

All of it is dense, [B, N, N], on the device of the inputs, so that views which drop edges there are seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Eigenvalues of the normalised Laplacian, all in 0..2, that differ by less are one eigenvalue.
_SAME = 1e-6
_PADDING = 10.0  # the eigenvalue given to padding, above all others


def adjacency(edges: Tensor, weights: Tensor | None, N: int) -> Tensor:
    """Float32 [B, N, N] of ``edges`` int64 [B, E, 2], -1 is none; from source (row) to target (column).

    Parallel edges add up. ``weights``: float [B, E]; None = 1.
    """
    there = (edges >= 0).all(-1)
    value = there.float() if weights is None else weights.float() * there
    flat = (edges[..., 0] * N + edges[..., 1]).masked_fill(~there, 0)
    return value.new_zeros(len(edges), N * N).scatter_add_(1, flat, value).view(len(edges), N, N)


def random_walk(links: Tensor, steps: int) -> Tensor:
    """Probabilities of being back after 1 to ``steps`` steps: RWSE (arXiv:2110.07875, equation 12).

    Args:
        links: adjacency, [B, N, N]. A node without edges is never back.
        steps: K.

    Returns:
        float32 [B, N, K].
    """
    step = links / links.sum(-1, keepdim=True).clamp_min(1e-12)
    walk, back = step, []
    for number in range(steps):
        walk = walk @ step if number else walk
        back.append(walk.diagonal(dim1=1, dim2=2))
    return torch.stack(back, -1)


def laplacian(links: Tensor, valid: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The eigenvectors of the symmetric normalised Laplacian that belong to its smallest eigenvalues, but the first.

    An eigenvalue that occurs several times has no eigenvectors of its own, only a space of them: there, each "vector"
    holds the length of the node's projection onto the space, which no solver's choice of a basis changes. The sign of
    the others is arbitrary; `SignFree` does not see it.

    Args:
        links: adjacency, [B, N, N]; made symmetric by the greater of both directions.
        valid: bool [B, N].
        k: how many.

    Returns:
        float32 vectors [B, N, k], scaled to a mean square of 1 over the graph's nodes; float32 eigenvalues [B, k] in
        0..2; bool [B, k], whether the graph has so many.
    """
    B, N = valid.shape
    links = torch.maximum(links, links.mT).double()
    degree = links.sum(-1)
    scale = torch.where(degree > 0, degree.clamp_min(1e-12).rsqrt(), 0)
    eye = torch.eye(N, dtype=torch.float64, device=links.device)
    matrix = eye * (degree > 0)[:, None, :] - scale[:, :, None] * links * scale[:, None, :]
    # Padding gets an eigenvalue beyond the others, so that its vectors come last and do not mix with theirs.
    matrix = matrix + eye * (~valid)[:, None, :] * _PADDING
    values, vectors = torch.linalg.eigh(matrix)
    first = torch.arange(N, device=links.device) < 1
    apart = (values.diff(dim=-1, prepend=values[:, :1]) > _SAME) | first
    space = apart.long().cumsum(-1) - 1
    sizes = values.new_zeros(B, N).scatter_add_(1, space, torch.ones_like(values))
    squares = vectors.square()
    projected = torch.zeros_like(vectors).scatter_add_(2, space[:, None, :].expand_as(vectors), squares).sqrt()
    projected = projected.gather(2, space[:, None, :].expand_as(vectors))
    alone = (sizes.gather(1, space) < 2)[:, None, :]
    chosen = torch.where(alone, vectors, projected) * valid.sum(1).clamp_min(1).sqrt()[:, None, None]
    short = max(k + 1 - N, 0)
    chosen = nn.functional.pad(chosen[:, :, 1 : k + 1], (0, short))
    values = nn.functional.pad(values[:, 1 : k + 1], (0, short))
    has = torch.arange(1, k + 1, device=links.device) < valid.sum(1)[:, None]
    return (chosen * has[:, None]).float(), (values * has).float(), has


def shortest_paths(links: Tensor, most: int) -> Tensor:
    """Steps from row to column, int64 [B, N, N]: 0 on the diagonal, ``most + 1`` where it takes more or is no way."""
    B, N = links.shape[:2]
    step = (links > 0).float()
    reached = torch.eye(N, dtype=torch.bool, device=links.device).expand(B, N, N)
    steps = torch.where(reached, 0, most + 1)
    for number in range(1, most + 1):
        grown = reached | (reached.float() @ step > 0)
        steps = torch.where(grown & ~reached, number, steps)
        reached = grown
    return steps


class SignFree(nn.Module):
    """Eigenvectors to node encodings that do not depend on their signs: SignNet (arXiv:2202.13013, equation 5).

    phi(v) + phi(-v), phi a small MLP of a node's entry and the eigenvalue; then a linear map of all k.

    Args:
        k: how many eigenvectors.
        width: D.
        hidden: width of phi.
    """

    def __init__(self, k: int, width: int, hidden: int = 16) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.rho = nn.Linear(k * hidden, width)

    def forward(self, vectors: Tensor, values: Tensor, has: Tensor) -> Tensor:
        """What `laplacian` returned, to [B, N, D]."""
        dtype = self.rho.weight.dtype
        vectors, values = vectors.to(dtype), values.to(dtype)
        both = torch.stack([vectors, -vectors])
        pairs = torch.stack([both, values[None, :, None, :].expand_as(both)], -1)
        mixed = self.phi(pairs).sum(0) * has[:, None, :, None]
        return self.rho(mixed.flatten(2))
