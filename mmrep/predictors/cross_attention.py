"""Queries at the hidden places that read the context in every layer, which they do not change."""

from __future__ import annotations

from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import config
from mmrep.predictors.predictor import Places, Predictor, take
from mmrep.tokens import Tokens


@config
class CrossAttentionConfig:
    """width, depth, heads, mlp_ratio: of the layers. positions: as in the ``transformer`` predictor.

    attend: to the ``context`` alone, so that each hidden token is predicted by itself, or to ``all``: the context and
    the other queries (CAE).
    """

    width: Annotated[int, Field(ge=1)] = 96
    depth: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 4
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    positions: Literal["sincos", "mlp", "encoder"] = "sincos"
    attend: Literal["context", "all"] = "context"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")


class CrossAttention(Predictor):
    """The latent contextual regressor of CAE (arXiv:2202.03026, section 3.1): cross-attention, MLP, residuals.

    The context stays as the encoder left it, and every layer reads it again (3D-JEPA, arXiv:2409.15803, section 3: the
    decoder that is aware of its context). The condition, if any, is mapped linearly to tokens of the context.
    """

    Config = CrossAttentionConfig

    def __init__(self, config: CrossAttentionConfig, *, width: int, out: int, axes: int, condition: int = 0) -> None:
        super().__init__(config, width=width, out=out, axes=axes, condition=condition)
        D = config.width
        self.embed = nn.Linear(width, D)
        self.token = nn.Parameter(0.02 * torch.randn(D))
        self.place = Places(config.positions, width=width, axes=axes, out=D)
        self.known = nn.LayerNorm(D)
        self.layers = nn.ModuleList(_Layer(D, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, out)
        self.condition = nn.Linear(condition, D) if condition else None

    def forward(
        self, context: Tokens, index: Tensor, tokens: Tokens, target: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """See `Predictor.forward`."""
        places = self.place(tokens)
        known = self.embed(context.values)
        known = known + take(places, index).masked_fill(context.grid.special[..., None], 0)
        valid = context.grid.valid
        if self.condition is not None:
            assert condition is not None, "this predictor was built with a condition"
            extra = self.condition(condition.to(known.dtype))
            known = torch.cat([extra, known], 1)
            valid = torch.cat([valid.new_ones(extra.shape[:2]), valid], 1)
        known = self.known(known)
        asked = self.token.to(known.dtype) + take(places, target)
        together = cast(CrossAttentionConfig, self.config).attend == "all"
        seen = torch.cat([valid, target >= 0], 1) if together else valid
        # Attention over nothing is NaN on some backends.
        mask = (seen | ~seen.any(1, keepdim=True))[:, None, None, :]
        for layer in self.layers:
            asked = layer(asked, known, mask, together)
        return self.head(self.norm(asked))


class _Layer(nn.Module):
    """Norm, cross-attention, residual; norm, MLP with GELU, residual."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # a bias of keys changes no weight of the attention
        self.value = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, asked: Tensor, known: Tensor, mask: Tensor, together: bool) -> Tensor:
        """Queries [B, Nt, D] and context [B, Nc, D] to queries; mask bool [B, 1, 1, Nc or Nc + Nt]."""
        normed = self.norm1(asked)
        source = torch.cat([known, normed], 1) if together else known
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(normed)), self._split(self.key(source)), self._split(self.value(source)), mask
        )
        asked = asked + self.out(mixed.transpose(1, 2).flatten(2))
        return asked + self.mlp(self.norm2(asked))

    def _split(self, values: Tensor) -> Tensor:
        B, N, D = values.shape
        return values.view(B, N, self.heads, D // self.heads).transpose(1, 2)
