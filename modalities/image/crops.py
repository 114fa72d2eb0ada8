"""Random crops of the picture at its own resolution, for multi-crop training (arXiv:2006.09882, arXiv:2104.14294).

In a recipe, two global and four local crops of each picture::

    views:
      image:
        - &global {type: image-crop, size: 32, scale: [0.4, 1.0], flip: 0.5}
        - *global
        - &local {type: image-crop, size: 16, scale: [0.05, 0.4], flip: 0.5, role: local}
        - *local
        - *local
        - *local
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.views.view import Params, View, uniform

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
_TRIES = 10  # torchvision's number of draws before it settles for a central crop
_COLOURS = ("brightness", "contrast", "saturation", "hue")


class ImageCrop(View):
    """One random resized crop of the decoded picture (Inception, arXiv:1409.4842), then flip, colours, blur, solarize.

    The operations are torchvision's, with its meanings and in BYOL's order (arXiv:2006.07733, appendix B): colour
    jitter in a random order, grayscale, blur, solarize. All but crop, flip and blur need an RGB picture. What is drawn
    is in ``Step.params``; see `parameters`.
    """

    @config
    class Config:
        """Ranges and probabilities; by default nothing but the crop and its flip.

        size: side of the result in pixels, which the encoder then leaves alone; None = the encoder's size. scale: share
        of the picture's area, lowest and highest. ratio: width over height of the crop before it is made square, lowest
        and highest, log-uniform. flip: probability of mirroring left-right. interpolation: always with anti-aliasing.
        brightness, contrast, saturation: factor in 1 - x .. 1 + x. hue: up to this share of a full turn either way.
        jitter: probability that these four act at all. grayscale: probability. blur: probability of a Gaussian blur.
        blur_sigma: its standard deviation in pixels of the result, lowest and highest. solarize: probability of
        inverting the values from 128 on. role: what the reading is for.
        """

        size: Annotated[int, Field(ge=1)] | None = None
        scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.08, 1.0)
        ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
        flip: Share = 0.5
        interpolation: Literal["bilinear", "bicubic"] = "bicubic"
        brightness: Share = 0.0
        contrast: Share = 0.0
        saturation: Share = 0.0
        hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
        jitter: Share = 1.0
        grayscale: Share = 0.0
        blur: Share = 0.0
        blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
        solarize: Share = 0.0
        role: Literal["global", "local", "context", "target", "corrupt"] = "global"

        def __post_init__(self) -> None:
            for name in ("scale", "ratio", "blur_sigma"):
                low, high = getattr(self, name)
                if low > high:
                    raise ValueError(f"{name}: the lowest, {low}, is above the highest, {high}")
            if self.blur and self.size is None:
                raise ValueError("blur: blur_sigma is in pixels of the result, so give its `size`")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config: ImageCrop.Config = config
        self.role = config.role
        self.size = config.size
        colours = [name for name in (*_COLOURS, "grayscale", "solarize") if getattr(config, name)]
        self._needs_rgb = ", ".join(colours)

    def sample(self, decoded: Image.Image | Tensor, seed: int) -> Image.Image | Tensor:
        """An RGB picture, or bands as a float tensor [C, H, W], to the crop.

        Raises:
            ValueError: colours are to change and the picture has bands instead of RGB.
        """
        return self.apply(decoded, self.parameters(decoded, seed))

    def parameters(self, decoded: Image.Image | Tensor, seed: int) -> Params:
        """What is drawn for a picture, a function of its size and the seed.

        Returns:
            - ``box`` float32 [4]: left, top, right, bottom of the crop in the upright original picture, in 0..1.
            - ``flip`` bool []: the crop is mirrored left-right.
            - ``jitter`` float32 [4]: factors of brightness, contrast and saturation, and the turn of hue in -0.5..0.5;
              (1, 1, 1, 0) changes nothing. ``order`` int64 [4]: in which order they act.
            - ``grayscale`` bool []; ``blur`` float32 []: sigma, 0 for none; ``solarize`` bool [].
        """
        c = self.config
        u = uniform(torch.tensor([seed]), 4 * _TRIES + 16)[0]
        box = self._box(*_size(decoded), u[: 4 * _TRIES].view(_TRIES, 4))
        u = u[4 * _TRIES :]
        reach = torch.tensor([c.brightness, c.contrast, c.saturation, c.hue])
        still = torch.tensor([1.0, 1.0, 1.0, 0.0])
        low, high = c.blur_sigma
        return {
            "box": box,
            "flip": u[0] < c.flip,
            "jitter": torch.where(u[1] < c.jitter, still + (2 * u[2:6] - 1) * reach, still),
            "order": u[6:10].argsort(),
            "grayscale": u[10] < c.grayscale,
            "blur": torch.where(u[11] < c.blur, low + (high - low) * u[12], 0.0),
            "solarize": u[13] < c.solarize,
        }

    def apply(self, decoded: Image.Image | Tensor, params: Params) -> Image.Image | Tensor:
        """Repeat a crop on another picture (a mask, another band) of the same size: see `parameters`."""
        from torchvision.transforms.v2 import functional as F

        if self._needs_rgb and not isinstance(decoded, Image.Image):
            raise ValueError(f"image-crop: {self._needs_rgb}: these change colours, and bands have none; leave them 0")
        width, height = _size(decoded)
        edges = params["box"].double() * torch.tensor([width, height, width, height])
        left, top, right, bottom = (int(edge) for edge in edges.round())
        image: Any = decoded
        image = F.crop(image, top, left, bottom - top, right - left)
        if self.size is not None:
            image = F.resize(image, [self.size, self.size], F.InterpolationMode(self.config.interpolation))
        if params["flip"]:
            image = F.horizontal_flip(image)
        for number in params["order"].tolist():
            value, change = float(params["jitter"][number]), _change(_COLOURS[number])
            if value != (0.0 if number == 3 else 1.0):
                image = change(image, value)
        if params["grayscale"]:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if params["blur"] > 0:
            sigma = float(params["blur"])
            reach = min(math.ceil(3 * sigma), min(_size(image)) - 1)  # the border is mirrored, so no wider than it is
            image = F.gaussian_blur(image, [2 * reach + 1] * 2, [sigma, sigma])
        if params["solarize"]:
            image = F.solarize(image, 128)
        return image

    def _box(self, width: int, height: int, u: Tensor) -> Tensor:
        """As ``RandomResizedCrop``: the first draw that fits, or the largest central crop of a fair ratio."""
        c = self.config
        area = width * height * (c.scale[0] + (c.scale[1] - c.scale[0]) * u[:, 0].double())
        low, high = math.log(c.ratio[0]), math.log(c.ratio[1])
        ratio = torch.exp(low + (high - low) * u[:, 1].double())
        widths, heights = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = ((widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)).nonzero()[:, 0].tolist()
        if fits:
            n = fits[0]
            w, h = int(widths[n]), int(heights[n])
            left, top = int(u[n, 2] * (width - w + 1)), int(u[n, 3] * (height - h + 1))
        else:
            shape = width / height
            w = width if shape <= c.ratio[1] else max(1, round(height * c.ratio[1]))
            h = height if shape >= c.ratio[0] else max(1, round(width / c.ratio[0]))
            left, top = (width - w) // 2, (height - h) // 2
        edges = torch.tensor([left, top, left + w, top + h], dtype=torch.float64)
        return (edges / torch.tensor([width, height, width, height])).float()


def _size(picture: Image.Image | Tensor) -> tuple[int, int]:
    """Width and height."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[-1], picture.shape[-2])


def _change(name: str) -> Callable[[Any, float], Any]:
    from torchvision.transforms.v2 import functional as F

    return getattr(F, f"adjust_{name}")
