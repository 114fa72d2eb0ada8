"""A small convolutional network for small pictures: fast on a CPU, a good first image tower.

In a recipe::

    encoder: {type: image-cnn, size: 32, widths: [64, 128, 256], depths: [1, 1, 1]}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.modalities.image._base import ImageEncoder
from mmrep.modalities.image._preprocess import Preprocess
from mmrep.tokens import Encoding, Grid, Inputs, Tokens

Count = Annotated[int, Field(ge=1)]
_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class ImageCNN(ImageEncoder):
    """A stem, then stages; every stage but the first halves the resolution. Tokens are the cells of the last map.

    `tokenize` runs the stem and `encode` the stages, so the tokens between them are the stem's cells, ``widths[0]``
    wide. Layer k is the output of stage k: [B, cells of that stage, widths[k - 1]]. Coordinates are (row, column) in
    cells. Pictures of any size are accepted.
    """

    @config
    class Config(Preprocess):
        """Fields of an ``image-cnn``, beside its preprocessing.

        widths: channels of each stage; the last is D. depths: blocks in each stage. block: "residual" is two 3 x 3
        convolutions around a shortcut (ResNet, arXiv:1512.03385, with average-pooled shortcuts, arXiv:1812.01187);
        "plain" is one 3 x 3 convolution without a shortcut (VGG, arXiv:1409.1556), half the cost and fine when shallow;
        "convnext" is a depthwise convolution and an MLP (arXiv:2201.03545). norm: "batch", "group" (16 channels in a
        group) or "layer" (all channels and cells of a sample together). activation: between and after convolutions.
        stem_stride: 1, 2 or 4; the stem's kernel is then 3, 4 or 4. kernel: side of the depthwise convolution, odd.
        final_norm: a LayerNorm over the channels of each final token.
        """

        widths: tuple[Count, ...] = (64, 128, 256)
        depths: tuple[Count, ...] = (1, 1, 1)
        block: Literal["residual", "plain", "convnext"] = "residual"
        norm: Literal["batch", "group", "layer"] = "batch"
        activation: Literal["relu", "gelu", "silu"] = "gelu"
        stem_stride: Literal[1, 2, 4] = 2
        kernel: Annotated[int, Field(ge=1)] = 7
        final_norm: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.widths or len(self.widths) != len(self.depths):
                raise ValueError(f"widths {self.widths} and depths {self.depths} must have the same length, 1 or more")
            if self.kernel % 2 == 0:
                raise ValueError(f"kernel={self.kernel} must be odd")

    supports = frozenset({"tokens", "layers"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, preprocess=config)
        self.width, self.depth = config.widths[-1], len(config.widths)
        first, stride = config.widths[0], config.stem_stride
        stem = nn.Conv2d(config.channels, first, 3 if stride == 1 else 4, stride, 0 if stride == 4 else 1, bias=False)
        self.stem = nn.Sequential(stem, _norm(config, first), _ACTIVATIONS[config.activation]())
        stages: list[nn.Module] = []
        before = first
        for number, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            stride = 2 if number else 1
            if config.block != "convnext":
                block = Residual if config.block == "residual" else Plain
                blocks: list[nn.Module] = [
                    block(config, before if i == 0 else width, width, stride if i == 0 else 1) for i in range(depth)
                ]
            else:
                blocks = [ConvNeXt(config, width) for _ in range(depth)]
                if number:
                    blocks = [_norm(config, before), nn.Conv2d(before, width, 2, 2), *blocks]
            stages.append(nn.Sequential(*blocks))
            before = width
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.width) if config.final_norm else nn.Identity()
        # Convolutions in bf16 and the reshapes between maps and tokens are both free of copies in this layout.
        self.to(memory_format=torch.channels_last)

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``{"pixels": [B, C, H, W]}`` to the stem's cells as tokens [B, H' * W', widths[0]]."""
        pixels = self.normalize(inputs["pixels"]).contiguous(memory_format=torch.channels_last)
        return _to_tokens(self.stem(pixels))

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """The stem's tokens to an encoding [B, N', D]; the layers are the stages' outputs."""
        self.check_request(keep, layers)
        features = _to_map(tokens)
        asked: dict[int, Tensor] = {}
        for number, stage in enumerate(self.stages, start=1):
            features = stage(features)
            if number in layers:
                asked[number] = _to_tokens(features).values
        out = _to_tokens(features)
        return Encoding(Tokens(self.norm(out.values), out.grid), layers=tuple(asked[n] for n in layers))


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, the activation after the sum; starts as the shortcut alone."""

    def __init__(self, config: ImageCNN.Config, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False),
            _norm(config, width),
            _ACTIVATIONS[config.activation](),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            _norm(config, width),
        )
        nn.init.zeros_(cast(Tensor, self.branch[-1].weight))
        shortcut: list[nn.Module] = [nn.AvgPool2d(2, ceil_mode=True)] if stride == 2 else []
        if before != width:
            shortcut += [nn.Conv2d(before, width, 1, bias=False), _norm(config, width)]
        self.shortcut = nn.Sequential(*shortcut)
        self.activation = _ACTIVATIONS[config.activation]()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H / stride, W / stride]."""
        return self.activation(self.branch(x) + self.shortcut(x))


class Plain(nn.Sequential):
    """One 3 x 3 convolution, norm and activation."""

    def __init__(self, config: ImageCNN.Config, before: int, width: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(before, width, 3, stride, 1, bias=False), _norm(config, width), _ACTIVATIONS[config.activation]()
        )


class ConvNeXt(nn.Module):
    """Depthwise convolution, norm, and an MLP of four times the width on each cell, scaled per channel."""

    def __init__(self, config: ImageCNN.Config, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, config.kernel, padding=config.kernel // 2, groups=width),
            _norm(config, width),
            nn.Conv2d(width, 4 * width, 1),
            _ACTIVATIONS[config.activation](),
            nn.Conv2d(4 * width, width, 1),
        )
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        return x + self.scale * self.branch(x)


def _norm(config: ImageCNN.Config, width: int) -> nn.Module:
    if config.norm == "batch":
        return nn.BatchNorm2d(width)
    groups = 1 if config.norm == "layer" or width % 16 else width // 16
    return nn.GroupNorm(groups, width)


def _to_tokens(features: Tensor) -> Tokens:
    """[B, C, H, W] to tokens [B, H * W, C]; a view where memory is channels-last."""
    B, C, H, W = features.shape
    values = features.permute(0, 2, 3, 1).reshape(B, H * W, C)
    return Tokens(values, Grid.regular(B, (H, W), device=features.device))


def _to_map(tokens: Tokens) -> Tensor:
    """The inverse of `_to_tokens`, in channels-last memory."""
    shape = tokens.grid.shape
    assert shape is not None, "a convolutional encoder keeps every token, so its grid stays regular"
    B, _, C = tokens.values.shape
    return tokens.values.reshape(B, *shape, C).permute(0, 3, 1, 2)
