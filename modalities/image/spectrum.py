"""The frequencies that a view took out of a picture: what masked frequency modelling predicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrep.config import ConfigError, config
from mmrep.modalities.image._patches import patch_of
from mmrep.model import Tower
from mmrep.targets.target import Reading, Target
from mmrep.tokens import Content

if TYPE_CHECKING:
    from mmrep.step import Step


@config
class ImageSpectrumConfig:
    """gamma: power of the distance of two complex numbers; the larger, the more does what is far off count."""

    gamma: Annotated[float, Field(gt=0)] = 1.0


class ImageSpectrum(Target):
    """MFM (Xie et al. 2022, arXiv:2206.07706, section 3.3): ``|F(predicted) - F(picture)|^gamma`` where removed.

    The predictor gives the pixels of every patch, in the order of the content; F is the orthonormal Fourier transform
    of the picture that they make, and the mean is over the frequencies that ``image-frequency`` removed from the view
    that is predicted from, and over the channels. In a recipe: ``mask: null``, and a clean ``target_view``.
    """

    Config = ImageSpectrumConfig
    losses = ("own",)

    def __init__(self, config: ImageSpectrumConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        self.patch, channels = patch_of(tower.encoder, "image-spectrum")
        self.width = channels * self.patch**2

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`: the normalised pixels of each patch."""
        return step.content(field, view)

    def distance(self, step: Step, predicted: Tensor, wanted: Content, index: Tensor, reading: Reading) -> Tensor:
        """See `Target.distance`.

        Raises:
            ConfigError: the view that is predicted from removed nothing, or not all patches are predicted.
        """
        params = step.params(reading.field, reading.view)
        if "removed" not in params:
            raise ConfigError([
                f"objectives.masked.target: 'image-spectrum' predicts what was removed from view {reading.view} of "
                f"{reading.field!r}, and none of its views is image-frequency"
            ])  # fmt: skip
        removed, patches = params["removed"], wanted.values[:, -index.shape[1] :]
        if removed.shape[1] * removed.shape[2] != index.shape[1] * self.patch**2:
            raise ConfigError(["objectives.masked: 'image-spectrum' needs every patch predicted; use mask: null"])
        missing = predicted - patches.to(predicted.dtype)  # the transform is linear
        error = F.fold(missing.mT, removed.shape[1:], self.patch, stride=self.patch)
        square = torch.view_as_real(torch.fft.fft2(error, norm="ortho")).square().sum(-1)
        # The gradient of a root at 0 is infinite.
        each = square.clamp_min(1e-12).pow(cast(ImageSpectrumConfig, self.config).gamma / 2)
        weight = removed[:, None].to(each.dtype)
        return (each * weight).sum((1, 2, 3)) / (weight.sum((1, 2, 3)) * each.shape[1]).clamp_min(1)
