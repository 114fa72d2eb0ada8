"""The contract of an objective: what one training step computes from one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.model import Model, Tower
from mmrep.step import Step


@dataclass(frozen=True)
class Guest:
    """A frozen tower, such as one of another model, and the column of the data that it reads."""

    column: str
    tower: Tower


@config
class ObjectiveConfig:
    """What every objective has. weight: factor of its loss in the sum. name: prefix of its metrics."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    name: str | None = None


class Objective(nn.Module):
    """Which fields, views, masks and targets meet in which loss.

    Attributes:
        scope: ``"batch"`` if samples are coupled (it then meets gathering and embedding caches), else ``"sample"``.
    """

    Config: ClassVar[type]
    scope: Literal["sample", "batch"] = "batch"

    def __init__(self, config: Any, model: Model, fields: dict[str, str]) -> None:
        """Check the config against the model and the fields; refuse here, not in the first step."""
        super().__init__()
        self.config = config

    def forward(self, step: Step) -> dict[str, Tensor]:
        """``{"loss": scalar, named parts}``; the mean over processes is the loss of the whole batch."""
        raise NotImplementedError

    def count(self, step: Step) -> int:
        """How many things of this process the loss is a mean over: what weighs a micro-batch among the others.

        Asked of objectives of scope ``"sample"`` alone, before their forward pass. The default is the samples.
        """
        return len(step.ids)

    def fit(self, samples: Callable[[str], Iterable[Any]]) -> None:
        """Learn, once and before the first step, what must be known by then, into buffers. The default learns nothing.

        Args:
            samples: the raw training values of a field, by its name, without views.
        """

    def taught(self) -> list[nn.Module]:
        """Modules, of the model or its own, that need a teacher: see `Step.teacher`. The default needs none."""
        return []

    def embedded(self) -> set[str] | None:
        """Fields whose embedding it asks for; the projector of a tower that nobody asks rests. None = any of them.

        The name of a tower that no field reads means one whose inputs the objective has itself.
        """
        return None

    def pooled(self) -> set[str]:
        """Fields whose `Step.pooled` it asks for: their tower's pool is trained, but not for that its projector."""
        return set()

    def reductions(self) -> set[int]:
        """Those of ``model.reductions`` that it trains; the others rest. The default trains none."""
        return set()

    def raw(self) -> set[str]:
        """Fields whose inputs it needs even where their tower is frozen and its features would be kept instead."""
        return set()

    def attended(self) -> set[str]:
        """Fields whose `Step.attention` it asks for; their tower's encoder supports ``"attention"``."""
        return set()

    def guests(self) -> dict[str, Guest]:
        """Towers that read columns of the data for this objective alone, by a field name of their own.

        They are frozen and belong to no model: neither trained, nor saved, nor in checkpoints. `Step.embedding` and
        `Step.features` answer for their fields. The default has none.
        """
        return {}

    def outsiders(self) -> dict[str, Tower]:
        """Further frozen towers of other models, by a name of their own, which read inputs that the objective has.

        Like guests they are in no state: they go where the module goes, and a resumed run must have the same ones.
        """
        return {}

    def after_optimizer_step(self) -> None:
        """Update teachers, queues and centres. Called once per optimizer step."""
