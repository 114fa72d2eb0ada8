"""The one module whose ``forward(batch)`` returns the losses, so that DDP and FSDP see a single forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from torch import Tensor, nn

from mmrep.config import Component
from mmrep.data.batch import Batch
from mmrep.embed.memo import Memo
from mmrep.model import Model
from mmrep.objectives.average import WeightAverage
from mmrep.objectives.objective import Objective
from mmrep.step import FieldViews, Step
from mmrep.training.collectives import world


class Root(nn.Module):
    """Model and objectives.

    Args:
        model: the towers.
        objectives: chosen objectives, from the recipe.
        fields: tower name by field.
        views: per field, its views.
        average: decay of a moving average of the model's weights; None = no average.
    """

    def __init__(
        self,
        model: Model,
        objectives: Sequence[Component],
        *,
        fields: Mapping[str, str],
        views: FieldViews,
        average: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.fields = dict(fields)
        self.views = views
        self.memo = Memo()
        self.objectives = nn.ModuleDict()
        for chosen in objectives:
            name = chosen.config.name or chosen.type
            name = name if name not in self.objectives else f"{name}-{len(self.objectives)}"
            self.objectives[name] = chosen.build(model, self.fields)

        self.average = None if average is None else WeightAverage(model, average)

    def averaged(self) -> AbstractContextManager[None]:
        """The model with its averaged weights, if there is an average; it is what is evaluated and saved."""
        return nullcontext() if self.average is None else self.average.applied()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Every objective's loss on one batch: ``{"loss": weighted sum, "<objective>/<part>": detached}``."""
        step = Step(self.model, batch, fields=self.fields, views=self.views, world=world(), memo=self.memo)
        report: dict[str, Tensor] = {}
        total: Tensor | None = None
        for name, module in self.objectives.items():
            objective = cast(Objective, module)
            out = objective(step)
            weighted = objective.config.weight * out.pop("loss")
            total = weighted if total is None else total + weighted
            report[f"{name}/loss"] = weighted.detach()
            report.update({f"{name}/{part}": value.detach() for part, value in out.items()})
        assert total is not None, "a recipe has at least one objective"
        return {"loss": total, **report}

    def after_optimizer_step(self) -> None:
        """Temperature bounds, teachers, queues: once per optimizer step."""
        self.model.clamp_temperatures()
        for objective in self.objectives.values():
            cast(Objective, objective).after_optimizer_step()
        if self.average is not None:
            self.average.update()
