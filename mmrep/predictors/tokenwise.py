"""Predictors that look at one token at a time: the encoder, which saw mask tokens, has done the work."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import config
from mmrep.predictors.predictor import Predictor, take
from mmrep.tokens import Tokens


@config
class TokenwiseConfig:
    """depth: linear layers. hidden: width between them; None = that of the tokens. norm: a layer norm in front.

    cosine: behind these layers, which then end in ``hidden`` figures, the logits are cosines to a learned vector for
    each code, over this temperature (HuBERT, arXiv:2106.07447, eq. 3: depth 1 and 0.1).
    """

    depth: Annotated[int, Field(ge=1)] = 1
    hidden: Annotated[int, Field(ge=1)] | None = None
    norm: bool = False
    cosine: Annotated[float, Field(gt=0)] | None = None


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
        if config.cosine is None:
            layers.append(nn.Linear(width, out))
        else:
            layers += [nn.Linear(width, config.hidden or width), Cosines(config.hidden or width, out, config.cosine)]
        self.layers = nn.Sequential(*layers)

    def forward(
        self, context: Tokens, index: Tensor, tokens: Tokens, target: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """See `Predictor.forward`."""
        return self.layers(take(context.values, places_in(index, target, tokens.grid.valid.shape[1])))


class Cosines(nn.Module):
    """Cosines [..., out] of vectors [..., width] to ``out`` learned ones, over a temperature; float32 (or float64)."""

    def __init__(self, width: int, out: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.randn(out, width) * width**-0.5)

    def forward(self, values: Tensor) -> Tensor:
        """See the class."""
        values = values if values.dtype == torch.float64 else values.float()
        with torch.autocast(values.device.type, enabled=False):
            cosines = F.linear(F.normalize(values, dim=-1), F.normalize(self.weight.to(values.dtype), dim=-1))
        return cosines / self.temperature


def places_in(index: Tensor, target: Tensor, n: int) -> Tensor:
    """Where tokens ``target`` int64 [B, Nt] stand in a context of the tokens ``index`` int64 [B, Nc], of ``n``."""
    slots = index.new_zeros(len(index), n + 1)
    places = index.new_ones(index.shape).cumsum(1) - 1
    slots = slots.scatter(1, index.masked_fill(index < 0, n), places)
    return slots.gather(1, target.clamp_min(0)).masked_fill(target < 0, -1)
