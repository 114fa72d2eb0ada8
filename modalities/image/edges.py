"""The gradient map of each patch: what a second decoder paints in Uni4Eye."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
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
class ImageEdgesConfig:
    """No settings."""


class ImageEdges(Target):
    """Lengths of Sobel's gradients, as in Uni4Eye (Cai et al. 2022, arXiv:2203.04614, section 2.2).

    Of each channel of the normalised pixels; at the border the picture is continued by its last pixels. The kernels'
    sums of absolute weights are 8: a step of height 1 has a length of 4. A vector per patch: pixels in raster order,
    in each the channels.
    """

    Config = ImageEdgesConfig
    losses = ("mse", "l1", "smooth-l1")

    def __init__(self, config: ImageEdgesConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        self.patch, channels = patch_of(tower.encoder, "image-edges")
        self.width = self.patch**2 * channels

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`: float32 [B, N, width]."""
        pixels = pixels_of(step.tower(field).encoder, step.inputs(field, view)).float()
        return Content(per_patch(sobel(pixels), self.patch, step.tokens(field, view).grid))


def sobel(pixels: Tensor) -> Tensor:
    """Float [B, C, H, W] to the lengths of the gradients, of the same shape."""
    across = pixels.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([across, across.T])[:, None]
    flat = F.pad(pixels.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    gradients = F.conv2d(flat, kernels)
    return torch.hypot(gradients[:, 0], gradients[:, 1]).view_as(pixels)
