"""A small vision transformer (arXiv:2010.11929) with the whole token contract.

In a recipe::

    encoder: {type: image-vit, size: 32, patch: 4, width: 192, depth: 6, heads: 3}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.modalities.image._base import ImageEncoder
from mmrep.modalities.image._native import collate_patches, fit_native, ragged_grid, to_patches
from mmrep.modalities.image._preprocess import Preprocess
from mmrep.tokens import Content, Grid, Inputs, Tokens
from mmrep.transformer_encoder import TransformerEncoder
from mmrep.views import View


class ImageViT(TransformerEncoder, ImageEncoder):
    """Patches to tokens; only the tokens that are kept are computed.

    Tokens are the class token (if any), the registers (if any), then the patches in raster order. Positions are added
    to patches before any is dropped. Coordinates are (row, column) in patches. Pictures of another size than
    configured are accepted (multi-crop views) if ``patch`` divides them; learned positions are then interpolated.

    With ``resize: native`` a picture keeps its aspect ratio. `prepare` then gives ``{"patches": [N, C * patch * patch],
    "shape": int64 [2]}``, N = rows * columns; a batch is padded to the most patches, with ``valid`` bool [B, N].
    """

    @config
    class Config(Preprocess):
        """Fields of an ``image-vit``, beside its preprocessing.

        patch: side of a patch, in pixels; must divide ``size``. width: D. depth: number of blocks. heads: attention
        heads; must divide ``width``. mlp_ratio: hidden width of the MLPs over ``width``. class_token: put a class token
        in front. registers: number of register tokens (arXiv:2309.16588). positions: a learned table, or fixed 2-D
        sines and cosines (``width`` must then be a multiple of 4). dropout, drop_path: probabilities; drop_path rises
        linearly with depth. layer_scale: initial value, or None for none. resize: as in `Preprocess`, or "native": keep
        the aspect ratio, shrink to ``max_patches`` patches at most, and fill up the last ones with the background (of
        bands: the mean); learned positions are a table for ``size``, interpolated for each picture. max_patches: None =
        those of a square of ``size``. enlarge: let small pictures grow to ``max_patches``, too.
        """

        resize: Literal["crop", "squash", "native"] = "crop"  # pyright: ignore[reportIncompatibleVariableOverride]

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
        max_patches: Annotated[int, Field(ge=1)] | None = None
        enlarge: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.size % self.patch:
                raise ValueError(f"patch={self.patch} does not divide size={self.size}")
            if self.width % self.heads:
                raise ValueError(f"heads={self.heads} does not divide width={self.width}")
            if self.positions == "sincos" and self.width % 4:
                raise ValueError(f"positions='sincos' needs a width that is a multiple of 4, got {self.width}")
            if self.resize != "native" and (self.max_patches is not None or self.enlarge):
                raise ValueError("max_patches, enlarge: mean something only with resize: native")

    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, preprocess=config)
        self.width, self.depth, self.patch = config.width, config.depth, config.patch
        self.grid = config.size // config.patch
        self.native = config.resize == "native"
        self.max_patches = config.max_patches or self.grid**2
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
        self.count = config.class_token + config.registers
        self.special = nn.Parameter(0.02 * torch.randn(1, self.count, config.width)) if self.count else None

    def fitted(self, picture: Any, chosen: int | None) -> Any:
        """See `ImageEncoder.fitted`; a view that chooses a square gets one, whatever ``resize`` says."""
        if not self.native or chosen is not None:
            return super().fitted(picture, chosen)
        enlarge = self.config.enlarge
        return fit_native(picture, self.preprocess, patch=self.patch, max_patches=self.max_patches, enlarge=enlarge)

    def enough(self) -> int | None:
        """See `ImageEncoder.enough`: how far a picture of unknown shape will shrink is not known before."""
        return None if self.native else super().enough()

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One picture to ``pixels``, as `ImageEncoder.prepare` does, or with ``resize: native`` to patches."""
        item = super().prepare(raw, view=view, seed=seed)
        if not self.native:
            return item
        fill = (0.0,) * self.preprocess.channels if self.bands else self.preprocess.background
        return to_patches(item["pixels"], self.patch, fill)

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Stack pictures of one shape, or pad patches; see the class."""
        return collate_patches(items) if self.native else super().collate(items)

    def length(self, item: Inputs) -> int:
        """The number of patches, where it differs between pictures."""
        return len(item["patches"]) if self.native else 1

    def tokenize(self, inputs: Inputs) -> Tokens:
        """Pixels [B, C, H, W] to tokens [B, special + H/patch * W/patch, D], or patches [B, N, …] to one token each.

        Raises:
            ValueError: ``patch`` does not divide H and W.
        """
        if "patches" in inputs:
            return self._of_patches(inputs)
        pixels = self.normalize(inputs["pixels"])
        B, _, H, W = pixels.shape
        if H % self.patch or W % self.patch:
            raise ValueError(f"pictures of {H} x {W} cannot be cut into patches of {self.patch}")
        shape = (H // self.patch, W // self.patch)
        values = self.patches(pixels).flatten(2).transpose(1, 2)
        places = self._positions(*shape).to(values.dtype).expand(B, -1, -1)
        grid = Grid.regular(B, shape, special=self.count, device=values.device)
        return Tokens(self._behind_special(values + places), grid, self._behind_special(places))

    def content(self, inputs: Inputs) -> Content:
        """See `Encoder.content`: the normalised pixels of each patch, [B, N, C * patch * patch], channels first."""
        if "patches" in inputs:
            B, N, size = inputs["patches"].shape
            C, side = self.preprocess.channels, self.patch
            values = self.normalize(inputs["patches"].reshape(B * N, C, side, side)).reshape(B, N, size)
        else:
            values = F.unfold(self.normalize(inputs["pixels"]), self.patch, stride=self.patch).transpose(1, 2)
        return Content(F.pad(values, (0, 0, self.count, 0)))

    def _of_patches(self, inputs: Inputs) -> Tokens:
        """Ragged tokens; the patch embedding is the same convolution, written as a product."""
        B, N, size = inputs["patches"].shape
        C, side = self.preprocess.channels, self.patch
        patches = self.normalize(inputs["patches"].reshape(B * N, C, side, side)).reshape(B, N, size)
        values = F.linear(patches, self.patches.weight.flatten(1), self.patches.bias)
        shapes = [(rows, columns) for rows, columns in inputs["shape"].tolist()]
        known = list(dict.fromkeys(shapes))
        places = torch.zeros_like(values)
        if known:
            tables = [F.pad(self._positions(*shape)[0], (0, 0, 0, N - shape[0] * shape[1])) for shape in known]
            chosen = torch.tensor([known.index(shape) for shape in shapes], device=values.device)
            places = torch.stack(tables)[chosen].to(values.dtype)
        grid = ragged_grid(inputs, shapes, self.count)
        return Tokens(self._behind_special(values + places), grid, self._behind_special(places))

    def _behind_special(self, values: Tensor) -> Tensor:
        if self.special is None:
            return values
        special = self.special.to(values.dtype).expand(values.shape[0], -1, -1)  # len() would be a constant in a graph
        return torch.cat([special, values], dim=1)

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
