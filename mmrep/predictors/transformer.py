"""A narrow transformer over visible tokens and position queries: the predictor of I-JEPA, the decoder of MAE."""

from __future__ import annotations

from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.predictors.predictor import Places, Predictor, take
from mmrep.tokens import Tokens


@config
class TransformerPredictorConfig:
    """width, depth, heads, mlp_ratio, dropout: of the transformer; usually narrower than the encoder.

    positions: of a token, from its coordinates: ``sincos`` (regular grids and sequences), ``mlp`` (a learned function
    of the coordinates: points), or ``encoder`` (a linear map of the encoder's own positions: graphs).

    noise: variance of what is added, in training, to the position of a hidden token, before the linear map that the
    context goes through too (StoP).
    """

    width: Annotated[int, Field(ge=1)] = 96
    depth: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 4
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    positions: Literal["sincos", "mlp", "encoder"] = "sincos"
    noise: Annotated[float, Field(ge=0)] = 0.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")


class TransformerPredictor(Predictor):
    """``head(norm(T([W context + p(context), mask + p(target), condition])))`` at the targets.

    I-JEPA (Assran et al. 2023, arXiv:2301.08243, section 3) and MAE (arXiv:2111.06377, section 3). The condition, if
    any, is mapped linearly to tokens in front (IWM, arXiv:2403.00504, section 3.2, "sequence" conditioning).

    With ``noise`` the position of a hidden token is ``p + W n``, n normal of that variance: its covariance is ``noise *
    W W^T``, and W cannot shrink without losing the context (StoP, Bar et al. 2024, arXiv:2308.00566, section 3). Like
    dropout it is drawn by torch's generator, and rests in eval mode.
    """

    Config = TransformerPredictorConfig

    def __init__(self, config: TransformerPredictorConfig, *, width: int, out: int, axes: int, condition: int = 0):
        super().__init__(config, width=width, out=out, axes=axes, condition=condition)
        D = config.width
        self.embed = nn.Linear(width, D)
        self.token = nn.Parameter(0.02 * torch.randn(D))
        self.transformer = Transformer(D, config.depth, config.heads, config.mlp_ratio, config.dropout)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, out)
        self.place = Places(config.positions, width=width, axes=axes, out=D)
        self.condition = nn.Linear(condition, D) if condition else None

    def forward(
        self, context: Tokens, index: Tensor, tokens: Tokens, target: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """See `Predictor.forward`."""
        places = self.place(tokens)
        special = context.grid.special[..., None]
        known = self.embed(context.values)
        known = known + torch.where(special, torch.zeros_like(known), take(places, index))
        asked = self.token.to(known.dtype) + take(places, target)
        noise = cast(TransformerPredictorConfig, self.config).noise
        if noise and self.training:
            normal = torch.randn(*target.shape, self.embed.in_features, dtype=known.dtype, device=known.device)
            asked = asked + nn.functional.linear(noise**0.5 * normal, self.embed.weight)
        parts, valid = [known, asked], [context.grid.valid, (target >= 0)]
        if self.condition is not None:
            assert condition is not None, "this predictor was built with a condition"
            extra = self.condition(condition.to(known.dtype))
            parts.insert(0, extra)
            valid.insert(0, valid[0].new_ones(extra.shape[:2]))
        everything = torch.cat(valid, 1)
        values, _ = self.transformer(torch.cat(parts, 1), None if bool(everything.all()) else everything)
        return self.head(self.norm(values[:, -target.shape[1] :] if target.shape[1] else values[:, :0]))
