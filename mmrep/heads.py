"""Heads: pooling an encoding to one vector, and projecting it into the common space.

A pool is built as ``cls(config, width)``, a projector as ``cls(config, width, dim)``.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.tokens import Encoding


class Pool(nn.Module):
    """An encoding to one vector [B, width]."""

    def __init__(self, config: object, width: int) -> None:
        super().__init__()
        self.width = width


class MeanPool(Pool):
    """The mean of the valid tokens; padding never counts."""

    @config
    class Config:
        """special: whether class, register and separator tokens are averaged in (sentence-transformers does)."""

        special: bool = True

    def __init__(self, config: Config, width: int) -> None:
        super().__init__(config, width)
        self.special = config.special

    def forward(self, encoding: Encoding) -> Tensor:
        """Encoding with tokens [B, N, width] to [B, width]. A sample without any valid token gives zeros."""
        grid = encoding.tokens.grid
        counted = grid.valid if self.special else grid.valid & ~grid.special
        weight = counted.to(encoding.tokens.values.dtype)[..., None]
        return (encoding.tokens.values * weight).sum(1) / weight.sum(1).clamp_min(1)


class ClsPool(Pool):
    """The first token, which must be a special (class) token."""

    @config
    class Config:
        """No settings."""

    def forward(self, encoding: Encoding) -> Tensor:
        """Encoding with tokens [B, N, width] to [B, width].

        Raises:
            ValueError: the encoder puts no class token first.
        """
        tokens = encoding.tokens
        if not bool(tokens.grid.special[:, :1].all()):
            raise ValueError("pool 'cls' needs a class token in front, and this encoder has none; use pool 'mean'")
        return tokens.values[:, 0]


class LastPool(Pool):
    """The last valid token of each sample, for decoder-only text models."""

    @config
    class Config:
        """No settings."""

    def forward(self, encoding: Encoding) -> Tensor:
        """Encoding with tokens [B, N, width] to [B, width]."""
        return _take(encoding.tokens.values, _last(encoding.tokens.grid.valid))


class MaxPool(Pool):
    """The largest value of each dimension over the valid tokens."""

    @config
    class Config:
        """No settings."""

    def forward(self, encoding: Encoding) -> Tensor:
        """Encoding with tokens [B, N, width] to [B, width]. A sample without any valid token gives zeros."""
        valid = encoding.tokens.grid.valid
        values = encoding.tokens.values.masked_fill(~valid[..., None], -torch.inf).amax(1)
        return torch.where(valid.any(1, keepdim=True), values, 0)


class WeightedMeanPool(Pool):
    """The mean with weights that grow with the place, 1, 2, 3, …: SGPT (arXiv:2202.08904, equation 2)."""

    @config
    class Config:
        """No settings."""

    def forward(self, encoding: Encoding) -> Tensor:
        """Encoding with tokens [B, N, width] to [B, width]. A sample without any valid token gives zeros."""
        values, valid = encoding.tokens.values, encoding.tokens.grid.valid
        weight = (torch.arange(1, valid.shape[1] + 1, device=valid.device) * valid).to(values.dtype)[..., None]
        return (values * weight).sum(1) / weight.sum(1).clamp_min(1)


class EosPool(Pool):
    """The last valid *special* token: the end-of-sequence token of a CLIP-like text encoder.

    It never falls back to position 0 where a sample has no such token, as a search by token id does; it takes the
    last valid token instead.
    """

    @config
    class Config:
        """No settings."""

    def forward(self, encoding: Encoding) -> Tensor:
        """Encoding with tokens [B, N, width] to [B, width]."""
        grid = encoding.tokens.grid
        marked = grid.valid & grid.special
        index = torch.where(marked.any(1), _last(marked), _last(grid.valid))
        return _take(encoding.tokens.values, index)


class NativePool(Pool):
    """The pooled vector that the encoder's own architecture makes."""

    @config
    class Config:
        """No settings."""

    def forward(self, encoding: Encoding) -> Tensor:
        """Encoding to its own ``pooled`` [B, width].

        Raises:
            ValueError: the encoder has no pooled output.
        """
        if encoding.pooled is None:
            raise ValueError("pool 'native': this encoder has no pooled output of its own; use pool 'mean' or 'cls'")
        return encoding.pooled


class AttentionPool(Pool):
    """One learned query attends to the valid tokens (as in SigLIP's MAP head, arXiv:2303.15343)."""

    @config
    class Config:
        """heads: attention heads; must divide the width."""

        heads: Annotated[int, Field(ge=1)] = 4

    def __init__(self, config: Config, width: int) -> None:
        super().__init__(config, width)
        if width % config.heads:
            raise ValueError(f"pool 'attention': heads={config.heads} does not divide the encoder's width {width}")
        self.query = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True)

    def forward(self, encoding: Encoding) -> Tensor:
        """Encoding with tokens [B, N, width] to [B, width]."""
        tokens = encoding.tokens
        query = self.query.expand(len(tokens.values), -1, -1).to(tokens.values.dtype)
        out, _ = self.attention(
            query, tokens.values, tokens.values, key_padding_mask=~tokens.grid.valid, need_weights=False
        )
        return out[:, 0]


class Projector(nn.Module):
    """A pooled vector [B, width] to the common space [B, dim]."""


class Identity(Projector):
    """No projection: the encoder's width must be the dimension of the space."""

    @config
    class Config:
        """No settings."""

    def __init__(self, config: Config, width: int, dim: int) -> None:
        super().__init__()
        if width != dim:
            raise ValueError(f"projector 'identity' needs the encoder's width ({width}) to equal model.dim ({dim})")

    def forward(self, features: Tensor) -> Tensor:
        """[B, width] unchanged."""
        return features


class Linear(Projector):
    """One linear map, without bias unless asked for (CLIP, arXiv:2103.00020)."""

    @config
    class Config:
        """bias: add a bias. standardize: see `standardizer`."""

        bias: bool = False
        standardize: bool = False

    def __init__(self, config: Config, width: int, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, dim, bias=config.bias)
        nn.init.normal_(self.map.weight, std=width**-0.5)
        self.standardize = standardizer(config.standardize, dim)

    def forward(self, features: Tensor) -> Tensor:
        """[B, width] to [B, dim]."""
        return self.standardize(self.map(features))


class Dense(Projector):
    """One linear map and an activation: the dense layer of sentence-transformers."""

    @config
    class Config:
        """bias: add a bias. activation: what comes after."""

        bias: bool = True
        activation: Literal["none", "tanh", "gelu", "relu"] = "tanh"

    def __init__(self, config: Config, width: int, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, dim, bias=config.bias)
        activations = {"none": nn.Identity, "tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU}
        self.activation = activations[config.activation]()

    def forward(self, features: Tensor) -> Tensor:
        """[B, width] to [B, dim]."""
        return self.activation(self.map(features))


class MLP(Projector):
    """Linear, norm, GELU, dropout, linear; with a linear shortcut when asked for."""

    @config
    class Config:
        """hidden: width between, 0 = twice ``dim``. dropout: probability. shortcut: add a linear map around.

        standardize: see `standardizer`.
        """

        hidden: Annotated[int, Field(ge=0)] = 0
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        shortcut: bool = False
        standardize: bool = False

    def __init__(self, config: Config, width: int, dim: int) -> None:
        super().__init__()
        hidden = config.hidden or 2 * dim
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, dim),
        )
        self.shortcut = nn.Linear(width, dim, bias=False) if config.shortcut else None
        self.standardize = standardizer(config.standardize, dim)

    def forward(self, features: Tensor) -> Tensor:
        """[B, width] to [B, dim]."""
        out = self.layers(features)
        return self.standardize(out if self.shortcut is None else out + self.shortcut(features))


def standardizer(wanted: bool, dim: int) -> nn.Module:
    """Batch normalisation of embeddings without gain and bias, or nothing.

    Every dimension then has mean 0 and variance 1 over the samples, so that after normalisation to unit length the
    embeddings lie around the origin rather than in a cone, and few of them are everybody's neighbour. In training it
    takes the statistics of the process's own batch (at least two samples), later running ones.
    """
    return nn.BatchNorm1d(dim, affine=False) if wanted else nn.Identity()


def _last(marked: Tensor) -> Tensor:
    """The index of the last True of each row of bool [B, N]; 0 where there is none."""
    positions = torch.arange(marked.shape[1], device=marked.device)
    return torch.where(marked, positions, 0).amax(1)


def _take(values: Tensor, index: Tensor) -> Tensor:
    return values[torch.arange(len(values), device=values.device), index]
