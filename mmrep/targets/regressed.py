"""A latent that is predicted, aligned with what the encoder makes of the hidden tokens, and read by a decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.blocks import Transformer
from mmrep.config import Component, Of, config
from mmrep.losses.tokenwise import LOSSES
from mmrep.model import Tower
from mmrep.predictors.predictor import sincos, take
from mmrep.targets.target import Reading, Target
from mmrep.tokens import Content

if TYPE_CHECKING:
    from mmrep.step import Step


@config
class RegressedConfig:
    """of: the target that the decoder is to say. loss: by name; None = its first. alignment: weight of the distance
    of the latents. depth, heads: of the decoder, which is as wide as the encoder.
    """

    of: Annotated[Component, Of("targets")]
    loss: str | None = None
    alignment: Annotated[float, Field(ge=0)] = 2.0
    depth: Annotated[int, Field(ge=1)] = 1
    heads: Annotated[int, Field(ge=1)] = 4


class Regressed(Target):
    """CAE (Chen et al. 2022, arXiv:2202.03026, section 3): ``loss(decoder(z), of) + alignment * mean|z - sg f|^2``.

    z is what the predictor says of the hidden tokens, a vector of the encoder's width; f what the encoder itself makes
    of them when it reads nothing else. The decoder reads z and positions, and nothing of what is visible: all that it
    knows of a picture has gone through the latents. The predictor of the paper is ``cross-attention`` with ``attend:
    all``.
    """

    Config = RegressedConfig
    losses = ("own",)

    def __init__(self, config: RegressedConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        self.inner: Target = config.of.build(tower)
        chosen = config.loss or self.inner.losses[0]
        if chosen not in self.inner.losses or chosen not in LOSSES:
            known = ", ".join(name for name in self.inner.losses if name in LOSSES) or "none"
            raise ValueError(f"target 'regressed': loss {chosen!r} does not fit {config.of.type!r}; losses: {known}")
        self.loss = LOSSES[chosen]
        D = self.width = tower.encoder.width
        if D % config.heads:
            raise ValueError(f"target 'regressed': heads={config.heads} does not divide the encoder's width {D}")
        self.decoder = Transformer(D, config.depth, config.heads)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, self.inner.width)
        self._parts: dict[str, Tensor] = {}

    def taught(self, tower: Tower) -> list[nn.Module]:
        """What the inner target needs."""
        return self.inner.taught(tower)

    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`: that of the inner target."""
        return self.inner(step, field, view)

    def distance(self, step: Step, predicted: Tensor, wanted: Content, index: Tensor, reading: Reading) -> Tensor:
        """See `Target.distance`."""
        tokens, encoder = step.tokens(reading.field, reading.view), step.tower(reading.field).encoder
        groups, valid = len(index) // max(len(tokens.values), 1), index >= 0
        with torch.no_grad():
            latent = encoder.encode(tokens.repeat(groups), index).tokens.values[:, -index.shape[1] :]
        apart = (predicted - latent.to(predicted.dtype)).square().mean(-1)
        places = sincos(tokens.grid.coords, self.width).to(predicted.dtype).repeat_interleave(groups, 0)
        everything = bool(valid.all())
        decoded, _ = self.decoder(predicted + take(places, index), None if everything else valid)
        said = self.head(self.norm(decoded))
        said = said if said.dtype == torch.float64 else said.float()
        values, observed = take(wanted.values.repeat_interleave(groups, 0), index), wanted.observed
        values = values.to(said.dtype) if values.is_floating_point() else values
        if observed is not None:
            observed = take(observed.repeat_interleave(groups, 0), index)[valid]
        each = torch.zeros_like(apart).masked_scatter(valid, self.loss(said[valid], values[valid], observed))
        count = valid.sum(1).clamp_min(1)
        decoding, alignment = (torch.where(valid, x, torch.zeros_like(x)).sum(1) / count for x in (each, apart))
        self._parts = {"decoding": decoding.detach().mean(), "alignment": alignment.detach().mean()}
        return decoding + cast(RegressedConfig, self.config).alignment * alignment

    def absent(self, step: Step) -> None:
        """See `Target.absent`."""
        self._parts = {}
        self.inner.absent(step)

    def parts(self) -> dict[str, Tensor]:
        """See `Target.parts`: those of the inner target, ``decoding`` and ``alignment``."""
        return {**self.inner.parts(), **self._parts}

    def after_optimizer_step(self) -> None:
        """See `Target.after_optimizer_step`."""
        self.inner.after_optimizer_step()
