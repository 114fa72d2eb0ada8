"""A small vision transformer (arXiv:2010.11929) with the whole token contract.

In a recipe::

    encoder: {type: image-vit, size: 32, patch: 4, width: 192, depth: 6, heads: 3}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.modalities.image._base import ImageEncoder
from mmrep.modalities.image._preprocess import Preprocess
from mmrep.tokens import Encoding, Grid, Inputs, Tokens


class ImageViT(ImageEncoder):
    """Patches to tokens; only the tokens that are kept are computed.

    Tokens are the class token (if any), the registers (if any), then the patches in raster order. Positions are added
    to patches before any is dropped. Coordinates are (row, column) in patches. Pictures of another size than
    configured are accepted (multi-crop views) if ``patch`` divides them; learned positions are then interpolated.
    """

    @config
    class Config(Preprocess):
        """Fields of an ``image-vit``, beside its preprocessing.

        patch: side of a patch, in pixels; must divide ``size``. width: D. depth: number of blocks. heads: attention
        heads; must divide ``width``. mlp_ratio: hidden width of the MLPs over ``width``. class_token: put a class token
        in front. registers: number of register tokens (arXiv:2309.16588). positions: a learned table, or fixed 2-D
        sines and cosines (``width`` must then be a multiple of 4). dropout, drop_path: probabilities; drop_path rises
        linearly with depth. layer_scale: initial value, or None for none.
        """

        patch: Annotated[int, Field(ge=1)] = 4
        width: Annotated[int, Field(ge=1)] = 192
        depth: Annotated[int, Field(ge=1)] = 6
        heads: Annotated[int, Field(ge=1)] = 3
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
        class_token: bool = True
        registers: Annotated[int, Field(ge=0)] = 0
        positions: Literal["learned", "sincos"] = "learned"
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
        layer_scale: Annotated[float, Field(gt=0)] | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.size % self.patch:
                raise ValueError(f"patch={self.patch} does not divide size={self.size}")
            if self.width % self.heads:
                raise ValueError(f"heads={self.heads} does not divide width={self.width}")
            if self.positions == "sincos" and self.width % 4:
                raise ValueError(f"positions='sincos' needs a width that is a multiple of 4, got {self.width}")

    supports = frozenset({"tokens", "drop_tokens", "layers"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, preprocess=config)
        self.width, self.depth, self.patch = config.width, config.depth, config.patch
        self.grid = config.size // config.patch
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.transformer = Transformer(
            config.width,
            config.depth,
            config.heads,
            mlp_ratio=config.mlp_ratio,
            dropout=config.dropout,
            drop_path=config.drop_path,
            layer_scale=config.layer_scale,
        )
        self.norm = nn.LayerNorm(config.width)
        self.positions = None
        if config.positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid**2, config.width))
        # One parameter for class token and registers: they differ in nothing but their place.
        count = config.class_token + config.registers
        self.special = nn.Parameter(0.02 * torch.randn(1, count, config.width)) if count else None

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``{"pixels": [B, C, H, W]}`` to tokens [B, special + H/patch * W/patch, D].

        Raises:
            ValueError: ``patch`` does not divide H and W.
        """
        pixels = self.normalize(inputs["pixels"])
        B, _, H, W = pixels.shape
        if H % self.patch or W % self.patch:
            raise ValueError(f"pictures of {H} x {W} cannot be cut into patches of {self.patch}")
        shape = (H // self.patch, W // self.patch)
        values = self.patches(pixels).flatten(2).transpose(1, 2)
        values = values + self._positions(*shape).to(values.dtype)
        special = 0
        if self.special is not None:
            special = self.special.shape[1]
            values = torch.cat([self.special.to(values.dtype).expand(B, -1, -1), values], dim=1)
        return Tokens(values, Grid.regular(B, shape, special=special, device=values.device))

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Tokens to an encoding: [B, N', D], normed; the layers are block outputs, not normed."""
        self.check_request(keep, layers)
        kept = tokens.keep(keep)
        full = kept.grid.shape is not None or bool(kept.grid.valid.all())
        values, asked = self.transformer(kept.values, None if full else kept.grid.valid, layers)
        return Encoding(Tokens(self.norm(values), kept.grid), layers=asked)

    def no_weight_decay(self) -> set[str]:
        """Positions, class token and registers."""
        return {name for name in ("positions", "special") if getattr(self, name) is not None}

    def _positions(self, rows: int, columns: int) -> Tensor:
        if self.positions is None:
            return sincos_2d(rows, columns, self.width, self.patches.weight.device)
        if (rows, columns) == (self.grid, self.grid):
            return self.positions
        table = self.positions.float().view(1, self.grid, self.grid, self.width).permute(0, 3, 1, 2)
        table = F.interpolate(table, (rows, columns), mode="bicubic", antialias=True, align_corners=False)
        return table.flatten(2).transpose(1, 2)


def sincos_2d(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed 2-D positions, float32 [1, rows * columns, width].

    The sines of Vaswani et al. (arXiv:1706.03762, section 3.5) with half of the channels for the row and half for the
    column, as in arXiv:2104.02057 (section 4): per axis sin(p * w_i), then cos(p * w_i), w_i = 10000^(-4i / width).
    """
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float32, device=device) * 4 / width)
    places = torch.meshgrid(
        torch.arange(rows, dtype=torch.float32, device=device),
        torch.arange(columns, dtype=torch.float32, device=device),
        indexing="ij",
    )
    angles = [place.reshape(-1, 1) * frequency for place in places]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[None]
