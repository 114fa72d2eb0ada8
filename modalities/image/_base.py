"""What every image encoder shares: reading, resizing and normalising a picture, and example pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmrep.encoder import Encoder
from mmrep.modalities.image._bands import read_bands
from mmrep.modalities.image._examples import band_examples, band_oddities, examples, oddities
from mmrep.modalities.image._normalization import FILE, learn, read, standardize, write
from mmrep.modalities.image._preprocess import Preprocess, fit_bands, fit_square, has_bands
from mmrep.modalities.image.decode import decode
from mmrep.tokens import Inputs
from mmrep.views import View


class ImageEncoder(Encoder):
    """Reads pictures; subclasses add ``tokenize`` and ``encode``.

    `prepare` gives ``{"pixels": uint8 [3, size, size]}``. A batch view may replace that by floats in 0..1, of another
    size too; `normalize` takes both, on the device. Of bands it gives float32 [C, size, size], standardised already: in
    the half precision that a network may run in, numbers such as 10 000 would lose their digits.

    Args:
        config: the encoder's config.
        files: see `Encoder`; it may hold a learned mean and deviation.
        preprocess: the preprocessing; may be the config itself.

    Attributes:
        preprocess: the preprocessing, mean and deviation filled in.
        bands: whether pictures are read as bands in their own range.

    Raises:
        ValueError: mean and deviation are to be learned, and were not.
    """

    modality = "image"

    def __init__(self, config: Any, files: Path | None = None, *, preprocess: Preprocess) -> None:
        super().__init__(config, files)
        self.bands = has_bands(preprocess)
        self.preprocess = _filled(preprocess, files)
        C = preprocess.channels
        # Not in the state: they belong to the config, and a checkpoint that disagreed with it would win silently.
        mean, std = ((0.0,) * C, (1.0,) * C) if self.bands else self.statistics
        self.register_buffer("mean", torch.tensor(mean).view(1, C, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, C, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @classmethod
    def fit(cls, config: Any, samples: Iterable[Any], folder: Path) -> None:
        """Learn mean and deviation of bands from the training pictures, where the config leaves them open.

        Raises:
            ValueError: no picture could be read.
        """
        if has_bands(config) and config.mean is None:
            learn(samples, folder, channels=config.channels, max_pixels=config.max_pixels)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel, in the unit of `normalize`'s input or of the bands."""
        mean, std = self.preprocess.mean, self.preprocess.std
        assert mean is not None
        assert std is not None
        return mean, std

    def preview(self, raw: Any) -> Image.Image:
        """The picture as a person sees it, at its own size; the first three bands (or one), stretched, as a square."""
        how = self.preprocess
        if not self.bands:
            return decode(raw, background=how.background, max_pixels=how.max_pixels)
        pixels = read_bands(raw, how.channels, max_pixels=how.max_pixels)[: 3 if how.channels >= 3 else 1]
        shown = fit_bands(pixels, how)  # the quantiles of millions of pixels are not worth their sorting
        low, high = shown.flatten(1).quantile(torch.tensor([0.02, 0.98]), dim=1)[..., None, None]
        grey = ((pixels - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
        return Image.fromarray(grey.byte().expand(3, -1, -1).permute(1, 2, 0).numpy())

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One picture to ``{"pixels": uint8 [3, size, size]}``; see `decode` for what a picture may be.

        ``size`` is that of a view that has one (a crop), else of the preprocessing. Bands: float32 [C, size, size],
        see `read_bands`; a view is given float32 [C, H, W] in the unit of the data.

        Raises:
            BadSampleError: the picture cannot be read.
        """
        how = self.preprocess
        chosen = chosen_size(view, how.size)
        if self.bands:
            pixels = read_bands(raw, how.channels, max_pixels=how.max_pixels)
            pixels = pixels if view is None else view.sample(pixels, seed)
            return {"pixels": standardize(self.fitted(pixels, chosen), *self.statistics)}
        # A view that looks at the decoded picture gets all of it.
        looks = view is not None and type(view).sample is not View.sample
        at_least = self.enough() if how.fast_resize and not looks else None
        image = decode(raw, background=how.background, max_pixels=how.max_pixels, at_least=at_least)
        if view is not None:
            image = view.sample(image, seed)
        pixels = np.array(self.fitted(image, chosen))
        return {"pixels": torch.from_numpy(pixels).permute(2, 0, 1).contiguous()}

    def fitted(self, picture: Any, chosen: int | None) -> Any:
        """A decoded picture (PIL, or bands float32 [C, H, W]) at the size that the network reads, in the same form.

        Args:
            picture: the picture.
            chosen: the side of the square that a view wants; see `fit_square`.
        """
        if isinstance(picture, Image.Image):
            return fit_square(picture, self.preprocess, chosen)
        return fit_bands(picture, self.preprocess, chosen)

    def enough(self) -> int | None:
        """How many pixels of its shorter side a picture must keep while it is decoded; None: all of them."""
        return 2 * math.floor(self.preprocess.size / self.preprocess.crop_share)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Uint8 [B, 3, H, W], or float in 0..1, to standardised floats in the dtype of the weights; bands are so."""
        scaled = pixels.to(self.mean.dtype) / 255 if pixels.dtype == torch.uint8 else pixels.to(self.mean.dtype)
        return (scaled - self.mean) / self.std

    def examples(self, n: int, seed: int) -> list[Any]:
        """Pictures of odd sizes and several kinds: RGB, grey, RGBA, 16-bit grey array, palette, float tensor.

        Of bands: arrays and tensors of floats and 16-bit integers, and .npy files, in the range of mean and deviation.
        """
        return band_examples(n, seed, *self.statistics) if self.bands else examples(n, seed)

    def oddities(self, seed: int) -> dict[str, Any]:
        """Pictures of no and of extreme size, odd numbers and dtypes, damaged files and what is no picture at all."""
        return band_oddities(seed, *self.statistics) if self.bands else oddities(seed)

    def save_files(self, folder: Path) -> None:
        """Write mean and deviation, if they were learned."""
        if self.bands and self.config.mean is None:
            write(folder, *self.statistics)


def _filled(how: Preprocess, files: Path | None) -> Preprocess:
    """``how`` with mean and deviation."""
    if not has_bands(how):
        return dataclasses.replace(how, mean=how.mean or (0.5,) * 3, std=how.std or (0.5,) * 3)
    if how.mean is not None:
        return how
    learned = read(files)
    if learned is None:
        raise ValueError(
            f"mean and std of {how.channels} bands are learned from training pictures, and there is no learned {FILE}"
            f"{'' if files is None else f' in {files}'}: train through a recipe, call fit(config, pictures, folder) "
            "and pass files=folder, or set mean and std"
        )
    return dataclasses.replace(how, mean=learned[0], std=learned[1])


def chosen_size(view: View | None, size: int) -> int | None:
    """The side that a view wants its result to have (``size`` where it leaves that to the encoder), None if no wish."""
    wish: int | None = getattr(view, "size", 0)
    return size if wish is None else wish or None
