"""Random geometry and colour for pictures, a whole batch at once on the device.

In a recipe::

    views: {image: [{type: image-augment, rotation: 15, flip: 0.5, brightness: 0.3}]}
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrep.config import config
from mmrep.tokens import Inputs
from mmrep.views.view import Params, View, uniform

Share = Annotated[float, Field(ge=0, le=1)]
_DRAWS = 18
# RGB to luma and two colour axes (NTSC's YIQ): hue is a rotation of the two, saturation their length.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = torch.linalg.inv(_YIQ)


class ImageAugment(View):
    """One random affine map of the plane and one of the colours per picture, then an optional erased rectangle.

    Every number is drawn from the sample's seed alone, so a picture is changed in the same way alone or in any batch.
    The map of the plane is torchvision's ``affine`` (rotation, scale, shear and translation about the centre); it all
    costs one bilinear resampling. The map of the colours is the product, in this order, of brightness, contrast
    (about the picture's mean luma), saturation, hue (a rotation in YIQ, which is linear, rather than in HSV) and
    grayscale; values are clipped once, at the end.
    """

    @config
    class Config:
        """Ranges; with every range at its neutral value the view changes nothing.

        rotation: up to so many degrees either way. scale: magnification, lowest and highest, log-uniform. translate: up
        to this share of width and height either way. shear: up to so many degrees either way, along each axis. flip:
        probability of mirroring left-right. brightness, contrast, saturation: factor in 1 - x .. 1 + x. hue: up to this
        share of a full turn either way. grayscale: probability. erase: probability of erasing one rectangle.
        erase_area: its share of the picture, lowest and highest. fill: what lies outside the picture and in the erased
        rectangle, RGB in 0..1; None repeats the border, and erases with mid-grey. role: what the reading is for.
        """

        rotation: Annotated[float, Field(ge=0, le=180)] = 10.0
        scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.85, 1.15)
        translate: Share = 0.08
        shear: Annotated[float, Field(ge=0, lt=90)] = 4.0
        flip: Share = 0.5
        brightness: Share = 0.2
        contrast: Share = 0.2
        saturation: Share = 0.2
        hue: Annotated[float, Field(ge=0, le=0.5)] = 0.02
        grayscale: Share = 0.0
        erase: Share = 0.0
        erase_area: tuple[Share, Share] = (0.02, 0.2)
        fill: tuple[Share, Share, Share] | None = (1.0, 1.0, 1.0)
        role: Literal["global", "local", "context", "target", "corrupt"] = "global"

        def __post_init__(self) -> None:
            for name in ("scale", "erase_area"):
                low, high = getattr(self, name)
                if low > high:
                    raise ValueError(f"{name}: the lowest, {low}, is above the highest, {high}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config: ImageAugment.Config = config
        self.role = config.role

    def batch(self, inputs: Inputs, seeds: Tensor) -> tuple[Inputs, Params]:
        """Change ``inputs["pixels"]``: uint8, or float in 0..1, [B, 3, H, W], to float32 in 0..1.

        Returns:
            The inputs, and the parameters that `apply` reproduces the change from:

            - ``angle`` [B], degrees; ``magnification`` [B]; ``translate`` [B, 2], x and y in pixels; ``shear`` [B, 2],
              degrees along x and y; ``flip`` bool [B], done before the rest.
            - ``matrix`` [B, 2, 3], float32: from output to input positions, x and y in -1..1, as
              `torch.nn.functional.affine_grid` takes it.
            - ``color`` [B, 3, 4]: new RGB = first three columns times old RGB, plus the last column.
            - ``erase`` [B, 4]: left, top, right, bottom in 0..1; all zero where nothing is erased.
        """
        if "pixels" not in inputs:
            raise ValueError("image-augment changes pictures of one shape, not patches: use image-crop with `size`")
        pixels = _as_float(inputs["pixels"])
        if pixels.shape[1] != 3:
            raise ValueError(
                f"image-augment changes RGB pictures, and this field has {pixels.shape[1]} channels: use image-crop"
            )
        u = uniform(seeds.to(pixels.device), _DRAWS)
        params = {**self._geometry(u, *pixels.shape[-2:]), "erase": self._rectangles(u)}
        warped = warp(pixels, params["matrix"], self.config.fill)
        params["color"] = self._colors(u, warped)
        return {**inputs, "pixels": self._finish(warped, params)}, params

    def apply(self, pixels: Tensor, params: Params) -> Tensor:
        """Repeat a change on other pictures (a mask, another field) of the same shape: [B, 3, H, W], float in 0..1."""
        return self._finish(warp(_as_float(pixels), params["matrix"], self.config.fill), params)

    def _finish(self, warped: Tensor, params: Params) -> Tensor:
        return finish(warped, params["color"], params["erase"] if self.config.erase else None, self.config.fill)

    def _geometry(self, u: Tensor, height: int, width: int) -> Params:
        c = self.config
        angle = _signed(u[:, 0]) * c.rotation
        low, high = math.log(c.scale[0]), math.log(c.scale[1])
        magnification = torch.exp(low + (high - low) * u[:, 1])
        size = torch.tensor([width, height], dtype=torch.float32, device=u.device)
        translate = _signed(u[:, 2:4]) * c.translate * size
        shear = _signed(u[:, 4:6]) * c.shear
        flip = u[:, 6] < c.flip
        matrix = output_to_input(angle, magnification, translate, shear, flip, size)
        return {
            "angle": angle,
            "magnification": magnification,
            "translate": translate,
            "shear": shear,
            "flip": flip,
            "matrix": matrix,
        }

    def _colors(self, u: Tensor, pixels: Tensor) -> Tensor:
        c = self.config
        rgb, yiq = _RGB.to(u.device), _YIQ.to(u.device)
        brightness, contrast, saturation = (
            1 + _signed(u[:, 7 + i]) * s for i, s in enumerate((c.brightness, c.contrast, c.saturation))
        )
        turn = _signed(u[:, 10]) * c.hue * 2 * math.pi
        saturation = torch.where(u[:, 11] < c.grayscale, 0.0, saturation)
        chroma = torch.zeros(len(u), 3, 3, device=u.device)
        chroma[:, 0, 0] = 1
        chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * turn.cos()
        chroma[:, 2, 1] = saturation * turn.sin()
        chroma[:, 1, 2] = -chroma[:, 2, 1]
        linear = rgb @ chroma @ yiq * (brightness * contrast)[:, None, None]
        luma = torch.einsum("c,bc->b", yiq[0], pixels.mean((2, 3))) * brightness
        # Contrast moves every channel by the same grey, which saturation and hue leave alone.
        offset = ((1 - contrast) * luma)[:, None, None].expand(-1, 3, 1)
        return torch.cat([linear, offset], dim=2)

    def _rectangles(self, u: Tensor) -> Tensor:
        c = self.config
        area = c.erase_area[0] + (c.erase_area[1] - c.erase_area[0]) * u[:, 13]
        ratio = torch.exp(_signed(u[:, 14]) * math.log(3.0))  # width over height from 1/3 to 3, as torchvision
        width, height = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
        left, top = u[:, 15] * (1 - width), u[:, 16] * (1 - height)
        boxes = torch.stack([left, top, left + width, top + height], dim=1)
        return torch.where(u[:, 12:13] < c.erase, boxes, 0.0)


def output_to_input(
    angle: Tensor, magnification: Tensor, translate: Tensor, shear: Tensor, flip: Tensor, size: Tensor
) -> Tensor:
    """The inverse of ``x -> T + R Shear Scale Flip x`` about the centre: [B, 2, 3], in units of half the picture.

    R Shear is torchvision's (``functional.affine``): with rotation a and shears p (x) and q (y), all in radians,
    ``[[c, -c tan p - sin a], [s, -s tan p + cos a]]`` where c = cos(a - q) / cos q and s = sin(a - q) / cos q.
    """
    a, p, q = torch.deg2rad(angle), torch.deg2rad(shear[:, 0]), torch.deg2rad(shear[:, 1])
    cos, sin = (a - q).cos() / q.cos(), (a - q).sin() / q.cos()
    m = torch.stack([cos, -cos * p.tan() - a.sin(), sin, -sin * p.tan() + a.cos()], 1).view(-1, 2, 2)
    m = m * magnification[:, None, None]
    m = torch.stack([torch.where(flip, -1.0, 1.0)[:, None] * m[:, :, 0], m[:, :, 1]], dim=2)
    inverse = torch.linalg.inv_ex(m).inverse  # invertible by construction; inv would wait for the device to say so
    shift = -inverse @ translate[:, :, None]
    return torch.cat([inverse * size[None, None, :] / size[None, :, None], shift * 2 / size[:, None]], dim=2)


def warp(pixels: Tensor, matrix: Tensor, fill: tuple[float, float, float] | None) -> Tensor:
    """Resample float [B, 3, H, W] bilinearly; outside is ``fill``, or the border repeated."""
    B, _, H, W = pixels.shape
    y, x = _centres(H, pixels.device) * 2 - 1, _centres(W, pixels.device) * 2 - 1
    plane = torch.stack([x.expand(H, W), y[:, None].expand(H, W)], dim=-1).view(1, H * W, 2).expand(B, -1, -1)
    # F.affine_grid is this product, at five times the cost.
    grid = torch.baddbmm(matrix[:, None, :, 2], plane, matrix[:, :, :2].mT).view(B, H, W, 2)
    if fill is None:
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    color = torch.tensor(fill, dtype=pixels.dtype, device=pixels.device).view(1, 3, 1, 1)
    return F.grid_sample(pixels - color, grid, padding_mode="zeros", align_corners=False).add_(color)


def finish(pixels: Tensor, color: Tensor, erase: Tensor | None, fill: tuple[float, float, float] | None) -> Tensor:
    """Map the colours, clip to 0..1 and erase the rectangles, if any."""
    out = torch.baddbmm(color[:, :, 3:], color[:, :, :3], pixels.flatten(2)).view_as(pixels).clamp_(0, 1)
    if erase is None:
        return out
    y, x = _centres(pixels.shape[2], pixels.device), _centres(pixels.shape[3], pixels.device)
    rows = (y >= erase[:, 1:2]) & (y < erase[:, 3:4])
    columns = (x >= erase[:, 0:1]) & (x < erase[:, 2:3])
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    blank = torch.tensor(fill or (0.5, 0.5, 0.5), dtype=out.dtype, device=out.device).view(1, 3, 1, 1)
    return torch.where(inside, blank, out)


def _centres(n: int, device: torch.device) -> Tensor:
    """Where the centres of n cells lie in 0..1."""
    return (torch.arange(n, device=device) + 0.5) / n


def _as_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def _signed(u: Tensor) -> Tensor:
    """From [0, 1) to [-1, 1)."""
    return 2 * u - 1
