"""Evaluations while a run is under way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmrep.objectives.root import Root
from mmrep.training.contracts import Callback
from mmrep.training.trainer import Trainer

if TYPE_CHECKING:
    from mmrep.run import Run


class Monitor(Callback):
    """Runs the evaluations named in ``monitor`` every ``train.eval_every`` steps and logs their figures."""

    def __init__(self, run: Run, root: Root) -> None:
        self.run = run
        self.root = root

    def on_eval(self, trainer: Trainer, step: int) -> dict[str, float] | None:
        """Figures by name, ``eval/<evaluation>/<direction>/<figure>``; none on processes but the first."""
        with self.run.trained(self.root) as model:
            results = self.run.evaluate(self.run.recipe.monitor, model, together=True)
        return {
            "/".join(filter(None, ("eval", name, row.get("direction"), key))): float(value)
            for name, result in results.items()
            for row in result["rows"]
            if row["who"] == "model"
            for key, value in row.items()
            if key not in ("who", "direction")
        }
