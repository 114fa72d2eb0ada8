"""Fusions: from the embeddings of whatever is present of a sample to one embedding in the same space.

A fusion is built as ``cls(config, dim, members)``. It serves two ends: one embedding of a whole sample, and the
prediction of a missing field's embedding from the others (a fusion that leaves that field out, trained towards it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.blocks import Transformer
from mmrep.config import config


class Fusion(nn.Module):
    """Embeddings of M members to one.

    Args:
        config: of the fusion.
        dim: of the common space.
        members: their names, in the order in which `forward` gets them.
    """

    def __init__(self, config: object, dim: int, members: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.dim = dim
        self.members = tuple(members)

    def forward(self, embeddings: Tensor, present: Tensor) -> Tensor:
        """Fuse.

        Args:
            embeddings: float [B, M, dim]; what stands in absent places is never read.
            present: bool [B, M].

        Returns:
            float [B, dim], not normalised. A sample with nothing present gives zeros.
        """
        raise NotImplementedError


class MeanFusion(Fusion):
    """The mean of what is present. It has no weights, so it works untrained."""

    @config
    class Config:
        """No settings."""

    def forward(self, embeddings: Tensor, present: Tensor) -> Tensor:
        """See `Fusion.forward`."""
        return _weighted(embeddings, present, present.to(embeddings.dtype))


class GatedFusion(Fusion):
    """A weighted mean; each member's weight is a softmax over what is present of a learned score of its embedding.

    ``w_m = softmax_m(u . tanh(V e_m) + b_m)`` over the present m: the gate of attention-based pooling (Ilse et al.,
    arXiv:1802.04712, equation 8), with a bias for each member, over fields instead of instances. It starts as the mean.
    """

    @config
    class Config:
        """hidden: width of the gate."""

        hidden: Annotated[int, Field(ge=1)] = 64

    def __init__(self, config: Config, dim: int, members: Sequence[str]) -> None:
        super().__init__(config, dim, members)
        self.hidden = nn.Linear(dim, config.hidden, bias=False)
        self.score = nn.Linear(config.hidden, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(len(self.members)))
        nn.init.zeros_(self.score.weight)

    def forward(self, embeddings: Tensor, present: Tensor) -> Tensor:
        """See `Fusion.forward`."""
        clean = _clean(embeddings, present)
        scores = self.score(torch.tanh(self.hidden(clean)))[..., 0] + self.bias
        # A row without anything present is given equal scores, so that its softmax is finite; its weights are then 0.
        scores = scores.masked_fill(~present & present.any(1, keepdim=True), -torch.inf)
        return _weighted(embeddings, present, scores.softmax(1) * present)


class TransformerFusion(Fusion):
    """A small transformer over the present embeddings and a learned query, added to their mean.

    Members are told apart by a learned vector each (as modality embeddings in FLAVA's multimodal encoder,
    arXiv:2112.04482); the output of the query passes a linear map that starts at zero, so that it starts as the mean.
    """

    @config
    class Config:
        """depth: blocks. heads: attention heads; must divide ``dim``. dropout: probability inside the blocks."""

        depth: Annotated[int, Field(ge=1)] = 2
        heads: Annotated[int, Field(ge=1)] = 4
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __init__(self, config: Config, dim: int, members: Sequence[str]) -> None:
        super().__init__(config, dim, members)
        if dim % config.heads:
            raise ValueError(f"by: heads={config.heads} does not divide the model's dim {dim}")
        self.query = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.kinds = nn.Parameter(torch.randn(1, len(self.members), dim) * 0.02)
        self.blocks = Transformer(dim, config.depth, config.heads, dropout=config.dropout)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, embeddings: Tensor, present: Tensor) -> Tensor:
        """See `Fusion.forward`."""
        # Embeddings are unit vectors: scaled up to entries of size 1, which is what the blocks are initialised for.
        tokens = _clean(embeddings, present) * self.dim**0.5 + self.kinds
        tokens = torch.cat([self.query.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        valid = torch.cat([present.new_ones(len(present), 1), present], dim=1)
        values, _ = self.blocks(tokens, valid)
        change = self.out(self.norm(values[:, 0])) * present.any(1, keepdim=True)
        return _weighted(embeddings, present, present.to(embeddings.dtype)) + change


def _clean(embeddings: Tensor, present: Tensor) -> Tensor:
    return embeddings.masked_fill(~present[..., None], 0)


def _weighted(embeddings: Tensor, present: Tensor, weight: Tensor) -> Tensor:
    """The mean over members by ``weight`` [B, M], zeros where nothing is present."""
    total = weight.sum(1, keepdim=True)
    share = weight / torch.where(total > 0, total, 1)
    return (_clean(embeddings, present) * share[..., None]).sum(1)
