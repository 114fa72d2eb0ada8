"""Histograms of oriented gradients of each patch: what MaskFeat predicts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, cast

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

EPSILON = 1e-5
"""Under the root of the norm, squared, as in scikit-image."""


@config
class ImageHOGConfig:
    """bins: orientations from 0 to 180 degrees. cell: side of a histogram's square in pixels; None = the patch."""

    bins: Annotated[int, Field(ge=2)] = 9
    cell: Annotated[int, Field(ge=1)] | None = None


class ImageHOG(Target):
    """MaskFeat (Wei et al. 2021, arXiv:2112.09133, section 3.2): 9 orientations a cell and channel, of length 1.

    (Dalal and Triggs 2005.) A vector per patch: cells in raster order, in each the channels, in each the bins.
    Gradients are central differences, 0 at the border of the picture; each pixel votes for one bin with its magnitude;
    a block is one cell. Each channel has its own histogram.
    """

    Config = ImageHOGConfig
    losses = ("mse", "smooth-l1", "l1", "cosine")

    def __init__(self, config: ImageHOGConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        self.patch, channels = patch_of(tower.encoder, "image-hog")
        self.cell = config.cell or self.patch
        if self.patch % self.cell:
            raise ValueError(f"cell={self.cell} does not divide the patches of {self.patch} pixels")
        self.width = (self.patch // self.cell) ** 2 * channels * config.bins

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`: float32 [B, N, width]."""
        encoder = step.tower(field).encoder
        pixels = pixels_of(encoder, step.inputs(field, view)).float()
        bins = cast(ImageHOGConfig, self.config).bins
        histograms = hog(pixels, bins, self.cell)  # [B, C, bins, rows, columns] of cells
        flat = histograms.flatten(1, 2)
        return Content(per_patch(flat, self.patch // self.cell, step.tokens(field, view).grid))


def hog(pixels: Tensor, bins: int, cell: int) -> Tensor:
    """Float [B, C, H, W] to histograms of length 1, [B, C, bins, H / cell, W / cell]."""
    rows, columns = torch.zeros_like(pixels), torch.zeros_like(pixels)
    rows[:, :, 1:-1] = pixels[:, :, 2:] - pixels[:, :, :-2]
    columns[..., 1:-1] = pixels[..., 2:] - pixels[..., :-2]
    magnitude = torch.hypot(rows, columns)
    angle = torch.atan2(rows, columns).remainder(math.pi)
    chosen = (angle * (bins / math.pi)).long().clamp(max=bins - 1)
    votes = F.one_hot(chosen, bins).movedim(-1, 2).to(pixels.dtype) * magnitude[:, :, None]
    sums = F.avg_pool2d(votes.flatten(0, 1), cell).unflatten(0, votes.shape[:2])
    return sums / (sums.square().sum(2, keepdim=True) + EPSILON**2).sqrt()
