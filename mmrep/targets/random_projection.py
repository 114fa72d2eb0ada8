"""Codes of the input by a projection and a codebook that are random and never trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import config
from mmrep.model import Tower
from mmrep.targets._codebook import Figures, nearest, perplexity, spread
from mmrep.targets.target import Target
from mmrep.tokens import Content

if TYPE_CHECKING:
    from mmrep.step import Step


@config
class RandomProjectionConfig:
    """codebooks: independent pairs of projection and codebook; the loss is the mean over them.

    codes: in each codebook. dim: of the projection. settle: for so many batches the statistics that standardise the
    input are gathered; then they rest. Without standardised input most of it falls to few codes (section 3.1).
    """

    codebooks: Annotated[int, Field(ge=1)] = 1
    codes: Annotated[int, Field(ge=2)] = 8192
    dim: Annotated[int, Field(ge=1)] = 16
    settle: Annotated[int, Field(ge=1)] = 100


class RandomProjection(Target):
    """BEST-RQ (Chiu et al. 2022, arXiv:2202.01855, section 3.1): ``argmin_k || c_k - normed(A x) ||``.

    A is drawn by Xavier's rule, the codes c from a normal distribution and then scaled to length 1. Both are buffers.
    """

    Config = RandomProjectionConfig
    losses = ("cross-entropy",)

    def __init__(self, config: RandomProjectionConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        self.figures = Figures(tower, config.settle)
        self.width, self.choices = config.codebooks * config.codes, config.codes
        projection = torch.empty(config.codebooks, self.figures.width, config.dim)
        for matrix in projection:
            nn.init.xavier_uniform_(matrix)
        self.register_buffer("projection", projection)
        self.register_buffer("codebook", F.normalize(torch.randn(config.codebooks, config.codes, config.dim), dim=-1))
        self.projection: Tensor
        self.codebook: Tensor
        self._parts: dict[str, Tensor] = {}

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`: codes int64 [B, N, codebooks]."""
        config = cast(RandomProjectionConfig, self.config)
        values, rows, content = self.figures(step, field, view)
        with torch.autocast(values.device.type, enabled=False):
            projected = F.normalize(torch.einsum("np,cpd->cnd", values, self.projection.float()), dim=-1)
        found = [nearest(part, codes) for part, codes in zip(projected, self.codebook, strict=True)]
        counts = torch.stack([torch.bincount(chosen, minlength=config.codes) for chosen in found]).float()
        self._parts = {"perplexity": perplexity(counts / counts.sum(1, keepdim=True).clamp_min(1)).mean()}
        codes = spread(torch.stack(found, 1), rows)
        return Content(codes, seen(content, codes), config.codes)

    def absent(self, step: Step) -> None:
        """See `Target.absent`."""
        self.figures.absent(step)

    def parts(self) -> dict[str, Tensor]:
        """See `Target.parts`: ``perplexity``, how many codes of a codebook this batch uses."""
        return self._parts


def seen(content: Content, codes: Tensor) -> Tensor | None:
    """Whether anything of a token was observed, as the shape of its codes: bool [B, N, C]."""
    return None if content.observed is None else content.observed.any(-1, keepdim=True).expand_as(codes)
