"""Gradients of each patch as ratios of averages, at several scales: what SAR-JEPA predicts of radar pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrep.config import config
from mmrep.modalities.image._patches import patch_of, per_patch, pixels_of
from mmrep.model import Tower
from mmrep.targets.target import Target
from mmrep.tokens import Content

if TYPE_CHECKING:
    from mmrep.step import Step


@config
class ImageGradientsConfig:
    """kernels: sides of the windows in pixels, odd. offset: added to both averages, of pixels in 0..1."""

    kernels: tuple[Annotated[int, Field(ge=3)], ...] = (5, 9, 13, 17)
    offset: Annotated[float, Field(gt=0)] = 1e-2

    def __post_init__(self) -> None:
        if not self.kernels or any(kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError(f"kernels={list(self.kernels)}: windows need a middle, so odd sides, and one at least")


class ImageGradients(Target):
    """SAR-JEPA (Li et al. 2023, arXiv:2311.15153, section 3): gradients that multiplicative speckle does not scale.

    Taken from there: the logarithm of the ratio of the averages on both sides of a pixel, horizontally and vertically,
    the length of that vector, windows of four sizes. A plain average over half-windows, an offset against division by
    zero, pictures continued by their border, and the mean of the channels as the one intensity are choices of this
    implementation. A vector per patch: its pixels in raster order, in each the scales.
    """

    Config = ImageGradientsConfig
    losses = ("mse", "smooth-l1", "l1")

    def __init__(self, config: ImageGradientsConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        self.patch, _ = patch_of(tower.encoder, "image-gradients")
        if cast(Any, tower.encoder).bands:
            raise ValueError("target 'image-gradients' takes ratios of intensities, and bands have no known zero")
        self.width = self.patch**2 * len(config.kernels)

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`: float32 [B, N, width]."""
        encoder: Any = step.tower(field).encoder
        # Ratios need intensities of 0..1: normalising is undone, whatever form the pixels had.
        pixels = (pixels_of(encoder, step.inputs(field, view)) * encoder.std + encoder.mean).float()
        intensity = pixels.mean(1, keepdim=True).clamp_min(0)
        config = cast(ImageGradientsConfig, self.config)
        scales = torch.cat([ratio_gradient(intensity, kernel, config.offset) for kernel in config.kernels], 1)
        return Content(per_patch(scales, self.patch, step.tokens(field, view).grid))


def ratio_gradient(intensity: Tensor, kernel: int, offset: float) -> Tensor:
    """``sqrt(log(left / right)^2 + log(above / below)^2)`` of averages of half-windows: [B, 1, H, W] to the same."""
    r = kernel // 2
    padded = F.pad(intensity, (r, r, r, r), mode="replicate")
    H, W = intensity.shape[-2:]
    beside = (F.avg_pool2d(padded, (kernel, r), stride=1) + offset).log()
    above = (F.avg_pool2d(padded, (r, kernel), stride=1) + offset).log()
    horizontal = beside[..., :W] - beside[..., r + 1 : r + 1 + W]
    vertical = above[..., :H, :] - above[..., r + 1 : r + 1 + H, :]
    return torch.hypot(horizontal, vertical)
