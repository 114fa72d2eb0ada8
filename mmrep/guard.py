"""A guard on what should not be forgotten: a reference evaluation before and during the run, which it can end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import torch
import torch.distributed as dist
from pydantic import Field

from mmrep.config import ConfigError, config
from mmrep.monitor import figures_of
from mmrep.objectives.root import Root
from mmrep.registry import near
from mmrep.results import Results
from mmrep.training.collectives import world
from mmrep.training.contracts import Callback
from mmrep.training.errors import GuardError
from mmrep.training.trainer import Trainer

if TYPE_CHECKING:
    from mmrep.run import Run


@config
class GuardConfig:
    """evaluation: one of the recipe's, of what is to be kept. figure: of its rows, as ``accuracy``; more is better.

    direction: of a retrieval; null = the worst of all. floor: least figure. drop: how much less than before the first
    step it may be, as 0.05. One of the two is given, or both. The evaluation runs before the first step and every
    ``train.eval_every``.
    """

    evaluation: str
    figure: str
    direction: str | None = None
    floor: float | None = None
    drop: Annotated[float, Field(ge=0)] | None = None

    def __post_init__(self) -> None:
        if self.floor is None and self.drop is None:
            raise ValueError("guard: give a floor, or how large a drop is allowed")


class Guard(Callback):
    """Runs the evaluation, logs its figures as the monitor does, and ends the run where one falls too far."""

    def __init__(self, config: GuardConfig, run: Run, root: Root) -> None:
        self.config = config
        self.run = run
        self.root = root
        self._before: float | None = None  # on the first process

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Measure the model as it is before the first step; a resumed run reads that from its metrics.

        Raises:
            ConfigError: on every process, if the evaluation has no such figure.
        """
        kept = self._kept(trainer)
        if world().sum(torch.tensor([kept is not None], dtype=torch.long, device=trainer.device)).item():
            self._before = kept
            return
        if trainer.step:  # its metrics are lost
            results = self.run.evaluate([self.config.evaluation], self.run.untrained(), together=True)
        else:
            results = self._measure()
        problems: list[str] = []
        if trainer.is_main:
            try:
                self._before = self._figure(results)
            except ConfigError as error:
                problems = error.problems
        told = [problems]
        if world().size > 1:
            dist.broadcast_object_list(told, 0)
        if told[0]:
            raise ConfigError(told[0])
        if trainer.is_main:
            trainer.metrics.write({"step": 0, "epoch": 0.0, **figures_of(results)})

    def on_eval(self, trainer: Trainer, step: int) -> dict[str, float] | None:
        """Figures by name on the first process, none on the others.

        Raises:
            GuardError: on every process, if the figure is less than is allowed.
        """
        results = self._measure()
        bad, found, message = False, figures_of(results), ""
        if trainer.is_main:
            value, least = self._figure(results), self._least()
            bad = not value >= least  # also of a NaN
            message = self._words(step, value, least)
        tripped = world().sum(torch.tensor([bad], dtype=torch.long, device=trainer.device)).item()
        if tripped:
            trainer.metrics.write({"step": step, "epoch": trainer.epoch, **found})
            raise GuardError(message or f"step {step}: the guard has ended the run; see the first process")
        return found

    def _measure(self) -> Results:
        with self.run.trained(self.root) as model:
            return self.run.evaluate([self.config.evaluation], model, together=True)

    def _least(self) -> float:
        assert self._before is not None
        limits = [] if self.config.drop is None else [self._before - self.config.drop]
        return max([*limits, *([] if self.config.floor is None else [self.config.floor])])

    def _figure(self, results: Results) -> float:
        config = self.config
        rows = [row for row in results[config.evaluation]["rows"] if row["who"] == "model"]
        directions = [row["direction"] for row in rows if "direction" in row]
        if config.direction is not None:
            rows = [row for row in rows if row.get("direction") == config.direction]
            if not rows:
                known = ", ".join(directions) or "none"
                hint = near(config.direction, directions)
                raise ConfigError([f"guard.direction: unknown {config.direction!r}{hint} There are: {known}"])
        if config.figure not in rows[0]:
            known = [key for key in rows[0] if key not in ("who", "direction")]
            hint = f"{near(config.figure, known)} It has: {', '.join(known)}"
            raise ConfigError([f"guard.figure: evaluation {config.evaluation!r} has no {config.figure!r}{hint}"])
        return min(float(row[config.figure]) for row in rows)

    def _kept(self, trainer: Trainer) -> float | None:
        """What an earlier part of this run wrote before its first step."""
        path = trainer.metrics.path
        if not trainer.step or path is None or not path.is_file():
            return None
        prefix = f"eval/{self.config.evaluation}/"
        for line in path.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            if found["step"] == 0 and any(key.startswith(prefix) for key in found):
                end = "/".join(filter(None, ("", self.config.direction, self.config.figure)))
                values = [v for k, v in found.items() if k.startswith(prefix) and k.endswith(f"/{end}")]
                return min(values) if values and None not in values else None
        return None

    def _words(self, step: int, value: float, least: float) -> str:
        config = self.config
        why = []
        if config.drop is not None:
            why.append(f"{self._before:.4g} before the first step, of which {config.drop:g} may be lost")
        if config.floor is not None:
            why.append(f"a floor of {config.floor:g}")
        return (
            f"step {step}: {config.figure} of {config.evaluation!r} is {value:.4g}, less than {least:.4g} "
            f"({'; '.join(why)}). The run forgets: take a smaller learning rate or fewer steps, freeze more, add an "
            "anchor or l2-sp objective, or go on and interpolate afterwards (mmrep sweep)"
        )
