"""Contrast between pairs of fields: CLIP, SigLIP, SimCLR and any weighted graph of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Annotated, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mmrep.config import Component, ConfigError, Of, component, config
from mmrep.model import Model
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.objectives.pairs import EdgesConfig, PairConfig
from mmrep.registry import near
from mmrep.step import Step


@config
class ContrastiveConfig(ObjectiveConfig):
    """pairs: edges one by one. edges: a shape of them (all pairs, a star, a chain). Both may be given.

    loss: ``info-nce`` or ``siglip``. use_group: samples of one group are positives of each other.
    """

    pairs: list[PairConfig] = field(default_factory=list[PairConfig])
    edges: EdgesConfig | None = None
    loss: Annotated[Component, Of("losses")] = field(default_factory=lambda: component("losses", "info-nce"))
    use_group: bool = True

    def __post_init__(self) -> None:
        if not self.pairs and self.edges is None:
            raise ValueError("contrastive: name at least one edge, in `pairs` or in `edges`")


class Contrastive(Objective):
    """A weighted sum of a paired loss over pairs of fields; samples that lack either field take no part in a pair."""

    Config = ContrastiveConfig
    scope = "batch"

    def __init__(self, config: ContrastiveConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        self.loss = config.loss.build()
        edges = [] if config.edges is None else config.edges.pairs()
        self.pairs = [*config.pairs, *edges]
        places = [
            *(f"pairs[{i}]" for i in range(len(config.pairs))),
            *("edges " + "-".join(edge.between) for edge in edges),
        ]
        problems = [
            f"objectives.contrastive.{place}: {problem}"
            for place, pair in zip(places, self.pairs, strict=True)
            for problem in self._problems(pair, model, fields)
        ]
        if problems:
            raise ConfigError(problems)

    def _problems(self, pair: PairConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
        """What is wrong with one pair; found when the objective is built, not in the first step."""
        named = [name for name in (*pair.between, pair.negatives, pair.soft) if name is not None]
        known = [*fields, *model.fusions]
        unknown = [name for name in named if name not in known]
        for name in unknown:
            yield f"unknown field {name!r}{near(name, known)} Fields: {', '.join(known)}"
        if pair.averaged and pair.between[1] in model.fusions:
            yield f"averaged: {pair.between[1]!r} is a fusion, which has one view"
        if len({pair.views[1], *pair.averaged}) <= len(pair.averaged):
            yield f"averaged: {list(pair.averaged)} and view {pair.views[1]} name one twice"
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
            if pair.soft in model.fusions or not model.tower(fields[pair.soft]).frozen:
                yield f"soft: the tower of {pair.soft!r} must be frozen, or the targets would move with the training"

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are named ``first-second``."""
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=step.model.device)
        for pair in self.pairs:
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
                _mean(step, b, (view_b, *pair.averaged)),
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


def _mean(step: Step, field: str, views: Sequence[int]) -> Tensor:
    """The embedding of a view, or the mean of those of several, of unit length where embeddings are."""
    embeddings = [step.embedding(field, view) for view in views]
    if len(embeddings) == 1:
        return embeddings[0]
    mean = torch.stack(embeddings).mean(0)
    return F.normalize(mean, dim=1) if step.model.config.normalize else mean
