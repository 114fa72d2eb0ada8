"""A Hugging Face image processor, cut in two: what the loader does (resize, crop), and what the device does (scale)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmrep.encoder import BadSampleError
from mmrep.modalities.image._preprocess import Preprocess

_FILTERS: dict[int, Literal["nearest", "bilinear", "bicubic", "lanczos"]] = {  # by PIL's numbers
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of each channel, of pixels in 0..1."""
_TOLERANCE = 2e-4  # of normalised values; a grey level is 0.004 or more


class Reader:
    """Resizes and crops as the checkpoint's processor does; knows the mean and deviation that come after.

    Whether the two halves make the whole is tried on pictures when it is built. A processor that scales before it
    resizes (DINOv3's) gives floats; others give bytes.

    Args:
        processor: of transformers, of either backend.
        path: of the checkpoint, for messages.
        native: it gives the patches of a picture of its own shape (SigLIP 2).

    Attributes:
        floats: the pixels come as floats in 0..1, rather than as bytes.
        size: height and width of what it gives; None where that is the picture's affair.
        mean: of pixels in 0..1, per channel. std: likewise.

    Raises:
        ValueError: it does more than resize, crop, scale and normalise, or gives pictures of several sizes.
    """

    def __init__(self, processor: Any, path: str, *, native: bool) -> None:
        self.processor, self.native = processor, native
        self.floats, (self.mean, self.std) = self._found_out(path)
        wide, tall = (tuple(self(_probe(*size)).shape[1:]) for size in ((61, 23), (23, 61)))
        if not native and wide != tall:
            raise ValueError(
                f"path {path!r}: its image processor gives pictures of several sizes ({wide[0]} x {wide[1]} and "
                f"{tall[0]} x {tall[1]}), which cannot be batched: set do_center_crop, or a size of height and width, "
                "in its preprocessor_config.json"
            )
        self.size = None if native else wide

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture resized and cropped: uint8 or float32 [3, H, W]."""
        return self._read(image, self.floats)

    def preprocess(self, **fields: Any) -> Preprocess:
        """As our own encoders' preprocessing, for views that choose a size, and for who asks for mean and deviation."""
        resample = getattr(self.processor, "resample", 3)
        number = resample if isinstance(resample, int) else 3
        return Preprocess(
            size=min(self.size or (self.processor.patch_size,)), interpolation=_FILTERS.get(int(number), "bicubic"),
            mean=self.mean, std=self.std, fast_resize=False, **fields,
        )  # fmt: skip

    def check_shape(self, size: tuple[int, int], max_pixels: int) -> None:
        """Refuse a picture that would become huge before it is cropped.

        Raises:
            BadSampleError: ``extreme shape``.
        """
        asked = getattr(self.processor, "size", None)
        side = 0 if self.native or asked is None or asked.longest_edge else asked.shortest_edge or 0
        side = side / (getattr(self.processor, "crop_pct", None) or 1)
        short, long = sorted(size)
        if side * side * long / short > max_pixels:
            raise BadSampleError(
                "extreme shape", f"{size[0]} x {size[1]} pixels, resized to {side:.0f} on the shorter side, are many"
            )

    def normalize(self, pixels: Tensor) -> Tensor:
        """Uint8, or float in 0..1, [B, 3, H, W], to float32, in the order of the library's own arithmetic."""
        return _normalized(pixels, (self.mean, self.std))

    def _read(self, image: Image.Image, floats: bool) -> Tensor:
        twice = {"include_top": False} if hasattr(self.processor, "include_top") else {}  # EfficientNets' second norm
        made = self.processor(images=image, do_rescale=floats, do_normalize=False, return_tensors="pt", **twice)
        pixels = self._picture(made)
        if not floats:
            return pixels.to(torch.uint8)
        return (pixels / (255 * self._factor)).float()

    def _picture(self, made: Any) -> Tensor:
        pixels = made["pixel_values"][0]
        if not self.native:
            return pixels
        side, (rows, columns) = self.processor.patch_size, made["spatial_shapes"][0].tolist()
        cells = pixels[: rows * columns].view(rows, columns, side, side, -1)
        return cells.permute(4, 0, 2, 1, 3).reshape(-1, rows * side, columns * side)

    @property
    def _factor(self) -> float:
        return float(self.processor.rescale_factor) if self.processor.do_rescale else 1.0

    def _found_out(self, path: str) -> tuple[bool, Statistics]:
        """Whether pixels come as floats, and their mean and deviation."""
        probe = _probe(61, 47)
        whole = self._picture(self.processor(images=probe, return_tensors="pt"))
        for floats in (False, True):
            half = self._read(probe, floats)
            for statistics in (self._stated(), self._measured()):
                if half.shape == whole.shape and (_normalized(half, statistics) - whole).abs().max() < _TOLERANCE:
                    return floats, statistics
        raise ValueError(
            f"path {path!r}: its image processor ({type(self.processor).__name__}) does more than resize, crop, scale "
            "and normalise by channel, which is all that hf-image can divide between loader and device"
        )

    def _stated(self) -> Statistics:
        """Mean and deviation by the fields of the processor, for pixels in 0..1."""
        p, by = self.processor, 255 * self._factor
        mean, std = (p.image_mean, p.image_std) if p.do_normalize else (0.0, 1.0)
        mean, std = ((v,) * 3 if isinstance(v, (int, float)) else tuple(v) for v in (mean, std))
        return tuple(m / by for m in mean), tuple(s / by for s in std)

    def _measured(self) -> Statistics:
        """The same by what becomes of black and white: processors of EfficientNets shift, or normalise twice."""
        low, high = (
            self._picture(self.processor(images=Image.new("RGB", (64, 64), colour), return_tensors="pt"))
            .double()
            .amin((1, 2))
            for colour in ("black", "white")
        )
        std = 1 / (high - low)
        return tuple((-low * std).tolist()), tuple(std.tolist())


def _normalized(pixels: Tensor, statistics: Statistics) -> Tensor:
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in statistics)
    if pixels.dtype == torch.uint8:
        return (pixels.float() - mean * 255) / (std * 255)
    return (pixels.float() - mean) / std


def _probe(width: int, height: int) -> Image.Image:
    """A picture in which neighbours differ, made by arithmetic alone."""
    places = np.arange(width * height * 3, dtype=np.int64)
    return Image.fromarray((places * places * 7 % 251).astype(np.uint8).reshape(height, width, 3))
