"""Schedules: pure functions from a step to a value.

A schedule holds no state, so a resumed run recomputes it from the step alone. It is addressed by the path of the value
that it moves: ``optim.lr`` first, later ``teacher.momentum`` or an objective's temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from mmrep.config import config


@config
class Schedule:
    """Warm up linearly to a base value, then move towards ``end``.

    shape: how the value goes from base to ``end`` after the warm-up: ``constant`` (it does not), ``linear``, or
    ``cosine`` (half a period: Loshchilov and Hutter 2017, SGDR, eq. 5, without restarts). warmup: length of the linear
    warm-up; below 1 a share of the run, from 1 on a number of steps. end: the value at the end of the run (the floor of
    a decay), in the units of the base.
    """

    shape: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.0
    end: float = 0.0

    @property
    def needs_total(self) -> bool:
        """Whether the length of the run must be known."""
        return self.shape != "constant" or 0 < self.warmup < 1

    def value(self, base: float, step: int, total: int | None) -> float:
        """The value that the step number ``step`` is taken with.

        Args:
            base: the value after the warm-up.
            step: steps taken before this one, 0 ≤ step.
            total: steps of the whole run. Later steps keep the end value. None = unknown, for a constant shape.

        Raises:
            ValueError: ``total`` is unknown and the schedule needs it.
        """
        if total is None:
            if self.needs_total:
                raise ValueError(
                    f"a {self.shape} schedule with warmup={self.warmup:g} needs the length of the run, and this run "
                    "has none: give the number of steps, or use shape=constant with a warm-up in whole steps"
                )
            total = step + 1
        warmup = self.warmup_steps(total)
        if step < warmup:
            return base * (step + 1) / warmup
        if self.shape == "constant":
            return base
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        share = 1 - progress if self.shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.end + (base - self.end) * share

    def warmup_steps(self, total: int) -> int:
        """Length of the warm-up in steps, for a run of ``total`` steps."""
        return round(self.warmup * total) if self.warmup < 1 else round(self.warmup)


@dataclass(frozen=True)
class Clock:
    """Where a run is.

    Attributes:
        step: optimizer steps taken before this one.
        total: steps of the whole run; None = unknown.
    """

    step: int = 0
    total: int | None = None

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1; 0 where its length is unknown."""
        return 0.0 if not self.total else min(1.0, self.step / self.total)

    def value(self, base: float, schedule: Schedule | None) -> float:
        """``base`` as the schedule has moved it by now; a run of unknown length keeps the base after the warm-up."""
        if schedule is None:
            return base
        if self.total is None and schedule.needs_total:
            return base
        return schedule.value(base, self.step, self.total)
