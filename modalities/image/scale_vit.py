"""A vision transformer whose grid stays the same at every resolution: a patch is read by a transformer of its own.

In a recipe::

    encoder: {type: image-scale-vit, size: 64, cell: 4, grid: 8, width: 192, depth: 6, heads: 3}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.modalities.image._base import ImageEncoder
from mmrep.modalities.image._preprocess import Preprocess
from mmrep.modalities.image.vit import sincos_2d
from mmrep.predictors.predictor import sincos
from mmrep.tokens import Grid, Inputs, Tokens
from mmrep.transformer_encoder import TransformerEncoder

_SPAN = 16.0
"""What the side of a patch counts as, whatever its pixels, in the sines of a cell's place within it."""


class ImageScaleViT(TransformerEncoder, ImageEncoder):
    """Pictures of any multiple of ``grid * cell`` pixels to ``grid`` x ``grid`` tokens.

    The scale-adaptive patch encoder of AnySat (Astruc et al. 2024, arXiv:2412.14123, section 3.1): a patch covers the
    same share of the picture at every resolution, and so the same ground; the finer the picture, the more cells of a
    fixed number of pixels it has. Its cells, with their place within the patch, and a learned patch token go through a
    transformer, and what the patch token has become is the token. Readings of one picture at several resolutions then
    have one geometry, and can predict one another. Coordinates are (row, column) in patches.
    """

    @config
    class Config(Preprocess):
        """Fields of an ``image-scale-vit``, beside its preprocessing.

        cell: side of a cell, in pixels. grid: patches on a side; ``grid * cell`` must divide ``size``. width: D. depth:
        blocks between patches. inner: blocks within a patch. heads: attention heads; must divide ``width``. mlp_ratio:
        hidden width of the MLPs over ``width``.
        """

        cell: Annotated[int, Field(ge=1)] = 4
        grid: Annotated[int, Field(ge=1)] = 8
        width: Annotated[int, Field(ge=4, multiple_of=4)] = 192
        depth: Annotated[int, Field(ge=1)] = 6
        inner: Annotated[int, Field(ge=1)] = 1
        heads: Annotated[int, Field(ge=1)] = 3
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.size % (self.grid * self.cell):
                raise ValueError(f"grid * cell = {self.grid * self.cell} does not divide size={self.size}")
            if self.width % self.heads:
                raise ValueError(f"heads={self.heads} does not divide width={self.width}")

    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, preprocess=config)
        self.width, self.depth, self.cell, self.grid = config.width, config.depth, config.cell, config.grid
        self.cells = nn.Conv2d(config.channels, config.width, config.cell, stride=config.cell)
        self.patch_token = nn.Parameter(0.02 * torch.randn(config.width))
        self.within = Transformer(config.width, config.inner, config.heads, config.mlp_ratio)
        self.patch_norm = nn.LayerNorm(config.width)
        self.transformer = Transformer(config.width, config.depth, config.heads, config.mlp_ratio)
        self.norm = nn.LayerNorm(config.width)

    def tokenize(self, inputs: Inputs) -> Tokens:
        """Pixels [B, C, H, W] to tokens [B, grid * grid, D].

        Raises:
            ValueError: ``grid * cell`` does not divide H and W.
        """
        pixels = self.normalize(inputs["pixels"])
        (B, _, H, W), g, side = pixels.shape, self.grid, self.grid * self.cell
        if H % side or W % side:
            raise ValueError(f"pictures of {H} x {W} have no {g} x {g} patches of whole cells of {self.cell} pixels")
        rows, columns = H // side, W // side
        values = self.cells(pixels).view(B, self.width, g, rows, g, columns)
        values = values.permute(0, 2, 4, 3, 5, 1).reshape(B * g * g, rows * columns, self.width)
        at = [(torch.arange(n, device=pixels.device) + 0.5) * (_SPAN / n) for n in (rows, columns)]
        places = sincos(torch.stack(torch.meshgrid(*at, indexing="ij"), -1).view(-1, 2), self.width)
        token = self.patch_token.to(values.dtype).expand(len(values), 1, -1)
        read, _ = self.within(torch.cat([token, values + places.to(values.dtype)], 1))
        tokens = self.patch_norm(read[:, 0]).view(B, g * g, self.width)
        positions = sincos_2d(g, g, self.width, tokens.device).to(tokens.dtype).expand(B, -1, -1)
        return Tokens(tokens + positions, Grid.regular(B, (g, g), device=tokens.device), positions)
