"""Prediction of one field's embedding from another's, or from the rest of the sample: what a missing field would be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrep.config import ConfigError, config
from mmrep.model import Model
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step


@config
class PredictConfig(ObjectiveConfig):
    """source: the predictor: a fusion that leaves the target out, or a field. target: the field that is predicted.

    loss: ``cosine``, 1 - cos; or ``mse``, the squared distance of the embeddings as the model gives them (for unit
    vectors twice the former). detach: the target gets no gradient, so that it does not come to meet its predictor.
    """

    source: str
    target: str
    loss: Literal["cosine", "mse"] = "cosine"
    detach: bool = True
    weight: Annotated[float, Field(ge=0)] = 1.0


class Predict(Objective):
    """The mean, over the samples of all processes that have the target and something to predict it from.

    With f the source's embedding and t the target's: ``mean(1 - cos(f, t))`` or ``mean(|f - t|^2)``. Alone it is
    minimised by a constant target; hence the stop-gradient, and a contrastive objective beside it.
    """

    Config = PredictConfig
    scope = "batch"  # the count that it divides by is of all processes

    def __init__(self, config: PredictConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems = [f"objectives.predict.{problem}" for problem in _problems(config, model, fields)]
        if problems:
            raise ConfigError(problems)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; part ``cosine`` is the mean cosine, ``n`` the number of samples."""
        config = cast(PredictConfig, self.config)
        valid = step.present(config.source) & step.present(config.target)
        source, target = (step.embedding(name)[valid] for name in (config.source, config.target))
        reached = target.sum() * 0  # detached or not, its tower takes part in the processes' reduction of gradients
        target = target.detach() if config.detach else target
        cosine = F.cosine_similarity(source, target, dim=1)
        each = 1 - cosine if config.loss == "cosine" else (source - target).pow(2).sum(1)
        sums = step.world.sum(torch.stack([valid.sum().to(each.dtype), cosine.detach().sum()]))
        count = sums[0].clamp_min(1)
        return {
            "loss": each.sum() * (step.world.size / count) + reached,
            "cosine": sums[1] / count,
            "n": sums[0].long(),
        }


def _problems(config: PredictConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
    known = [*fields, *model.fusions]
    for name, value, allowed in (("source", config.source, known), ("target", config.target, list(fields))):
        if value not in allowed:
            yield f"{name}: unknown {value!r}{near(value, allowed)} One of: {', '.join(allowed)}"
    if config.source == config.target:
        yield f"source: {config.source!r} is the target itself"
    fusion = model.config.fusions.get(config.source)
    if fusion is not None and config.target in fusion.of:
        rest = ", ".join(f"{member}: {tower}" for member, tower in fusion.of.items() if member != config.target)
        yield (
            f"source: fusion {config.source!r} reads the target {config.target!r}, which it would copy; "
            f"declare one without it, as of: {{{rest}}}"
        )
