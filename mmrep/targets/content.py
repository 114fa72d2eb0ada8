"""The input itself: pixels, mel bands, samples, points, words."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mmrep.config import config
from mmrep.model import Tower
from mmrep.targets.target import Target, look
from mmrep.tokens import Content

if TYPE_CHECKING:
    from mmrep.step import Step


@config
class ContentTargetConfig:
    """normalize: subtract a token's own mean and divide by its own deviation (MAE, section 3, "normalized pixels")."""

    normalize: bool = False


class ContentTarget(Target):
    """What `Encoder.content` says: reconstruction (MAE, SimMIM, Point-MAE, VideoMAE, AudioMAE) or the hidden word."""

    Config = ContentTargetConfig

    def __init__(self, config: ContentTargetConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        content = tower.encoder.content(look(tower.encoder).inputs)
        self.vocabulary = content.vocabulary
        if content.vocabulary is not None:
            books = 1 if content.values.ndim == 2 else content.values.shape[-1]
            self.width, self.choices = content.vocabulary, content.vocabulary // books
            self.losses = ("cross-entropy", *(("sce", "cosine") if books == 1 else ()))
        elif content.points is not None:
            self.width, self.losses = content.values.shape[-1], ("chamfer",)
        else:
            self.width, self.losses = content.values.shape[-1], ("mse", "l1", "smooth-l1", "sce", "cosine")
        if config.normalize and self.losses[0] != "mse":
            raise ValueError(f"normalize: {tower.modality} tokens are no list of measured values")

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`."""
        return self.of(step.content(field, view))

    @torch.no_grad()
    def of(self, content: Content) -> Content:
        """The target that this content is."""
        if not cast(ContentTargetConfig, self.config).normalize:
            return content
        return replace(content, values=standardize(content.values, content.observed))


def standardize(values: Tensor, observed: Tensor | None = None) -> Tensor:
    """Each token [..., P] minus its mean, over its deviation: unbiased, 1e-6 added to the variance (as MAE's code)."""
    if observed is None:
        variance, mean = torch.var_mean(values, dim=-1, keepdim=True)
        return (values - mean) / (variance + 1e-6).sqrt()
    values, weight = values.masked_fill(~observed, 0), observed.to(values.dtype)
    count = weight.sum(-1, keepdim=True)
    mean = (values * weight).sum(-1, keepdim=True) / count.clamp_min(1)
    variance = ((values - mean).square() * weight).sum(-1, keepdim=True) / (count - 1).clamp_min(1)
    return (values - mean) / (variance + 1e-6).sqrt() * weight
