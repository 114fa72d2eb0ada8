"""Predictors that look at one token at a time: the encoder, which saw mask tokens, has done the work."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.predictors.predictor import Predictor, take
from mmrep.tokens import Tokens


@config
class TokenwiseConfig:
    """depth: linear layers. hidden: width between them; None = that of the tokens. norm: a layer norm in front."""

    depth: Annotated[int, Field(ge=1)] = 1
    hidden: Annotated[int, Field(ge=1)] | None = None
    norm: bool = False


class Tokenwise(Predictor):
    """A linear map (SimMIM, arXiv:2111.09886, section 3.3; BEiT, HuBERT, wav2vec 2.0) or a small MLP of each token."""

    Config = TokenwiseConfig
    needs_hidden = True

    def __init__(self, config: TokenwiseConfig, *, width: int, out: int, axes: int, condition: int = 0) -> None:
        super().__init__(config, width=width, out=out, axes=axes, condition=condition)
        if condition:
            raise ValueError("predictor 'tokenwise' takes no condition; use 'transformer'")
        layers: list[nn.Module] = [nn.LayerNorm(width)] if config.norm else []
        for _ in range(config.depth - 1):
            hidden = config.hidden or width
            layers += [nn.Linear(width, hidden), nn.GELU()]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, out))

    def forward(
        self, context: Tokens, index: Tensor, tokens: Tokens, target: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """See `Predictor.forward`."""
        return self.layers(take(context.values, places_in(index, target, tokens.grid.valid.shape[1])))


def places_in(index: Tensor, target: Tensor, n: int) -> Tensor:
    """Where tokens ``target`` int64 [B, Nt] stand in a context of the tokens ``index`` int64 [B, Nc], of ``n``."""
    slots = index.new_zeros(len(index), n + 1)
    places = index.new_ones(index.shape).cumsum(1) - 1
    slots = slots.scatter(1, index.masked_fill(index < 0, n), places)
    return slots.gather(1, target.clamp_min(0)).masked_fill(target < 0, -1)
