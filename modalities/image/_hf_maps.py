"""Hugging Face networks whose last map is a grid: convolutional networks, Swin transformers and Hiera."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmrep.tokens import Encoding, Grid, Tokens


@dataclass(frozen=True)
class MapFamily:
    """How one architecture is read.

    Attributes:
        cls: name of the transformers class.
        pool: from the model, its tokens [B, N, D] and the same as a map [B, D, H, W] to the pooled vector [B, D].
        width: from the model to D.
        shape: from the config, and height and width of the picture, to rows and columns; None = as the map has them.
        special: leading tokens that are no place of the map.
        stages: the attribute of the model that is the list of its stages or blocks.
        absolute: positions are learned for one size, and the model is told where a picture has another.
    """

    cls: str
    pool: Callable[[Any, Tensor, Tensor], Tensor]
    width: Callable[[Any], int]
    shape: Callable[[Any, int, int], tuple[int, int]] | None = None
    special: int = 0
    stages: str = "encoder.stages"
    absolute: Callable[[Any], bool] = lambda config: False


def _last(model: Any) -> int:
    return model.config.hidden_sizes[-1]


def _pooler(model: Any, tokens: Tensor, maps: Tensor) -> Tensor:
    return maps.mean((2, 3)) if model.pooler is None else model.pooler(maps).flatten(1)


def _mean_normed(model: Any, tokens: Tensor, maps: Tensor) -> Tensor:
    return model.layernorm(maps.mean((2, 3)))


def _swin_shape(config: Any, height: int, width: int) -> tuple[int, int]:
    """Patches and the pairs that are merged are filled up at the border."""
    rows, columns = (math.ceil(side / config.patch_size) for side in (height, width))
    for _ in config.depths[1:]:
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    return rows, columns


def _swin(name: str) -> MapFamily:
    return MapFamily(
        cls=name,
        pool=lambda model, tokens, maps: tokens.mean(1),
        width=lambda model: model.num_features,
        shape=_swin_shape,
        stages="encoder.layers",
        absolute=lambda config: config.use_absolute_embeddings,
    )


def _convnext_shape(config: Any, height: int, width: int) -> tuple[int, int]:
    stride = 4 * 2 ** (len(config.hidden_sizes) - 1)
    return height // stride, width // stride


def _hiera_shape(config: Any, height: int, width: int) -> tuple[int, int]:
    """Stages pool within units, which must fill the picture."""
    sides: list[int] = []
    for side, stride, pooled in zip((height, width), config.patch_stride, config.query_stride, strict=True):
        unit = stride * pooled**config.num_query_pool
        if side % unit:
            raise ValueError(f"pictures of {height} x {width}: Hiera reads sides that are multiples of {unit}")
        sides.append(side // unit)
    return sides[0], sides[1]


MAPS = {
    "swin": _swin("SwinModel"),
    "swinv2": _swin("Swinv2Model"),
    "hiera": MapFamily(
        cls="HieraModel",
        pool=lambda model, tokens, maps: tokens.mean(1) if model.pooler is None else model.pooler(tokens),
        width=lambda model: model.num_features,
        shape=_hiera_shape,
        absolute=lambda config: True,
    ),
    "convnext": MapFamily(cls="ConvNextModel", pool=_mean_normed, width=_last),
    "convnextv2": MapFamily(cls="ConvNextV2Model", pool=_mean_normed, width=_last),
    "dinov3_convnext": MapFamily(
        cls="DINOv3ConvNextModel",
        pool=lambda model, tokens, maps: tokens[:, 0],
        width=_last,
        shape=_convnext_shape,
        stages="model.stages",
        special=1,
    ),
    "resnet": MapFamily(cls="ResNetModel", pool=_pooler, width=_last),
    "regnet": MapFamily(cls="RegNetModel", pool=_pooler, width=_last),
    "bit": MapFamily(cls="BitModel", pool=_pooler, width=_last),
    "efficientnet": MapFamily(
        cls="EfficientNetModel",
        pool=_pooler,
        width=lambda model: model.encoder.top_conv.out_channels,
        stages="encoder.blocks",
    ),
    "mobilenet_v2": MapFamily(
        cls="MobileNetV2Model",
        pool=_pooler,
        width=lambda model: model.conv_1x1.convolution.out_channels,
        stages="layer",
    ),
    "align_vision_model": MapFamily(
        cls="AlignVisionModel",
        pool=_pooler,
        width=lambda model: model.encoder.blocks[-1].projection.project_conv.out_channels,
        stages="encoder.blocks",
    ),
}
"""By ``model_type`` of the config of the vision part."""


class MapTrunk(nn.Module):
    """A network that runs whole in `tokenize`; `encode` only pools. It can neither drop tokens nor give layers.

    Args:
        model: the library's vision model.
        config: the config of the vision part.
        family: how it is read.
    """

    supports = frozenset({"tokens"})
    depth = 0
    patch = None
    native = False
    pooled_width = None

    def __init__(self, model: Any, config: Any, family: MapFamily) -> None:
        super().__init__()
        if config.model_type == "hiera":
            if config.num_query_pool != len(config.depths) - 1:
                raise ValueError(
                    "a Hiera whose last stages do not pool has its tokens in an order that is not known here"
                )
            if not getattr(config, "add_pooling_layer", True):
                model.pooler = None
        self.model, self.config, self.family = model, config, family
        self.width = family.width(model)
        size = getattr(config, "image_size", None)
        self.trained = (size, size) if isinstance(size, int) else tuple(size or ())

    def blocks(self) -> nn.ModuleList:
        """The stages of the network, or its blocks where it has none."""
        return self.model.get_submodule(self.family.stages)

    def tokenize(self, pixels: Tensor) -> Tokens:
        """Normalised pixels [B, 3, H, W] to the cells of the last map, in raster order, behind special tokens."""
        B, _, H, W = pixels.shape
        told = (
            {"interpolate_pos_encoding": True} if self.family.absolute(self.config) and (H, W) != self.trained else {}
        )
        some = pixels if B else pixels.new_zeros(1, *pixels.shape[1:])
        shape = None if self.family.shape is None else self.family.shape(self.config, H, W)
        values = self.model(some, return_dict=True, **told).last_hidden_state[:B]
        if shape is None:
            shape, values = tuple(values.shape[2:]), values.flatten(2).mT
        return Tokens(values, Grid.regular(B, shape, special=self.family.special, device=values.device))

    def encode(self, tokens: Tokens, keep: Tensor | None, layers: Sequence[int]) -> Encoding:
        """The pooled vector."""
        assert tokens.grid.shape is not None, "a network that cannot drop tokens keeps its regular grid"
        values = tokens.values
        maps = values[:, self.family.special :].mT.unflatten(2, tokens.grid.shape)
        if len(values):
            return Encoding(tokens, self.family.pool(self.model, values, maps))
        return Encoding(tokens, values.sum(1))

    def no_weight_decay(self) -> set[str]:
        """Learned positions of Swin transformers and Hiera, absolute and relative."""
        ends = ("position_embeddings", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}
