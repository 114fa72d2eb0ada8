"""What every image encoder shares: reading, resizing and normalising a picture, and example pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from mmrep.config import config, parse
from mmrep.encoder import BadSampleError, Encoder
from mmrep.modalities.image._examples import examples, oddities
from mmrep.modalities.image.decode import MAX_PIXELS, decode
from mmrep.tokens import Inputs
from mmrep.views import View

Triple = tuple[float, float, float]
_FILTERS = {
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
    the centre crop keeps. interpolation: always with anti-aliasing. mean, std: per channel, of pixels in 0..1; the
    default maps to -1..1 and presumes no data set. background: colour behind transparency, 0..255. max_pixels: larger
    pictures are refused unread. fast_resize: shrink big pictures roughly (in the JPEG decoder, by box averages) to at
    least twice the size before the exact resize: 2 to 6 times as fast for photographs, off by a grey level or so.
    """

    size: Annotated[int, Field(ge=1)] = 32
    resize: Literal["crop", "squash"] = "crop"
    crop_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: Triple = (0.5, 0.5, 0.5)
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (
        0.5,
        0.5,
        0.5,
    )
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    fast_resize: bool = True


@config
class Overrides:
    """Preprocessing of an encoder that brings its own; fields as in `Preprocess`, None = as the model was trained.

    ``fast_resize`` is off unless asked for, so that a pretrained model sees exactly what it was trained on.
    """

    size: Annotated[int, Field(ge=1)] | None = None
    resize: Literal["crop", "squash"] | None = None
    crop_share: Annotated[float, Field(gt=0, le=1)] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    fast_resize: bool = False

    def over(self, own: Mapping[str, Any], name: str) -> Preprocess:
        """Lay the fields that are set over ``own``, the preprocessing that the model called ``name`` brings.

        Raises:
            ConfigError: the model's own preprocessing is of a kind that `Preprocess` cannot do.
        """
        chosen = {f.name: getattr(self, f.name) for f in dataclasses.fields(Preprocess)}
        merged = {**own, **{key: value for key, value in chosen.items() if value is not None}}
        return parse(Preprocess, merged, f"preprocessing of {name}")


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
        image = image.resize((width, height), _FILTERS[how.interpolation], reducing_gap=gap)
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


def chosen_size(view: View | None, size: int) -> int | None:
    """The side that a view wants its result to have (``size`` where it leaves that to the encoder), None if no wish."""
    wish: int | None = getattr(view, "size", 0)
    return size if wish is None else wish or None


class ImageEncoder(Encoder):
    """Reads pictures; subclasses add ``tokenize`` and ``encode``.

    `prepare` gives ``{"pixels": uint8 [3, size, size]}``. A batch view may replace that by floats in 0..1, of another
    size too; `normalize` takes both, on the device.

    Args:
        config: the encoder's config.
        files: see `Encoder`.
        preprocess: the preprocessing; may be the config itself.
    """

    modality = "image"

    def __init__(self, config: Any, files: Path | None = None, *, preprocess: Preprocess) -> None:
        super().__init__(config, files)
        self.preprocess = preprocess
        # Not in the state: they belong to the config, and a checkpoint that disagreed with it would win silently.
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def preview(self, raw: Any) -> Image.Image:
        """The picture as a person sees it, at its own size."""
        return decode(raw, background=self.preprocess.background, max_pixels=self.preprocess.max_pixels)

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One picture to ``{"pixels": uint8 [3, size, size]}``; see `decode` for what a picture may be.

        ``size`` is that of a view that has one (a crop), else of the preprocessing.

        Raises:
            BadSampleError: the picture cannot be read.
        """
        how = self.preprocess
        # A view that looks at the decoded picture gets all of it; otherwise twice the final size is enough.
        looks = view is not None and type(view).sample is not View.sample
        at_least = 2 * math.floor(how.size / how.crop_share) if how.fast_resize and not looks else None
        image = decode(raw, background=how.background, max_pixels=how.max_pixels, at_least=at_least)
        if view is not None:
            image = view.sample(image, seed)
        pixels = np.array(fit_square(image, how, chosen_size(view, how.size)))
        return {"pixels": torch.from_numpy(pixels).permute(2, 0, 1).contiguous()}

    def normalize(self, pixels: Tensor) -> Tensor:
        """Uint8 [B, 3, H, W], or float in 0..1, to standardised floats in the dtype of the weights."""
        scaled = pixels.to(self.mean.dtype) / 255 if pixels.dtype == torch.uint8 else pixels.to(self.mean.dtype)
        return (scaled - self.mean) / self.std

    def examples(self, n: int, seed: int) -> list[Any]:
        """Pictures of odd sizes and several kinds: RGB, grey, RGBA, 16-bit grey array, palette, float tensor."""
        return examples(n, seed)

    def oddities(self, seed: int) -> dict[str, Any]:
        """Pictures of no and of extreme size, odd numbers and dtypes, damaged files and what is no picture at all."""
        return oddities(seed)
