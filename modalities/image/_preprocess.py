"""How a decoded picture becomes the network's input: size, channels and normalisation, as config and as functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field
from torch import Tensor

from mmrep.config import config, parse
from mmrep.encoder import BadSampleError
from mmrep.modalities.image.decode import MAX_PIXELS

Means = tuple[float, ...]
Deviations = tuple[Annotated[float, Field(gt=0)], ...]
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@config
class Preprocess:
    """How a decoded picture becomes the network's input. It is part of the encoder and saved with it.

    size: side of the square input, in pixels. resize: "crop" scales the shorter side to ``size / crop_share`` and cuts
    the centre (CLIP, ImageNet); "squash" scales both sides and distorts (SigLIP). crop_share: share of the side that
    the centre crop keeps. interpolation: always with anti-aliasing. channels: how many. bands: read channels as they
    are, each in its own range (satellite, medical), rather than as a picture for the eye; None = if there are not 3.
    mean, std: per channel; None = 0.5, of pixels in 0..1, which maps to -1..1 and presumes no data set. Of bands, they
    are in the unit of the data, and None = learned from the training pictures. background: colour behind transparency,
    0..255. max_pixels: larger pictures are refused unread. fast_resize: shrink big pictures roughly (in the JPEG
    decoder, by box averages) to at least twice the size before the exact resize: 2 to 6 times as fast for photographs,
    off by a grey level or so.
    """

    size: Annotated[int, Field(ge=1)] = 32
    resize: Literal["crop", "squash"] = "crop"
    crop_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    channels: Annotated[int, Field(ge=1)] = 3
    bands: bool | None = None
    mean: Means | None = None
    std: Deviations | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    fast_resize: bool = True

    def __post_init__(self) -> None:
        check_channels(self)


@config
class Overrides:
    """Preprocessing of an encoder that brings its own; fields as in `Preprocess`, None = as the model was trained.

    ``fast_resize`` is off unless asked for, so that a pretrained model sees exactly what it was trained on.
    """

    size: Annotated[int, Field(ge=1)] | None = None
    resize: Literal["crop", "squash"] | None = None
    crop_share: Annotated[float, Field(gt=0, le=1)] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    channels: Annotated[int, Field(ge=1)] = 3
    bands: bool | None = None
    mean: Means | None = None
    std: Deviations | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    fast_resize: bool = False

    def __post_init__(self) -> None:
        check_channels(self)

    def over(self, own: Mapping[str, Any], name: str) -> Preprocess:
        """Lay the fields that are set over ``own``, the preprocessing that the model called ``name`` brings.

        Its mean and deviation mean nothing to bands in another unit: those are given or learned.

        Raises:
            ConfigError: the model's own preprocessing is of a kind that `Preprocess` cannot do.
        """
        chosen = {f.name: getattr(self, f.name) for f in dataclasses.fields(Preprocess)}
        merged = {**own, **({"mean": None, "std": None} if has_bands(self) else {})}
        merged.update((key, value) for key, value in chosen.items() if value is not None)
        return parse(Preprocess, merged, f"preprocessing of {name}")


def has_bands(how: Preprocess | Overrides) -> bool:
    """Whether pictures are read as bands in their own range, rather than as RGB for the eye."""
    return how.channels != 3 if how.bands is None else how.bands


def check_channels(how: Preprocess | Overrides) -> None:
    """The rules between channels, bands, mean and std.

    Raises:
        ValueError: one of them is broken.
    """
    if not has_bands(how) and how.channels != 3:
        raise ValueError(f"bands: a picture for the eye has 3 channels, and channels={how.channels}")
    if has_bands(how) and (how.mean is None) != (how.std is None):
        raise ValueError("mean, std: give both, or neither to learn both from the training pictures")
    if has_bands(how) and how.interpolation == "lanczos":
        raise ValueError("interpolation: 'lanczos' is for 8-bit pictures; bands have bilinear, bicubic and nearest")
    for name, values in (("mean", how.mean), ("std", how.std)):
        if values is not None and len(values) != how.channels:
            raise ValueError(f"{name}: {len(values)} values for channels={how.channels}")


def fit_square(image: Image.Image, how: Preprocess, chosen: int | None = None) -> Image.Image:
    """Resize ``image`` to a square of ``how.size``; an image of that size comes back as it is.

    Roundings are torchvision's (``Resize``, then ``CenterCrop``), so that pretrained encoders see what they were
    trained on.

    Args:
        image: the picture.
        how: the preprocessing.
        chosen: a view has chosen what is seen: make it a square of this side and cut nothing off.

    Raises:
        BadSampleError: it is so long and thin that the resized picture would exceed ``how.max_pixels``.
    """
    size, (width, height) = chosen or how.size, resized(*image.size, how, chosen)
    if (width, height) != image.size:
        gap = 3.0 if how.fast_resize else None
        image = image.resize((width, height), FILTERS[how.interpolation], reducing_gap=gap)
    if (width, height) == (size, size):
        return image
    left, top = (round((edge - size) / 2) for edge in (width, height))
    return image.crop((left, top, left + size, top + size))


def resized(width: int, height: int, how: Preprocess, chosen: int | None) -> tuple[int, int]:
    """Width and height before the centre is cut out; see `fit_square`."""
    if chosen is not None:
        return chosen, chosen
    side = math.floor(how.size / how.crop_share)
    if how.resize == "squash":
        return side, side
    short = min(width, height)
    wide, high = (side if edge == short else int(side * edge / short) for edge in (width, height))
    if wide * high > how.max_pixels:
        raise BadSampleError(
            "extreme shape", f"{width} x {height} pixels, which resized to {side} on the shorter side is too large"
        )
    return wide, high


def fit_bands(pixels: Tensor, how: Preprocess, chosen: int | None = None) -> Tensor:
    """`fit_square` for float32 [C, H, W]: torchvision's tensor operations with the same roundings."""
    from torchvision.transforms.v2 import functional as F

    size, (width, height) = chosen or how.size, resized(pixels.shape[2], pixels.shape[1], how, chosen)
    if (height, width) != tuple(pixels.shape[1:]):
        pixels = F.resize(pixels, [height, width], F.InterpolationMode(how.interpolation), antialias=True)
    left, top = (round((edge - size) / 2) for edge in (width, height))
    return pixels[:, top : top + size, left : left + size]
