"""Codes of the input that are learned together with the encoder, through a Gumbel softmax."""

from __future__ import annotations

from dataclasses import field as default
from typing import TYPE_CHECKING, Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import config
from mmrep.data.sample import stable_hash
from mmrep.model import Tower
from mmrep.schedules import Schedule
from mmrep.step import idle
from mmrep.targets._codebook import perplexity
from mmrep.targets.target import Target
from mmrep.targets.teacher import normalized
from mmrep.tokens import Content
from mmrep.views.view import uniform

if TYPE_CHECKING:
    from mmrep.step import Step


@config
class GumbelCodesConfig:
    """groups, codes: one of so many codes is chosen in each group. dim: width of the chosen codes side by side.

    norm: of the tokens before that: ``instance`` (over the tokens of a sample, for each channel), or ``layer`` (over
    the channels of a token, as wav2vec 2.0): what all tokens have in common then counts too, and on real speech all of
    them fell to one code within ten steps. width: of what is predicted, a linear map of the codes. temperature: of the
    Gumbel softmax, and how it falls over the run (by default linearly to 0.5; wav2vec 2.0 has it fall exponentially).
    diversity: weight of the penalty on codes that are not used.
    """

    groups: Annotated[int, Field(ge=1)] = 2
    codes: Annotated[int, Field(ge=2)] = 320
    dim: Annotated[int, Field(ge=1)] = 256
    norm: Literal["instance", "layer"] = "instance"
    width: Annotated[int, Field(ge=1)] = 256
    temperature: Annotated[float, Field(gt=0)] = 2.0
    schedule: Schedule | None = default(default_factory=lambda: Schedule(shape="linear", end=0.5))
    diversity: Annotated[float, Field(ge=0)] = 0.1

    def __post_init__(self) -> None:
        if self.dim % self.groups:
            raise ValueError(f"groups={self.groups} does not divide dim={self.dim}")


class GumbelCodes(Target):
    """The quantiser of wav2vec 2.0 (Baevski et al. 2020, arXiv:2006.11477, section 2 and eq. 1 and 4).

    What is quantised are the tokens as they come from ``tokenize``, less their positions, normed without learned
    factors (as the features of wav2vec 2.0 are): of small tokens the noise would choose the codes. It has a gradient:
    the straight-through one of the chosen codes, and that of the diversity of the codes over all tokens of all
    processes (the paper: over the hidden ones; of micro-batches, over each).

    Attributes:
        chosen: of the last `forward`, which code of each group: int64 [B, N, groups].
    """

    Config = GumbelCodesConfig
    losses = ("contrastive",)

    def __init__(self, config: GumbelCodesConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        self.width = config.width
        self.logits = nn.Linear(tower.encoder.width, config.groups * config.codes)
        nn.init.normal_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)
        self.codebook = nn.Parameter(torch.rand(config.groups, config.codes, config.dim // config.groups))
        self.project = nn.Linear(config.dim, config.width)
        self.chosen: Tensor | None = None
        self._parts: dict[str, Tensor] = {}

    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`: vectors [B, N, width], with gradient."""
        config = cast(GumbelCodesConfig, self.config)
        tokens = step.tokens(field, view)
        values = tokens.values if tokens.positions is None else tokens.values - tokens.positions
        B, N = tokens.grid.valid.shape
        counted = tokens.grid.valid & ~tokens.grid.special
        logits = self.logits(normalized(values, counted, config.norm)).view(B, N, config.groups, config.codes)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        soft = logits.softmax(-1)
        self._penalise(step, soft[counted])
        if self.training:
            seeds = step.batch.seeds[step.present(field)] + stable_hash(field, view, "gumbel")
            noise = uniform(seeds, N * config.groups * config.codes).view(logits.shape).clamp_min(2.0**-25)
            temperature = step.clock.value(config.temperature, config.schedule)
            soft = ((logits - (-noise.log()).log()) / temperature).softmax(-1)
        self.chosen = best = soft.argmax(-1)
        hard = F.one_hot(best, config.codes).to(soft.dtype)
        chosen = hard + soft - soft.detach() if self.training else hard
        vectors = torch.einsum("bngk,gkd->bngd", chosen, self.codebook.to(chosen.dtype))
        return Content(self.project(vectors.flatten(2)))

    def absent(self, step: Step) -> None:
        """See `Target.absent`."""
        self._penalise(step, self.codebook.new_zeros(0, *self.codebook.shape[:2]) + idle(self))

    def _penalise(self, step: Step, shares: Tensor) -> None:
        """The penalty of shares [n, groups, codes] of codes, ``(GV - perplexity) / GV``."""
        config = cast(GumbelCodesConfig, self.config)
        count = step.world.sum(torch.tensor(float(len(shares)), device=shares.device))
        mean = step.world.sum(shares.sum(0)) / count.clamp_min(1)
        # Not xlogy: its gradient at a share of 0 is infinite.
        used = (-(mean * mean.clamp_min(1e-7).log()).sum(-1)).exp().sum()
        total = config.groups * config.codes
        penalty = torch.where(count > 0, (total - used) / total, torch.zeros_like(used))
        self._parts = {
            "loss": config.diversity * penalty,
            "diversity": penalty.detach(),
            "perplexity": perplexity(mean.detach()).mean(),
        }

    def parts(self) -> dict[str, Tensor]:
        """See `Target.parts`: ``loss``, ``diversity``, and ``perplexity``: the codes of a group that are in use."""
        return self._parts
