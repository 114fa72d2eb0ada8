"""Distillation: a student field follows the embeddings of saved models, in points or in relations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import ConfigError, config
from mmrep.hub.fetch import ModelFolderError
from mmrep.hub.load import load
from mmrep.hub.start import model_folder
from mmrep.losses.distillation import pointwise, relational
from mmrep.model import Model, Tower
from mmrep.objectives.objective import Guest, Objective, ObjectiveConfig
from mmrep.registry import UnknownNameError, near
from mmrep.step import Step

Kind = Literal["cosine", "mse", "similarity", "similarity-mse", "distance", "angle", "rank"]


@config
class TeacherSource:
    """model: a saved model (folder, run folder or hub id). column: of the data, which it reads with its own
    preprocessing; it need not be one of ``data.fields``. tower: which of its towers; null = its only one.
    """

    model: str
    column: str
    tower: str | None = None


@config
class DistillConfig(ObjectiveConfig):
    """student: a field. view: which reading of it. teachers: one, or several whose embeddings are put side by side.

    losses: weight by name, see `mmrep.losses.distillation`; ``cosine`` and ``mse`` compare points, through a learned
    linear map where the widths differ, the others relations, for which widths do not matter. temperature, margin: of
    ``similarity`` and ``rank``. dims: in how many dimensions the student is to do the same work as in all of them: by
    the map of ``model.reductions``, trained with it and saved with the model, or where there is none by its first
    dimensions (Matryoshka).
    """

    student: str
    teachers: Annotated[list[TeacherSource], Field(min_length=1)]
    losses: Annotated[dict[Kind, Annotated[float, Field(gt=0)]], Field(min_length=1)] = field(
        default_factory=lambda: {"cosine": 1.0}
    )
    view: Annotated[int, Field(ge=0)] = 0
    dims: tuple[Annotated[int, Field(ge=2)], ...] = ()
    temperature: Annotated[float, Field(gt=0)] = 0.1
    margin: Annotated[float, Field(ge=0)] = 0.015


class Distill(Objective):
    """The weighted sum of losses between the student's embedding and the teachers', a mean over its widths.

    The target is the unit embeddings of all teachers side by side, again of unit length (Stella, Zhang et al. 2024,
    arXiv:2412.19048, which trains with cosine 10, similarity-mse 200 and rank 20). A teacher that reads another column
    than the student's is cross-modal distillation. Samples that lack a column take no part.

    A teacher reads the raw value without views, so that it answers once for each distinct input in a run. It is in
    neither the model nor the checkpoints: a run that is resumed needs it again. The maps are the objective's: they are
    in checkpoints and not in the saved model.
    """

    Config = DistillConfig
    scope = "batch"

    def __init__(self, config: DistillConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems = [f"objectives.distill.{problem}" for problem in _problems(config, model, fields)]
        if problems:
            raise ConfigError(problems)
        places = {f"objectives.distill.teachers[{i}]": source for i, source in enumerate(config.teachers)}
        self.__dict__["_teachers"] = load_teachers(places)  # frozen guests: not parameters of this module
        width = sum(guest.tower.dim for guest in self._guests().values())
        self.widths = tuple(dict.fromkeys([model.dim, *config.dims]))
        pointed = {"cosine", "mse"} & config.losses.keys()
        self.maps = nn.ModuleDict(
            {str(d): nn.Linear(d, width, bias=False) for d in self.widths if d != width and pointed}
        )

    def _guests(self) -> dict[str, Guest]:
        return cast("dict[str, Guest]", self.__dict__["_teachers"])

    def guests(self) -> dict[str, Guest]:
        """See `Objective.guests`."""
        return self._guests()

    def embedded(self) -> set[str]:
        """See `Objective.embedded`."""
        return {cast(DistillConfig, self.config).student}

    def reductions(self) -> set[int]:
        """See `Objective.reductions`."""
        return {*self.widths}

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; a part for each loss, before its weight."""
        config = cast(DistillConfig, self.config)
        names = list(self._guests())
        valid = step.present(config.student) & torch.stack([step.present(name) for name in names]).all(0)
        student = step.embedding(config.student, config.view)[valid]
        target = torch.cat([F.normalize(step.embedding(name)[valid], dim=1) for name in names], 1)
        target = F.normalize(target, dim=1).to(student.dtype)
        students = {w: student if w == step.model.dim else step.model.reduce(student, w, normalize=True)
                    for w in self.widths}  # fmt: skip
        total = torch.zeros((), device=step.model.device)
        parts: dict[str, Tensor] = {}
        for kind, weight in config.losses.items():
            each = [self._compare(kind, students[width], target, step) for width in self.widths]
            mean = torch.stack(each).mean()
            total, parts[kind] = total + weight * mean, mean.detach()
        return {"loss": total, **parts}

    def _compare(self, kind: Kind, student: Tensor, target: Tensor, step: Step) -> Tensor:
        config = cast(DistillConfig, self.config)
        if kind == "cosine" or kind == "mse":
            name = str(student.shape[1])
            mapped = self.maps[name](student) if name in self.maps else student
            return pointwise(mapped, target, kind, world=step.world)
        options = {"temperature": config.temperature, "margin": config.margin}
        return relational(student, target, kind, **options, world=step.world)


def load_teachers(sources: Mapping[str, TeacherSource]) -> dict[str, Guest]:
    """The teachers by a field name of their own; of each model only the towers that are asked are kept.

    Args:
        sources: by where in the recipe each is named, for errors.

    Raises:
        ConfigError: one cannot be loaded, or is there twice.
    """
    found: dict[str, Guest] = {}
    models: dict[str, Model] = {}
    for place, source in sources.items():
        try:
            if source.model not in models:
                models[source.model] = load(model_folder(source.model))
            model = models[source.model]
            tower = source.tower or (next(iter(model.towers)) if len(model.towers) == 1 else "")
            if not tower:
                raise ConfigError([f"{place}.tower: {source.model!r} has {', '.join(model.towers)}: say which"])
            chosen: Tower = model.tower(tower)
        except ModelFolderError as error:
            raise ConfigError([f"{place}.model: {error}"]) from error
        except UnknownNameError as error:
            raise ConfigError([f"{place}.tower: {error}"]) from error
        name = f"{source.column}@{source.model}#{tower}"
        if name in found:
            raise ConfigError([f"{place}: {source.model!r} reads {source.column!r} with this tower already"])
        found[name] = Guest(source.column, chosen.eval().requires_grad_(False))
    return found


def _problems(config: DistillConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
    if config.student not in fields:
        yield f"student: unknown {config.student!r}{near(config.student, fields)} Fields: {', '.join(fields)}"
    elif model.tower(fields[config.student]).config.frozen == "tower" and not {*config.dims} & {
        *model.config.reductions
    }:
        yield f"student: tower {fields[config.student]!r} is frozen whole: it has nothing to learn with"
    for width in config.dims:
        if width >= model.dim:
            yield f"dims: {width}, but the student has {model.dim}: name smaller ones, the whole is always compared"
