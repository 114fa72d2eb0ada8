"""Tokens of the teacher: what an average of past encoders, which sees everything, makes of the hidden places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import config
from mmrep.encoder import unsupported
from mmrep.model import Tower
from mmrep.targets.target import Target
from mmrep.tokens import Content

if TYPE_CHECKING:
    from mmrep.step import Step


@config
class TeacherTargetConfig:
    """layers: the mean of so many last layers, each normalised first; None = the encoder's output.

    norm: of each of these layers, and ``final`` of their mean: ``layer`` (over the channels of a token), ``instance``
    (over the tokens of a sample, for each channel), or ``none``; without learned factors. I-JEPA: the output with
    ``layer``; data2vec: top layers with ``instance`` (or ``layer`` for speech), then ``final: layer``.
    """

    layers: Annotated[int, Field(ge=1)] | None = None
    norm: Literal["layer", "instance", "none"] = "layer"
    final: Literal["layer", "instance", "none"] = "none"


class TeacherTarget(Target):
    """The teacher's tokens of the unmasked field (I-JEPA, arXiv:2301.08243, section 3; data2vec, arXiv:2202.03555)."""

    Config = TeacherTargetConfig
    losses = ("smooth-l1", "mse", "l1", "cosine")

    def __init__(self, config: TeacherTargetConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        encoder = tower.encoder
        self.width = encoder.width
        if config.layers is not None:
            if "layers" not in encoder.supports:
                raise ValueError(unsupported(encoder, "layers"))
            if config.layers > encoder.depth:
                raise ValueError(f"layers: {config.layers} of an encoder that has {encoder.depth}")

    def taught(self, tower: Tower) -> list[nn.Module]:
        """The encoder."""
        return [tower.encoder]

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`."""
        config = cast(TeacherTargetConfig, self.config)
        depth = step.tower(field).encoder.depth
        layers = () if config.layers is None else tuple(range(depth - config.layers + 1, depth + 1))
        encoding = step.taught(field, view, layers)
        grid = encoding.tokens.grid
        chosen = encoding.layers if layers else (encoding.tokens.values,)
        counted = grid.valid & ~grid.special
        mean = torch.stack([normalized(values.float(), counted, config.norm) for values in chosen]).mean(0)
        return Content(normalized(mean, counted, config.final))


def normalized(values: Tensor, counted: Tensor, how: str) -> Tensor:
    """Tokens [B, N, D] normalised without learned factors; ``counted`` bool [B, N] are the tokens of a sample."""
    if how == "layer":
        return F.layer_norm(values, values.shape[-1:])
    if how == "instance":
        weight = counted.to(values.dtype)[..., None]
        count = weight.sum(1, keepdim=True).clamp_min(1)
        mean = (values * weight).sum(1, keepdim=True) / count
        variance = ((values - mean).square() * weight).sum(1, keepdim=True) / count
        return (values - mean) / (variance + 1e-5).sqrt()
    return values
