"""Evaluations while a run is under way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmrep.objectives.root import Root
from mmrep.results import Results
from mmrep.training.contracts import Callback
from mmrep.training.trainer import Trainer

if TYPE_CHECKING:
    from mmrep.run import Run


class Monitor(Callback):
    """Runs the evaluations named in ``monitor`` every ``train.eval_every`` steps and logs their figures.

    The one that a guard runs anyway is left to it.
    """

    def __init__(self, run: Run, root: Root) -> None:
        self.run = run
        self.root = root
        guard = run.recipe.guard
        self.names = [name for name in run.recipe.monitor if guard is None or name != guard.evaluation]

    def on_eval(self, trainer: Trainer, step: int) -> dict[str, float] | None:
        """Figures by name, ``eval/<evaluation>/<direction>/<figure>``; none on processes but the first."""
        if not self.names:
            return None
        with self.run.trained(self.root) as model:
            return figures_of(self.run.evaluate(self.names, model, together=True))


def figures_of(results: Results) -> dict[str, float]:
    """The model's figures by name, ``eval/<evaluation>/<direction>/<figure>``."""
    return {
        "/".join(filter(None, ("eval", name, row.get("direction"), key))): float(value)
        for name, result in results.items()
        for row in result["rows"]
        if row["who"] == "model"
        for key, value in row.items()
        if key not in ("who", "direction")
    }
