"""A convolutional network that computes visible patches alone: convolutions that never see what is hidden.

In a recipe::

    encoder: {type: image-sparse-cnn, size: 32, stem: 2, widths: [64, 128, 256], depths: [1, 1, 2]}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import config
from mmrep.modalities.image._base import ImageEncoder
from mmrep.modalities.image._preprocess import Preprocess
from mmrep.tokens import Content, Encoding, Grid, Inputs, Tokens, indicator

Count = Annotated[int, Field(ge=1)]


class ImageSparseCNN(ImageEncoder):
    """ConvNeXt blocks (arXiv:2201.03545) whose hidden cells are set to zero after every layer, at every resolution.

    These are the masked convolutions of SparK (Tian et al. 2023, arXiv:2301.03580, section 3.1) and CNN-JEPA
    (arXiv:2408.07514, section 3.1), computed densely: a hidden cell neither gives anything to its neighbours nor
    grows from them. The stem and what lies between stages cut the picture without overlap, so that every cell belongs
    to one token; norms are over the channels of a cell, which needs no statistics of the visible ones.

    A token is a patch of the picture of the size of one cell of the last stage: `tokenize` gives its normalised pixels,
    `encode` the cell. Where a token is, its neighbours and the zeros around the picture say. Coordinates are (row,
    column) in patches. Pictures of another size than configured are accepted if the patch divides them.
    """

    @config
    class Config(Preprocess):
        """Fields of an ``image-sparse-cnn``, beside its preprocessing.

        widths: channels of each stage; the last is D. depths: blocks in each stage. stem: side of the stem's squares,
        in pixels; each stage but the first halves the resolution, so a token's patch has a side of ``stem *
        2 ** (stages - 1)``, which must divide ``size``. kernel: side of the depthwise convolutions, odd.
        """

        widths: tuple[Count, ...] = (64, 128, 256)
        depths: tuple[Count, ...] = (1, 1, 1)
        stem: Count = 2
        kernel: Annotated[int, Field(ge=3)] = 5

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.widths or len(self.widths) != len(self.depths):
                raise ValueError(f"widths {self.widths} and depths {self.depths} must have the same length, 1 or more")
            if self.kernel % 2 == 0:
                raise ValueError(f"kernel={self.kernel} must be odd")
            patch = self.stem * 2 ** (len(self.widths) - 1)
            if self.size % patch:
                raise ValueError(f"patches of {patch} pixels (stem * 2 ** (stages - 1)) do not divide size={self.size}")

    supports = frozenset({"tokens", "drop_tokens", "content"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, preprocess=config)
        self.width, self.patch = config.widths[-1], config.stem * 2 ** (len(config.widths) - 1)
        befores, sides = (config.channels, *config.widths), (config.stem, *[2] * (len(config.widths) - 1))
        self.shrink = nn.ModuleList(
            nn.Conv2d(before, width, side, side)
            for before, width, side in zip(befores, config.widths, sides, strict=False)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in config.widths)
        self.stages = nn.ModuleList(
            nn.ModuleList(_Block(width, config.kernel) for _ in range(depth))
            for width, depth in zip(config.widths, config.depths, strict=True)
        )

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``{"pixels": [B, C, H, W]}`` to patches [B, H / patch * W / patch, C * patch * patch].

        Raises:
            ValueError: the patch does not divide H and W.
        """
        pixels = self.normalize(inputs["pixels"])
        (B, _, H, W), side = pixels.shape, self.patch
        if H % side or W % side:
            raise ValueError(f"pictures of {H} x {W} cannot be cut into patches of {side}")
        grid = Grid.regular(B, (H // side, W // side), device=pixels.device)
        return Tokens(F.unfold(pixels, side, stride=side).transpose(1, 2), grid)

    def content(self, inputs: Inputs) -> Content:
        """See `Encoder.content`: the normalised pixels of each patch, [B, N, C * patch * patch], channels first."""
        return Content(self.tokenize(inputs).values)

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Patches to an encoding [B, N', D]; what is not kept is computed as zeros, and is not in it."""
        self.check_request(keep, layers)
        shape, B = tokens.grid.shape, len(tokens.values)
        assert shape is not None, "a convolutional encoder needs the whole grid, of which it drops what is not kept"
        rows, columns = shape
        seen = tokens.values.new_ones(B, rows * columns)
        if keep is not None:
            seen = indicator(keep, rows * columns).to(tokens.values.dtype)
        seen = seen.view(B, 1, rows, columns)
        side = self.patch
        x = F.fold(tokens.values.transpose(1, 2), (rows * side, columns * side), side, stride=side)
        for shrink, norm, blocks in zip(self.shrink, self.norms, self.stages, strict=True):
            kernel = cast(nn.Conv2d, shrink).kernel_size[0]
            side //= kernel
            there = seen.repeat_interleave(side, 2).repeat_interleave(side, 3)
            # A hidden patch is none of the input's business either: it may hold anything, a NaN too.
            before = there.repeat_interleave(kernel, 2).repeat_interleave(kernel, 3)
            x = _per_cell(norm, shrink(x.masked_fill(before == 0, 0))) * there
            for block in cast(nn.ModuleList, blocks):
                x = block(x, there)
        dense = Tokens(x.flatten(2).transpose(1, 2), tokens.grid)
        return Encoding(dense.keep(keep))


class _Block(nn.Module):
    """Depthwise convolution, norm, and an MLP of four times the width on each cell, scaled per channel."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1))
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """[B, C, H, W], zero where ``there`` [B, 1, H, W] is, to the same."""
        return x + self.scale * self.mlp(_per_cell(self.norm, self.depthwise(x))) * there


def _per_cell(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm over the channels of each cell of [B, C, H, W]."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
