"""Contrast between pairs of fields: CLIP, SigLIP, SimCLR and any weighted graph of pairs."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import Component, ConfigError, Of, component, config
from mmrep.model import Model, Temperature
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step


@config
class PairConfig:
    """One edge of the graph of pairs.

    between: two fields; the same field twice contrasts two of its views. views: which view of each. weight: factor.
    temperature: name of one of ``model.temperatures``. negatives: a field whose embeddings are extra wrong answers to
    the first field of ``between``.
    """

    between: Annotated[tuple[str, ...], Field(min_length=2, max_length=2)]
    views: Annotated[tuple[int, ...], Field(min_length=2, max_length=2)] = (0, 0)
    weight: Annotated[float, Field(gt=0)] = 1.0
    temperature: str = "default"
    negatives: str | None = None


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
        for i, pair in enumerate(config.pairs):
            for name in (*pair.between, *([pair.negatives] if pair.negatives else [])):
                if name not in fields:
                    where = f"objectives.contrastive.pairs[{i}]"
                    raise ConfigError(
                        [f"{where}: unknown field {name!r}{near(name, fields)} Fields: {', '.join(fields)}"]
                    )
            if pair.temperature not in model.temperatures:
                known = ", ".join(model.temperatures)
                raise ConfigError(
                    [
                        f"pairs[{i}].temperature: unknown {pair.temperature!r}"
                        f"{near(pair.temperature, model.temperatures)} model.temperatures has: {known}"
                    ]
                )
            has_bias = cast(Temperature, model.temperatures[pair.temperature]).bias is not None
            if has_bias != self.loss.needs_bias:
                verb = "needs" if self.loss.needs_bias else "does not use"
                raise ConfigError(
                    [
                        f"pairs[{i}]: loss {config.loss.type!r} {verb} a bias; "
                        f"set model.temperatures.{pair.temperature}.bias accordingly"
                    ]
                )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are named ``first-second``."""
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=step.model.device)
        for pair in cast(ContrastiveConfig, self.config).pairs:
            (a, b), (view_a, view_b) = pair.between, pair.views
            temperature = cast(Temperature, step.model.temperatures[pair.temperature])
            out = self.loss(
                step.embedding(a, view_a),
                step.embedding(b, view_b),
                scale=temperature.scale,
                bias=temperature.bias,
                negatives=None
                if pair.negatives is None
                else step.embedding(pair.negatives)[step.present(pair.negatives)],
                group=step.group if self.config.use_group else None,
                valid=step.present(a) & step.present(b),
                world=step.world,
            )
            total = total + pair.weight * out["loss"]
            parts[f"{a}-{b}" if pair.views == (0, 0) else f"{a}.{view_a}-{b}.{view_b}"] = out["loss"].detach()
        return {"loss": total, **parts}
