"""Codes of what earlier codes leave over: residual vector quantisation of the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.model import Tower
from mmrep.targets._codebook import Codebook, Figures, spread
from mmrep.targets.random_projection import seen
from mmrep.targets.target import Target
from mmrep.tokens import Content
from mmrep.world import LocalWorld, World

if TYPE_CHECKING:
    from mmrep.step import Step


@config
class ResidualCodesConfig:
    """codebooks: how often the rest is quantised again. codes: in each. decay: see ``online-codes``.

    settle: see ``random-projection``.
    """

    codebooks: Annotated[int, Field(ge=1)] = 8
    codes: Annotated[int, Field(ge=2)] = 1024
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    settle: Annotated[int, Field(ge=1)] = 100


class ResidualCodes(Target):
    """MuQ's tokens (Zhu et al. 2025, arXiv:2501.01108, section 3): code c is the nearest to what codes 1..c-1 leave.

    There the codebooks are trained beforehand, behind a linear map; here they are moving averages that are learned on
    the way, on the standardised content itself.
    """

    Config = ResidualCodesConfig
    losses = ("cross-entropy",)

    def __init__(self, config: ResidualCodesConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        self.figures = Figures(tower, config.settle)
        self.width, self.choices = config.codebooks * config.codes, config.codes
        books = [Codebook(config.codes, self.figures.width, config.decay) for _ in range(config.codebooks)]
        self.codebooks = nn.ModuleList(books)
        self.world: World = LocalWorld()
        self._parts: dict[str, Tensor] = {}

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`: codes int64 [B, N, codebooks]."""
        self.world = step.world
        values, rows, content = self.figures(step, field, view)
        codes, rest = self._quantise(values)
        left = rest.square().sum() / values.square().sum().clamp_min(1e-12)
        used = torch.stack([cast(Codebook, book).used for book in self.codebooks]).mean()
        self._parts = {"left": left, "perplexity": used}
        codes = spread(codes, rows)
        return Content(codes, seen(content, codes), cast(ResidualCodesConfig, self.config).codes)

    def absent(self, step: Step) -> None:
        """See `Target.absent`."""
        self.world = step.world
        self.figures.absent(step)
        self._quantise(cast(Codebook, self.codebooks[0]).codes[:0])

    def _quantise(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int64 [n, codebooks] of vectors [n, P], and what is left of these."""
        found: list[Tensor] = []
        for book in self.codebooks:
            chosen = book(rest, self.world)
            rest = rest - cast(Codebook, book).codes[chosen]
            found.append(chosen)
        return torch.stack(found, 1), rest

    def parts(self) -> dict[str, Tensor]:
        """See `Target.parts`: ``perplexity`` as of ``online-codes``; ``left``, the share of the energy not coded."""
        return self._parts

    def after_optimizer_step(self) -> None:
        """Move the codes."""
        for book in self.codebooks:
            cast(Codebook, book).update(self.world)
