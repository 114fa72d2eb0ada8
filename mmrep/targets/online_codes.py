"""Clusters that are learned on the way: of the teacher's layers (DinoSR), or of the input (as HuBERT's first units)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.encoder import unsupported
from mmrep.model import Tower
from mmrep.targets._codebook import Codebook, Figures, spread
from mmrep.targets.random_projection import seen
from mmrep.targets.target import Target
from mmrep.targets.teacher import normalized
from mmrep.tokens import Content
from mmrep.world import LocalWorld, World

if TYPE_CHECKING:
    from mmrep.step import Step


@config
class OnlineCodesConfig:
    """layers: so many last layers of the teacher, each with a codebook of its own, or ``content``: of the input.

    codes: in each codebook. decay: share of the old code that stays in each optimizer step (a larger one suits
    ``content``, whose vectors do not move). settle: see ``random-projection``; only of content.
    """

    layers: Annotated[int, Field(ge=1)] | Literal["content"] = 8
    codes: Annotated[int, Field(ge=2)] = 256
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    settle: Annotated[int, Field(ge=1)] = 100


class OnlineCodes(Target):
    """DinoSR (Liu et al. 2023, arXiv:2305.10005, section 3.2): the nearest code of each top layer of the teacher.

    Layers are normalised over the tokens of a sample, and codes follow what is nearest to them (eq. 3 and 4). Of the
    content, these are the k-means units of HuBERT (arXiv:2106.07447, section II.A), found while the model trains.
    """

    Config = OnlineCodesConfig
    losses = ("cross-entropy",)

    def __init__(self, config: OnlineCodesConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        encoder = tower.encoder
        self.figures: Figures | None = None
        if config.layers == "content":
            self.figures = Figures(tower, config.settle)
            count, width = 1, self.figures.width
        else:
            count, width = config.layers, encoder.width
            if "layers" not in encoder.supports:
                raise ValueError(unsupported(encoder, "layers"))
            if count > encoder.depth:
                raise ValueError(f"layers: {count} of an encoder that has {encoder.depth}")
        self.count, self.choices, self.width = count, config.codes, count * config.codes
        self.codebooks = nn.ModuleList(Codebook(config.codes, width, config.decay) for _ in range(count))
        self.world: World = LocalWorld()

    def taught(self, tower: Tower) -> list[nn.Module]:
        """The encoder, unless the input is clustered."""
        return [tower.encoder] if self.figures is None else []

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`: codes int64 [B, N, layers]."""
        self.world = step.world
        if self.figures is not None:
            values, rows, content = self.figures(step, field, view)
            layers = [values]
        else:
            depth = step.tower(field).encoder.depth
            encoding = step.taught(field, view, tuple(range(depth - self.count + 1, depth + 1)))
            grid, content = encoding.tokens.grid, None
            rows = grid.valid & ~grid.special
            layers = [normalized(values.float(), rows, "instance")[rows] for values in encoding.layers]
        found = [book(values, step.world) for book, values in zip(self.codebooks, layers, strict=True)]
        codes = spread(torch.stack(found, 1), rows)
        vocabulary = cast(OnlineCodesConfig, self.config).codes
        return Content(codes, None if content is None else seen(content, codes), vocabulary)

    def absent(self, step: Step) -> None:
        """See `Target.absent`."""
        self.world = step.world
        if self.figures is not None:
            self.figures.absent(step)
        for book in self.codebooks:
            codes = cast(Codebook, book).codes
            book(codes[:0], step.world)

    def parts(self) -> dict[str, Tensor]:
        """See `Target.parts`: ``perplexity``, how many codes of a codebook this batch uses, on average."""
        return {"perplexity": torch.stack([cast(Codebook, book).used for book in self.codebooks]).mean()}

    def after_optimizer_step(self) -> None:
        """Move the codes."""
        for book in self.codebooks:
            cast(Codebook, book).update(self.world)
