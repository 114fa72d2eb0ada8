"""The one module whose ``forward(batch)`` returns the losses, so that DDP and FSDP see a single forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmrep.cached import CachedStep
from mmrep.checkpointing import checkpoint_blocks
from mmrep.config import Component, ConfigError
from mmrep.data.batch import Batch
from mmrep.embed.memo import Memo
from mmrep.embed.store import tower_digest
from mmrep.encoder import Encoder
from mmrep.model import Model, Tower
from mmrep.objectives.average import WeightAverage
from mmrep.objectives.objective import Guest, Objective
from mmrep.schedules import Clock
from mmrep.step import FieldViews, Step, idle
from mmrep.teacher import Teacher, TeacherConfig
from mmrep.training.collectives import world

logger = logging.getLogger(__name__)


class Root(nn.Module):
    """Model and objectives.

    Args:
        model: the towers.
        objectives: chosen objectives, from the recipe.
        fields: tower name by field.
        views: per field, its views.
        average: decay of a moving average of the model's weights; None = no average.
        memo: of the features of frozen towers; None = one in memory only.
        teacher: how the teacher follows, if some objective needs one.

    Attributes:
        clock: where the run is; the trainer sets it before each step.
        seen: of the last forward pass on this process, what `Step.computed` says, for who watches.
        guests: what `Objective.guests` of all objectives say.
        plateaus: of the same pass, by objective, the share of log K that is left of a loss over K codes or prototypes.
    """

    guests: dict[str, Guest]

    def __init__(
        self,
        model: Model,
        objectives: Sequence[Component],
        *,
        fields: Mapping[str, str],
        views: FieldViews,
        average: float | None = None,
        memo: Memo | None = None,
        teacher: TeacherConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.fields = dict(fields)
        self.views = views
        self.memo = memo or Memo()
        self.objectives = nn.ModuleDict()
        for chosen in objectives:
            name = chosen.config.name or chosen.type
            name = name if name not in self.objectives else f"{name}-{len(self.objectives)}"
            self.objectives[name] = chosen.build(model, self.fields)

        self.__dict__["guests"] = {  # seen, not owned: they are in no state and no optimizer
            name: guest
            for objective in self.objectives.values() for name, guest in cast(Objective, objective).guests().items()
        }  # fmt: skip
        self._rest()
        taught = [module for objective in self.objectives.values() for module in cast(Objective, objective).taught()]
        self.teacher = Teacher(teacher or TeacherConfig(), taught) if taught else None
        self.clock = Clock()
        self.average = None if average is None else WeightAverage(model, average)
        if self.average is not None:  # DDP would broadcast them in every forward pass; they are equal anyway
            names = [f"average.{name}" for name, _ in self.average.named_buffers()]
            self._ddp_params_and_buffers_to_ignore = names
        self.seen: dict[str, Tensor] = {}
        self.plateaus: dict[str, Tensor] = {}
        self._cached: CachedStep | None = None
        self._outside: dict[str, str] | None = None
        self._shares = torch.zeros(0, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Root:
        """Guests go where the module goes."""
        super()._apply(fn, recurse)
        for tower in self._outsiders().values():
            tower._apply(fn)
        return self

    def _outsiders(self) -> dict[str, Tower]:
        """All towers that are no part of it: guests, and those that objectives give inputs to themselves."""
        found = {name: guest.tower for name, guest in self.guests.items()}
        for own, objective in self.objectives.items():
            found |= {f"{own}.{name}": tower for name, tower in cast(Objective, objective).outsiders().items()}
        return found

    def encoders(self) -> dict[str, Encoder]:
        """By field, the encoder that reads it; those of guests among them."""
        own = {field: self.model.tower(tower).encoder for field, tower in self.fields.items()}
        return {**own, **{name: guest.tower.encoder for name, guest in self.guests.items()}}

    def columns(self) -> dict[str, str]:
        """By a guest's field, the column that it reads."""
        return {name: guest.column for name, guest in self.guests.items()}

    @property
    def raw(self) -> set[str]:
        """Fields whose inputs some objective needs even where their tower is frozen."""
        return {field for objective in self.objectives.values() for field in cast(Objective, objective).raw()}

    @property
    def attended(self) -> set[str]:
        """Fields of whose encodings some objective reads what tokens attended to."""
        return {field for objective in self.objectives.values() for field in cast(Objective, objective).attended()}

    def _rest(self) -> None:
        """Freeze what no objective reads: decay alone would move it, and processes would wait for its gradients."""
        asked, pooled = set[str](), set[str]()
        for objective in self.objectives.values():
            fields = cast(Objective, objective).embedded()
            asked |= {*self.fields} if fields is None else fields
            pooled |= cast(Objective, objective).pooled()
        for name in self.model.towers if self.objectives else ():
            tower = self.model.tower(name)
            own = {field for field, read_by in self.fields.items() if self.model.tower(read_by) is tower}
            resting = (
                [] if own & asked or name in asked - {*self.fields}  # a tower that an objective reads by itself
                else [tower.projector] if own & pooled
                else [tower.pool, tower.projector] if own & self.raw
                else [tower]
            )  # fmt: skip
            for part in resting:
                if any(p.requires_grad for p in part.parameters()):
                    logger.info("tower %s: no objective reads its %s, which rests", name, type(part).__name__)
                part.requires_grad_(False)

        reduced = {str(w) for objective in self.objectives.values() for w in cast(Objective, objective).reductions()}
        for width, reduction in self.model.reductions.items():
            if width not in reduced:
                reduction.requires_grad_(False)

    def fit(self, samples: Callable[[str], Iterable[Any]]) -> None:
        """Let every objective learn what must be known before the first step; see `Objective.fit`.

        A checkpoint that is read later brings what was learned then.
        """
        for objective in self.objectives.values():
            cast(Objective, objective).fit(samples)

    def checkpoint_encoders(self) -> None:
        """Compute the blocks of every encoder that trains again in the backward pass: see `mmrep.checkpointing`.

        Raises:
            ConfigError: none of them has blocks.
        """
        trained = {name: t for name in self.model.towers if not (t := self.model.tower(name)).frozen}
        without = [name for name, tower in trained.items() if not checkpoint_blocks(tower.encoder)]
        if len(without) == len(trained):
            raise ConfigError(["train.checkpointing: no encoder that trains has blocks that can be computed again"])
        for name in without:
            logger.warning("tower %s: no blocks that can be computed again; its activations are kept", name)

    def compile_encoders(self) -> None:
        """Compile every trained encoder's forward pass, in place: names in checkpoints stay as they are."""
        for name in self.model.towers:
            tower = self.model.tower(name)
            if not tower.frozen:
                tower.encoder.compile()

    def averaged(self) -> AbstractContextManager[None]:
        """The model with its averaged weights, if there is an average; it is what is evaluated and saved."""
        return nullcontext() if self.average is None else self.average.applied()

    def forward(
        self, batch: Batch, *, passes: int | None = None, replay: int | None = None, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Every objective's loss on one batch: ``{"loss": weighted sum, "<objective>/<part>": detached}``.

        A batch with parts takes several calls, each with its backward pass: one with ``passes``, which gives the loss
        of the objectives that couple samples, then one for each part, which gives the scalar ``"surrogate"`` to
        differentiate and this part's share of what the other objectives report. The sums over calls are the report.

        Args:
            batch: the batch.
            passes: number of parts, the largest of all processes.
            replay: which part.
            scale: what the loss was multiplied by before its backward pass (fp16).
        """
        options = {"fields": self.fields, "views": self.views, "world": world(), "memo": self.memo}
        options |= {"teacher": self.teacher, "clock": self.clock}
        options |= {"guests": {name: guest.tower for name, guest in self.guests.items()}}
        options |= {"attended": self.attended}
        if replay is not None:
            return self._replay(replay, scale)
        if passes is None:
            step, scopes = Step(self.model, batch, **options), ("batch", "sample")
        else:
            self._cached = step = CachedStep(self.model, batch, passes=passes, **options)
            self._shares, scopes = self._shares_of_parts(step), ("batch",)
        report = self._report(step, self._of_scope(*scopes))
        self.seen, self.plateaus = step.computed(), _plateaus(report)
        return report

    def _report(self, step: Step, objectives: Mapping[str, Objective]) -> dict[str, Tensor]:
        report: dict[str, Tensor] = {}
        total = idle(self.model.temperatures)  # one that no objective names must not leave a reduction incomplete
        for name, objective in objectives.items():
            out = objective(step)
            weighted = objective.config.weight * out.pop("loss")
            total = total + weighted
            report[f"{name}/loss"] = weighted.detach()
            report.update({f"{name}/{part}": value.detach() for part, value in out.items()})
        return {"loss": total, **report}

    def _replay(self, number: int, scale: float) -> dict[str, Tensor]:
        cached = self._cached
        assert cached is not None, "the pass over the whole batch comes first"
        step, surrogate = cached.replay(number, scale)
        report: dict[str, Tensor] = {"loss": torch.zeros((), device=self.model.device)}
        for column, (name, objective) in enumerate(self._of_scope("sample").items()):
            part = self._report(step, {name: objective})
            share = float(self._shares[number, column])
            surrogate = surrogate + share * part["loss"]
            for key, value in part.items():
                report[key] = report[key] + share * value.detach() if key in report else share * value.detach()
        self.seen = self.seen or step.computed()  # of no objective over the whole batch: those of one part
        for key, value in _plateaus(report).items():
            self.plateaus[key] = self.plateaus.get(key, 0) + value
        if number == cached.passes - 1:  # what has its gradient already still takes part in this reduction
            surrogate = surrogate + idle(self)
            self._cached = None
        return {"surrogate": surrogate, **report}

    def _shares_of_parts(self, step: CachedStep) -> Tensor:
        """Share [passes, objectives of scope sample] of each part, over all processes, in the mean of the loss."""
        objectives = self._of_scope("sample").values()
        counts = [[objective.count(step.part(k)) for objective in objectives] for k in range(step.passes)]
        table = step.world.sum(torch.tensor(counts, device=self.model.device)).cpu().double()
        return table / table.sum(0).clamp_min(1)

    def _of_scope(self, *scopes: str) -> dict[str, Objective]:
        found = {name: cast(Objective, module) for name, module in self.objectives.items()}
        return {name: objective for name, objective in found.items() if objective.scope in scopes}

    def outside(self) -> dict[str, str]:
        """What the run depends on and no checkpoint holds: a digest of each tower of another model, by its name."""
        if self._outside is None:
            self._outside = {n: tower_digest(tower, projected=True) for n, tower in self._outsiders().items()}
        return self._outside

    def before_save(self) -> None:
        """Features of frozen towers are part of a run's state: rounded anew, a resumed run would not be the same."""
        self.memo.flush()

    def after_optimizer_step(self) -> None:
        """Temperature bounds, teachers, queues: once per optimizer step."""
        self.model.clamp_temperatures()
        for objective in self.objectives.values():
            cast(Objective, objective).after_optimizer_step()
        if self.teacher is not None:
            self.teacher.update(self.clock)
        if self.average is not None:
            self.average.update()


def _plateaus(report: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removesuffix("/plateau"): value for key, value in report.items() if key.endswith("/plateau")}
