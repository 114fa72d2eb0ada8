"""A transformer over tubelets (ViViT, arXiv:2103.15691, section 3.2; VideoMAE, arXiv:2203.12602), with the whole token
contract.

In a recipe::

    encoder: {type: video-transformer, frames: 16, size: 64, tubelet: 2, patch: 8, width: 192, depth: 6, heads: 3}
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
from mmrep.modalities.video._base import PixelEncoder, Preprocess
from mmrep.modalities.video._clips import side_by_side
from mmrep.tokens import Content, Encoding, Grid, Inputs, Tokens


class VideoTransformer(PixelEncoder):
    """Blocks of ``tubelet`` frames x ``patch`` x ``patch`` pixels to tokens, which all attend to each other.

    Tokens are the class token (if any), then the tubelets, time first, then in raster order. Positions, by number of
    tubelet, row and column, are added before any token is dropped. Coordinates are (tubelet, row, column), all
    counted in tokens. A last tubelet that is short of frames repeats the last one. Frames of
    another size than configured are accepted if ``patch`` divides them, and more frames than configured: learned
    positions are then interpolated.
    """

    @config
    class Config(Preprocess):
        """Fields of a ``video-transformer``, beside its preprocessing.

        tubelet: frames of a tubelet. patch: its side, in pixels; must divide ``size``. width: D. depth: number of
        blocks. heads: attention heads; must divide ``width``. mlp_ratio: hidden width of the MLPs over ``width``.
        class_token: put a class token in front. positions: the sum of a learned table for time and one for space; or
        fixed sines and cosines (``width`` must then be a multiple of 8). dropout, drop_path: probabilities; drop_path
        rises linearly with depth. layer_scale: initial value, or None for none.
        """

        tubelet: Annotated[int, Field(ge=1)] = 2
        patch: Annotated[int, Field(ge=1)] = 8
        width: Annotated[int, Field(ge=1)] = 192
        depth: Annotated[int, Field(ge=1)] = 6
        heads: Annotated[int, Field(ge=1)] = 3
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
        class_token: bool = False
        positions: Literal["learned", "sincos"] = "sincos"
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
        layer_scale: Annotated[float, Field(gt=0)] | None = None

        def __post_init__(self) -> None:
            if self.size % self.patch:
                raise ValueError(f"patch={self.patch} does not divide size={self.size}")
            if self.width % self.heads:
                raise ValueError(f"heads={self.heads} does not divide width={self.width}")
            if self.positions == "sincos" and self.width % 8:
                raise ValueError(f"positions='sincos' needs a width that is a multiple of 8, got {self.width}")

    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, preprocess=config)
        self.width, self.depth = config.width, config.depth
        self.tubelet, self.patch = config.tubelet, config.patch
        self.shape = (-(-config.frames // config.tubelet), config.size // config.patch)
        kernel = (config.tubelet, config.patch, config.patch)
        self.tubelets = nn.Conv3d(3, config.width, kernel, stride=kernel)
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
        self.temporal = self.spatial = self.special = None
        if config.positions == "learned":
            self.temporal = nn.Parameter(0.02 * torch.randn(1, self.shape[0], config.width))
            self.spatial = nn.Parameter(0.02 * torch.randn(1, self.shape[1] ** 2, config.width))
        if config.class_token:
            self.special = nn.Parameter(0.02 * torch.randn(1, 1, config.width))

    def clip_tokens(self, inputs: Inputs) -> Tokens:
        """``frames`` [B, T, 3, H, W] and ``valid`` [B, T] to tokens.

        Returns:
            Tokens [B, class + ceil(T / tubelet) * H / patch * W / patch, D].

        Raises:
            ValueError: ``patch`` does not divide H and W.
        """
        frames, valid = _whole_tubelets(inputs, self.tubelet)
        frames = self.normalize(frames)
        (B, _, _, H, W), side = frames.shape, self.patch
        if H % side or W % side:
            raise ValueError(f"frames of {H} x {W} cannot be cut into patches of {side}")
        shape = (valid.shape[1] // self.tubelet, H // side, W // side)
        values = self.tubelets(frames.transpose(1, 2)).flatten(2).transpose(1, 2)
        places = self._positions(*shape).to(values.dtype).expand(B, -1, -1)
        values, special = values + places, 0
        if self.special is not None:
            special = 1
            front = self.special.to(values.dtype).expand(B, -1, -1)
            values, places = (torch.cat([front, part], dim=1) for part in (values, places))
        return Tokens(values, _grid(valid, shape, self.tubelet, special), places)

    def content(self, inputs: Inputs) -> Content:
        """See `Encoder.content`: the normalised pixels of each tubelet, [B, N, 3 * tubelet * patch * patch].

        Channels first, then time. What stands for a frame that the clip does not have is not observed.
        """
        clips = inputs["times"].shape[1] if inputs["times"].ndim == 3 else 1
        if inputs["times"].ndim == 3:
            inputs = {key: inputs[key].flatten(0, 1) for key in ("frames", "valid")}
        frames, valid = _whole_tubelets(inputs, self.tubelet)
        frames = self.normalize(frames)
        observed = valid[:, :, None, None, None].expand_as(frames)
        front = 0 if self.special is None else 1
        parts = (F.pad(self._cut(part), (0, 0, front, 0)) for part in (frames, observed))
        values, observed = (side_by_side(part, front, clips) for part in parts)
        return Content(values, observed)

    def _cut(self, frames: Tensor) -> Tensor:
        """[B, T, 3, H, W] to tubelets [B, N, 3 * tubelet * patch * patch], in the order of the tokens."""
        cut = frames
        for axis, side in ((1, self.tubelet), (3, self.patch), (4, self.patch)):
            cut = cut.unfold(axis, side, side)  # [B, t, 3, rows, columns, tubelet, patch, patch] in the end
        return cut.permute(0, 1, 3, 4, 2, 5, 6, 7).flatten(4).flatten(1, 3)

    def encode_clips(self, tokens: Tokens, layers: Sequence[int]) -> Encoding:
        """Tokens to an encoding: [B, N', D], normed; the layers are block outputs, not normed."""
        full = tokens.grid.shape is not None or bool(tokens.grid.valid.all())
        values, asked = self.transformer(tokens.values, None if full else tokens.grid.valid, layers)
        return Encoding(Tokens(self.norm(values), tokens.grid), layers=asked)

    def no_weight_decay(self) -> set[str]:
        """Positions and class token."""
        return {name for name in ("temporal", "spatial", "special") if getattr(self, name) is not None}

    def _positions(self, tubelets: int, rows: int, columns: int) -> Tensor:
        """[1, tubelets * rows * columns, D]."""
        if self.temporal is None or self.spatial is None:
            return sincos_3d(tubelets, rows, columns, self.width, self.tubelets.weight.device)
        time, side = self.temporal, self.shape[1]
        if tubelets > self.shape[0]:
            time = F.interpolate(time.float().mT, tubelets, mode="linear", align_corners=False).mT
        space = self.spatial
        if (rows, columns) != (side, side):
            table = space.float().view(1, side, side, self.width).permute(0, 3, 1, 2)
            table = F.interpolate(table, (rows, columns), mode="bicubic", antialias=True, align_corners=False)
            space = table.flatten(2).transpose(1, 2)
        return (time[:, :tubelets, None] + space[:, None]).flatten(1, 2)


def _whole_tubelets(inputs: Inputs, tubelet: int) -> tuple[Tensor, Tensor]:
    """Frames [B, T, …] and validity [B, T], with T a multiple of ``tubelet`` and the last valid frame at all padding.

    What stands at padding then does not depend on the batch, which matters for a tubelet that is valid in part.
    """
    frames, valid = inputs["frames"], inputs["valid"]
    count = valid.sum(1, keepdim=True)
    T = -(-valid.shape[1] // tubelet) * tubelet
    at = torch.arange(T, device=valid.device).expand(valid.shape[0], -1)
    if T == valid.shape[1] and bool(valid.all()):
        return frames, valid
    last = torch.minimum(at, (count - 1).clamp_min(0))
    return frames.gather(1, last.view(*last.shape, 1, 1, 1).expand(-1, -1, *frames.shape[2:])), at < count


def _grid(valid: Tensor, shape: tuple[int, int, int], tubelet: int, special: int) -> Grid:
    """A tubelet is there if any of its frames is."""
    regular = Grid.regular(valid.shape[0], shape, special=special, device=valid.device)
    begun = valid.unflatten(1, (-1, tubelet)).any(2)
    present = torch.cat([regular.valid[:, :special], begun.repeat_interleave(shape[1] * shape[2], 1)], 1)
    return Grid(regular.coords, present, regular.special, shape if bool(begun.all()) else None)


def sincos_3d(times: int, rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions, float32 [1, times * rows * columns, width]: half of the channels for time, a quarter each for
    row and column.

    Per axis, of c channels, sin(p * w_i), then cos(p * w_i), with w_i = 10000^(-2i / c), i < c / 2 (Vaswani et al.,
    arXiv:1706.03762, section 3.5).
    """
    axes = []
    for count, channels in ((times, width // 2), (rows, width // 4), (columns, width // 4)):
        frequency = 10000.0 ** (-torch.arange(channels // 2, dtype=torch.float32, device=device) * 2 / channels)
        axes.append((torch.arange(count, dtype=torch.float32, device=device), frequency))
    places = torch.meshgrid(*(place for place, _ in axes), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place, (_, frequency) in zip(places, axes, strict=True)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[None]
