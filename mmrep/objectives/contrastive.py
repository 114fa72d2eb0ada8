"""Contrast between pairs of fields: CLIP, SigLIP, SimCLR and any weighted graph of pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import Component, ConfigError, Of, component, config
from mmrep.model import Model
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step


@config
class PairConfig:
    """One edge of the graph of pairs.

    between: two fields; the same field twice contrasts two of its views. views: which view of each. weight: factor.
    temperature: name of one of ``model.temperatures``. negatives: a field whose embeddings are extra wrong answers to
    the first field of ``between``. soft: a field of a frozen tower whose features soften the targets (``info-nce``).
    """

    between: Annotated[tuple[str, ...], Field(min_length=2, max_length=2)]
    views: Annotated[tuple[int, ...], Field(min_length=2, max_length=2)] = (0, 0)
    weight: Annotated[float, Field(gt=0)] = 1.0
    temperature: str = "default"
    negatives: str | None = None
    soft: str | None = None


@config
class ContrastiveConfig(ObjectiveConfig):
    """pairs: edges. loss: ``info-nce`` or ``siglip``. use_group: samples of one group are positives of each other."""

    pairs: list[PairConfig]
    loss: Annotated[Component, Of("losses")] = field(default_factory=lambda: component("losses", "info-nce"))
    use_group: bool = True


class Contrastive(Objective):
    """A weighted sum of a paired loss over pairs of fields; samples that lack either field take no part in a pair."""

    Config = ContrastiveConfig
    scope = "batch"

    def __init__(self, config: ContrastiveConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        self.loss = config.loss.build()
        problems = [
            f"objectives.contrastive.pairs[{i}]: {problem}"
            for i, pair in enumerate(config.pairs)
            for problem in self._problems(pair, model, fields)
        ]
        if problems:
            raise ConfigError(problems)

    def _problems(self, pair: PairConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
        """What is wrong with one pair; found when the objective is built, not in the first step."""
        named = [name for name in (*pair.between, pair.negatives, pair.soft) if name is not None]
        unknown = [name for name in named if name not in fields]
        for name in unknown:
            yield f"unknown field {name!r}{near(name, fields)} Fields: {', '.join(fields)}"
        if pair.temperature not in model.temperatures:
            hint = near(pair.temperature, model.temperatures)
            known = ", ".join(model.temperatures)
            yield f"temperature: unknown {pair.temperature!r}{hint} model.temperatures has: {known}"
            return
        loss = cast(ContrastiveConfig, self.config).loss.type
        has_bias = model.temperature(pair.temperature).bias is not None
        if has_bias != self.loss.needs_bias:
            verb = "needs" if self.loss.needs_bias else "does not use"
            yield f"loss {loss!r} {verb} a bias; set model.temperatures.{pair.temperature}.bias accordingly"
        if pair.soft is not None and not unknown:
            if not self.loss.takes_soft:
                yield f"loss {loss!r} takes no soft targets; use info-nce, or leave `soft` out"
            if not model.tower(fields[pair.soft]).config.frozen:
                yield f"soft: the tower of {pair.soft!r} must be frozen, or the targets would move with the training"

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are named ``first-second``."""
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=step.model.device)
        for pair in cast(ContrastiveConfig, self.config).pairs:
            (a, b), (view_a, view_b) = pair.between, pair.views
            temperature = step.model.temperature(pair.temperature)
            valid = step.present(a) & step.present(b)
            extra: dict[str, Tensor] = {}
            if pair.negatives is not None:
                extra["negatives"] = step.embedding(pair.negatives)[step.present(pair.negatives)]
            if pair.soft is not None:
                valid = valid & step.present(pair.soft)
                extra["soft"] = step.features(pair.soft)
            out = self.loss(
                step.embedding(a, view_a),
                step.embedding(b, view_b),
                scale=temperature.scale,
                bias=temperature.bias,
                group=step.group if self.config.use_group else None,
                valid=valid,
                world=step.world,
                **extra,
            )
            total = total + pair.weight * out["loss"]
            parts[f"{a}-{b}" if pair.views == (0, 0) else f"{a}.{view_a}-{b}.{view_b}"] = out["loss"].detach()
        return {"loss": total, **parts}
