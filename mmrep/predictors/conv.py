"""Convolutions over the grid, in whose hidden places a learned vector stands."""

from __future__ import annotations

import math
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.predictors.predictor import Predictor, take
from mmrep.tokens import Tokens, indicator


@config
class ConvPredictorConfig:
    """width: channels; None = those of the encoder. depth: layers. kernel: places on a side, odd."""

    width: Annotated[int, Field(ge=1)] | None = None
    depth: Annotated[int, Field(ge=1)] = 3
    kernel: Annotated[int, Field(ge=3)] = 3

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} has no middle: take an odd one")


class ConvPredictor(Predictor):
    """Depthwise-separable convolutions (CNN-JEPA, arXiv:2408.07514, section 3) with residuals (data2vec 2).

    Each layer is a depthwise convolution, a linear map of the channels, a layer norm over the channels, GELU and a
    residual, as in the decoder of data2vec 2 (arXiv:2212.07525, section 3.3), whose grouped convolutions these replace.
    It adds no positions: where a token is, the neighbours say. Grids of 1 to 3 axes; tokens of one coordinate may be
    ragged (sequences), of more they must be a full grid.
    """

    Config = ConvPredictorConfig
    blanks = True

    def __init__(self, config: ConvPredictorConfig, *, width: int, out: int, axes: int, condition: int = 0) -> None:
        super().__init__(config, width=width, out=out, axes=axes, condition=condition)
        if condition:
            raise ValueError("predictor 'conv' takes no condition; use 'transformer'")
        if axes > 3:
            raise ValueError(f"predictor 'conv' knows grids of 1 to 3 axes, not {axes}; use 'transformer'")
        D = config.width or width
        self.embed = nn.Linear(width, D)
        self.token = nn.Parameter(0.02 * torch.randn(D))
        self.layers = nn.ModuleList(_Layer(D, config.kernel, axes) for _ in range(config.depth))
        self.head = nn.Linear(D, out)

    def forward(
        self, context: Tokens, index: Tensor, tokens: Tokens, target: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """See `Predictor.forward`.

        Raises:
            ValueError: the tokens are no full grid, and of more than one axis.
        """
        shape, place = self._dense(tokens)
        B, cells = len(index), math.prod(shape)
        known = self.embed(context.values)
        # Special tokens, empty slots and what the encoder saw as mask tokens are not known: one cell more takes them.
        hidden = take(indicator(target, tokens.grid.valid.shape[1]), index)
        known_here = context.grid.valid & ~context.grid.special & (index >= 0) & ~hidden
        at = take(place, index).masked_fill(~known_here, cells)
        dense = self.token.to(known.dtype).expand(B, cells + 1, -1)
        dense = dense.scatter(1, at[..., None].expand_as(known), known)[:, :cells]
        there = indicator(place.masked_fill(~(tokens.grid.valid & ~tokens.grid.special), -1), cells)
        there = there.view(B, 1, *shape).to(known.dtype)
        grid = dense.transpose(1, 2).reshape(B, -1, *shape) * there
        for layer in self.layers:
            grid = layer(grid) * there  # what is beyond the end of a sequence must not flow back
        return self.head(take(grid.flatten(2).transpose(1, 2), take(place, target)))

    def _dense(self, tokens: Tokens) -> tuple[tuple[int, ...], Tensor]:
        """The shape of the grid, and in which cell each token is: int64 [B, N]."""
        grid = tokens.grid
        place = ((~grid.special).cumsum(1) - 1).clamp_min(0)
        if grid.shape is not None:
            return grid.shape, place
        if self.axes == 1:
            return (grid.valid.shape[1],), place
        raise ValueError(
            "predictor 'conv' needs a full grid, and these tokens are ragged or a part of one; use 'transformer'"
        )


class _Layer(nn.Module):
    """See `ConvPredictor`."""

    def __init__(self, width: int, kernel: int, axes: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.depthwise = conv(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.pointwise = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, grid: Tensor) -> Tensor:
        """[B, D, ...] to [B, D, ...]."""
        mixed = self.norm(self.pointwise(cast(Tensor, self.depthwise(grid)).movedim(1, -1)))
        return grid + nn.functional.gelu(mixed).movedim(-1, 1)
