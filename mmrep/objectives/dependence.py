"""Dependence on fixed representations: an embedding is shaped by what HOG or a finished encoder says of a sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import Component, ConfigError, Of, component, config
from mmrep.losses._views import ViewLoss
from mmrep.losses.distance_correlation import distance_correlation
from mmrep.model import Model
from mmrep.objectives.distill import TeacherSource, load_teachers
from mmrep.objectives.objective import Guest, Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step
from mmrep.targets.target import Target, look


@config
class Representation:
    """target: of ``targets``, what it says of each token. of: ``tokens`` side by side, or their ``mean``.

    weight: of one less the distance correlation with it.
    """

    target: Annotated[Component, Of("targets")]
    of: Literal["tokens", "mean"] = "tokens"
    weight: Annotated[float, Field(gt=0)] = 1.0


@config
class DependenceConfig(ObjectiveConfig):
    """field: whose embedding. views: its readings; the first is also what representations are made from.

    representations: made by targets, as for masked prediction. teachers: saved models, whose embeddings are further
    ones, each of weight 1. across: weight of one less the distance correlation of two views. loss: of ``view_losses``,
    of the same views: against collapse, and for their agreement.
    """

    field: str
    representations: list[Representation] = dataclasses.field(default_factory=list[Representation])
    teachers: list[TeacherSource] = dataclasses.field(default_factory=list[TeacherSource])
    views: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1)
    across: Annotated[float, Field(ge=0)] = 1.0
    loss: Annotated[Component, Of("view_losses")] = dataclasses.field(
        default_factory=lambda: component("view_losses", "vicreg", invariance=1.0, variance=1.0, covariance=0.04)
    )


class Dependence(Objective):
    """MV-MR (Kinakh et al. 2023, arXiv:2303.12130): distance correlation with fixed representations, and among views.

    ``loss + across * sum over pairs of views (1 - dCor(z_a, z_b)) + sum over representations r and views v of
    weight_r (1 - dCor(r, z_v)) / number of views``. Representations are of any width and scale, and have no gradient. A
    teacher reads its column without views. Samples that lack the field or a teacher's column take no part. All
    statistics are those of the samples of all processes: the batch must be large enough that distances mean something.
    """

    Config = DependenceConfig
    scope = "batch"

    def __init__(self, config: DependenceConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        self.loss = config.loss.build()
        problems = [f"objectives.dependence.{p}" for p in _problems(config, fields, cast(ViewLoss, self.loss))]
        if problems:
            raise ConfigError(problems)
        tower = model.tower(fields[config.field])
        self.__dict__["_tower"] = tower  # seen, not owned
        places = {f"objectives.dependence.teachers[{i}]": source for i, source in enumerate(config.teachers)}
        self.__dict__["_teachers"] = load_teachers(places)
        self.targets, self._widths = nn.ModuleList(), list[int]()
        for number, chosen in enumerate(config.representations):
            place = f"objectives.dependence.representations[{number}]"
            try:
                target: Target = chosen.target.build(tower)
            except ValueError as error:
                raise ConfigError([f"{place}.target: {error}"]) from error
            if target.choices:
                raise ConfigError([f"{place}.target: {chosen.target.type!r} gives codes, and distances need figures"])
            tokens = look(tower.encoder).tokens.values.shape[1] if chosen.of == "tokens" else 1
            self.targets.append(target)
            self._widths.append(tokens * target.width)

    def fit(self, samples: Callable[[str], Iterable[Any]]) -> None:
        """See `Objective.fit`: what targets learn."""
        for target in self.targets:
            cast(Target, target).fit(samples(cast(DependenceConfig, self.config).field))

    def taught(self) -> list[nn.Module]:
        """See `Objective.taught`."""
        return [module for target in self.targets for module in cast(Target, target).taught(self.__dict__["_tower"])]

    def embedded(self) -> set[str]:
        """See `Objective.embedded`."""
        return {cast(DependenceConfig, self.config).field}

    def raw(self) -> set[str]:
        """See `Objective.raw`: targets read the inputs."""
        config = cast(DependenceConfig, self.config)
        return {config.field} if config.representations else set()

    def guests(self) -> dict[str, Guest]:
        """See `Objective.guests`."""
        return cast("dict[str, Guest]", self.__dict__["_teachers"])

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts: ``across``, and ``dependence`` on each representation, by its place."""
        config = cast(DependenceConfig, self.config)
        names = list(self.guests())
        valid = torch.stack([step.present(name) for name in (config.field, *names)]).all(0)
        views = [step.embedding(config.field, view) for view in config.views]
        found = self.loss(views, valid=[valid] * len(views), world=step.world)
        total, rows = found.pop("loss"), [view[valid] for view in views]
        if config.across and len(rows) > 1:
            across = torch.stack([distance_correlation(*pair, world=step.world) for pair in combinations(rows, 2)])
            total, found["across"] = total + config.across * (1 - across).sum(), across.mean().detach()
        weights = [r.weight for r in config.representations] + [1.0] * len(names)
        fixed = [*self._made(step, valid), *(step.embedding(name)[valid] for name in names)]
        for number, (weight, values) in enumerate(zip(weights, fixed, strict=True)):
            values = values.detach().to(rows[0].dtype)
            dependence = torch.stack([distance_correlation(values, z, world=step.world) for z in rows]).mean()
            total, found[f"dependence-{number}"] = total + weight * (1 - dependence), dependence.detach()
        return {"loss": total, **found}

    def _made(self, step: Step, valid: Tensor) -> Iterator[Tensor]:
        """Of each target, [samples of ``valid``, width]."""
        config = cast(DependenceConfig, self.config)
        here = step.present(config.field)
        for chosen, target, width in zip(config.representations, self.targets, self._widths, strict=True):
            if not step.has(config.field):
                cast(Target, target).absent(step)
                yield torch.zeros(0, width, device=step.model.device)
                continue
            content = target(step, config.field, config.views[0])
            grid = step.tokens(config.field, config.views[0]).grid
            real = grid.valid & ~grid.special
            values: Tensor = content.values.masked_fill(~real[..., None], 0).float()
            if chosen.of == "mean":
                values = values.sum(1) / real.sum(1, keepdim=True).clamp_min(1)
            elif not bool(grid.valid.all()) or values.shape[1] * values.shape[2] != width:
                raise ConfigError([
                    f"objectives.dependence.representations: samples of {config.field!r} have different numbers of "
                    "tokens, which do not stand side by side; say `of: mean`"
                ])  # fmt: skip
            yield values.flatten(1)[valid[here]]

    def after_optimizer_step(self) -> None:
        """See `Objective.after_optimizer_step`."""
        cast(ViewLoss, self.loss).after_optimizer_step()
        for target in self.targets:
            cast(Target, target).after_optimizer_step()


def _problems(config: DependenceConfig, fields: dict[str, str], loss: ViewLoss) -> Iterator[str]:
    if config.field not in fields:
        yield f"field: unknown {config.field!r}{near(config.field, fields)} Fields: {', '.join(fields)}"
    if not config.representations and not config.teachers:
        yield "representations: none, and no teachers: name what the embedding is to depend on"
    if len(set(config.views)) < len(config.views):
        yield f"views: {list(config.views)} names one twice"
    if loss.paired and len(config.views) < 2:
        yield "views: the loss compares views, and there is one (vicreg: invariance: 0)"
