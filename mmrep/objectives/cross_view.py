"""Two views that see a queue of earlier samples alike: SCT, for small sentence encoders without or with a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field as default
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrep.config import ConfigError, config
from mmrep.losses.cross_view import cross_view
from mmrep.model import Model
from mmrep.objectives._heads import MLP, Norm
from mmrep.objectives.distill import TeacherSource, load_teachers
from mmrep.objectives.objective import Guest, Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step


@config
class HeadConfig:
    """hidden: width between the two linear maps; None = ten times that of the embeddings. layers: linear maps."""

    hidden: Annotated[int, Field(ge=1)] | None = None
    layers: Annotated[int, Field(ge=1)] = 2
    norm: Norm = "none"


@config
class CrossViewConfig(ObjectiveConfig):
    """field: whose embeddings. views: two readings of it.

    queue: so many earlier samples, of each view, are compared with beside those of the batch. reference_temperature: of
    the similarities that are the target; temperature: of those that learn. head: between the embedding and the
    similarities of the learning side; null = none. teacher: a saved model whose embeddings are the reference and fill
    the queue, in place of the model's own; a head is then as wide as they are.
    """

    field: str
    views: Annotated[tuple[int, ...], Field(min_length=2, max_length=2)] = (0, 1)
    queue: Annotated[int, Field(ge=0)] = 65536
    reference_temperature: Annotated[float, Field(gt=0)] = 0.04
    temperature: Annotated[float, Field(gt=0)] = 0.05
    head: HeadConfig | None = default(default_factory=HeadConfig)
    teacher: TeacherSource | None = None


class CrossView(Objective):
    """The sum over both directions of the mean over samples, of all processes, of `mmrep.losses.cross_view`.

    SCT (Limkonchotiwat et al. 2023, arXiv:2311.03228): the similarities of a view's embedding to the samples of a
    queue, and of the batch, are the target of those of the other view's. The reference is the embedding itself as a
    constant; the learning side goes through a head. The queues begin empty and are in checkpoints. The head is not
    saved with the model.
    """

    Config = CrossViewConfig
    scope = "batch"

    def __init__(self, config: CrossViewConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems = [f"objectives.cross-view.{problem}" for problem in _problems(config, model, fields)]
        if problems:
            raise ConfigError(problems)
        named = {} if config.teacher is None else load_teachers({"objectives.cross-view.teacher": config.teacher})
        self.__dict__["_teachers"] = named  # frozen guests: not parameters of this module
        width = next((guest.tower.dim for guest in named.values()), model.dim)
        self.head = None
        if config.head is not None:
            hidden = config.head.hidden or 10 * model.dim
            self.head = MLP([model.dim, *[hidden] * (config.head.layers - 1), width], config.head.norm)
        elif width != model.dim:
            raise ConfigError([
                f"objectives.cross-view.head: the teacher's embeddings have {width} figures and the model's "
                f"{model.dim}; a head is needed between them"
            ])  # fmt: skip
        self.register_buffer("queue", torch.zeros(2, config.queue, width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.queue: Tensor
        self.filled: Tensor
        self._seen: list[Tensor] = []

    def guests(self) -> dict[str, Guest]:
        """See `Objective.guests`."""
        return cast("dict[str, Guest]", self.__dict__["_teachers"])

    def embedded(self) -> set[str]:
        """See `Objective.embedded`."""
        return {cast(CrossViewConfig, self.config).field}

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; part ``queue`` is how many earlier samples were compared with."""
        config = cast(CrossViewConfig, self.config)
        here = step.present(config.field)
        for name in self.guests():
            here = here & step.present(name)
        n = step.world.sum(here.sum()).clamp_min(1)
        embedded = [step.embedding(config.field, view)[here] for view in config.views]
        references = [x.detach() for x in embedded]
        for name in self.guests():
            references = [step.embedding(name)[here].detach().to(embedded[0].dtype)] * 2
        gathered = step.world.gather(torch.stack([F.normalize(x, dim=1) for x in references], 1)).transpose(0, 1)
        if self.training:
            self._seen.append(gathered.to(self.queue.dtype))
        total = embedded[0].sum() * 0 + embedded[1].sum() * 0
        for own, other in ((0, 1), (1, 0)):
            keys = torch.cat([self.queue[own, : int(self.filled)].to(gathered.dtype), gathered[own]])
            student = embedded[other] if self.head is None else self.head(embedded[other], step.world)
            if len(keys):
                each = cross_view(
                    references[own], student, keys,
                    reference_temperature=config.reference_temperature, temperature=config.temperature,
                )  # fmt: skip
                total = total + each.sum() * (step.world.size / n)
        return {"loss": total, "queue": self.filled.to(total.dtype)}

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """The newest samples stand in front of the queue; the oldest leave it."""
        for new in self._seen:
            kept = torch.cat([new, self.queue], 1)[:, : self.queue.shape[1]]
            self.filled.add_(new.shape[1]).clamp_(max=self.queue.shape[1])
            self.queue.copy_(kept)
        self._seen = []


def _problems(config: CrossViewConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
    if config.field not in fields:
        yield f"field: unknown {config.field!r}{near(config.field, fields)} Fields: {', '.join(fields)}"
    elif model.tower(fields[config.field]).frozen:
        yield f"field: tower {fields[config.field]!r} is frozen: it has no views to learn from"
    if config.views[0] == config.views[1]:
        yield f"views: {list(config.views)} is one view, which has nothing to be compared with"
