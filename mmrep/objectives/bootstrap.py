"""Prediction of one view's embedding from another's, by a network of its own past: BYOL, SimSiam, MoCo v3, TriBYOL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field as default
from itertools import combinations, permutations
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import ConfigError, config
from mmrep.model import Model
from mmrep.objectives._heads import MLP, Norm
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step

Slot = tuple[str, int]
"""A field and one of its views."""


@config
class PredictorConfig:
    """hidden: width between the two linear maps. layers: linear maps. norm: between them; ``batch`` is over all
    processes (a projector's own batch norm, such as ``standardize``, is over those of each).
    """

    hidden: Annotated[int, Field(ge=1)] = 4096
    layers: Annotated[int, Field(ge=1)] = 2
    norm: Norm = "batch"


@config
class BootstrapConfig(ObjectiveConfig):
    """fields: whose embeddings; of several, each predicts the others. views: of each field.

    predictor: one a field; null = none. target: of what the ``teacher`` makes of the other view (BYOL, MoCo v3), or the
    model itself, as a constant (``stop-gradient``: SimSiam), or with its gradient (``online``: VJ-VCR), which needs a
    term against collapse beside it, such as ``redundancy`` with ``vicreg``. loss: ``cosine``, 2 - 2 cos; ``mse``, the
    squared distance of the vectors as they are; ``info-nce``, with the other samples' targets of all processes as
    negatives.
    symmetric: every view predicts every other; false = only those after it. temperature: of ``info-nce``. scaled: it is
    multiplied by twice the temperature, as in MoCo v3. use_group: samples of one group are no negatives of each other.
    """

    fields: Annotated[tuple[str, ...], Field(min_length=1)]
    views: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1)
    predictor: PredictorConfig | None = default(default_factory=PredictorConfig)
    target: Literal["teacher", "stop-gradient", "online"] = "teacher"
    loss: Literal["cosine", "mse", "info-nce"] = "cosine"
    symmetric: bool = True
    temperature: Annotated[float, Field(gt=0)] = 0.2
    scaled: bool = True
    use_group: bool = True
    weight: Annotated[float, Field(ge=0)] = 1.0


class Bootstrap(Objective):
    """The mean over ordered pairs of views of the mean over samples, of all processes, that have both.

    * BYOL (Grill et al. 2020, arXiv:2006.07733, equation 2): the defaults. Its symmetric loss is the sum of both
      directions: ``weight: 2``. TriBYOL is three views.
    * SimSiam (Chen and He 2021, arXiv:2011.10566, equation 2): ``target: stop-gradient``; their ``-cos`` is half of
      this, less 1.
    * MoCo v3 (Chen, Xie and He 2021, arXiv:2104.02057, algorithm 1): ``loss: info-nce``, ``weight: 2`` for its sum.
    * VJ-VCR (Drozdov et al. 2024, arXiv:2412.10925, section 3): ``target: online``, ``loss: mse``, ``symmetric: false``
      on an earlier and a later part of a video.
    * Text (arXiv:2004.05368 and others): two views of one text that differ in dropout alone, with the teacher.

    The papers' embeddings have no unit length before the predictor: ``model.normalize: false``.
    """

    Config = BootstrapConfig
    scope = "batch"

    def __init__(self, config: BootstrapConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems = [f"objectives.bootstrap.{problem}" for problem in _problems(config, model, fields)]
        if problems:
            raise ConfigError(problems)
        towers = {fields[name]: model.tower(fields[name]) for name in config.fields}
        self.__dict__["_towers"] = list(towers.values())  # seen, not owned
        self.predictors = nn.ModuleDict()
        if config.predictor is not None:
            p = config.predictor
            for name in config.fields:
                self.predictors[name] = MLP([model.dim, *[p.hidden] * (p.layers - 1), model.dim], p.norm)
        slots = [(name, view) for name in config.fields for view in config.views]
        self.pairs = list((permutations if config.symmetric else combinations)(slots, 2))

    def taught(self) -> list[nn.Module]:
        """The towers, if a teacher gives the targets."""
        return list(self.__dict__["_towers"]) if cast(BootstrapConfig, self.config).target == "teacher" else []

    def embedded(self) -> set[str]:
        """See `Objective.embedded`."""
        return set(cast(BootstrapConfig, self.config).fields)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; part ``cosine`` is the mean cosine of prediction and target."""
        predicted: dict[Slot, Tensor] = {}
        for slot in dict.fromkeys(a for a, _ in self.pairs):
            predicted[slot] = self._predict(step, *slot)
        target = {slot: self._target(step, *slot) for slot in dict.fromkeys(b for _, b in self.pairs)}
        losses, cosines, counts = list[Tensor](), list[Tensor](), list[Tensor]()
        for a, b in self.pairs:
            valid = step.present(a[0]) & step.present(b[0])
            x, y = predicted[a][valid], target[b][valid]
            n = step.world.sum(valid.sum())
            losses.append(self._each(step, x, y, valid).sum() * step.world.size / n.clamp_min(1))
            cosines.append(F.cosine_similarity(x.detach(), y.detach(), dim=1).sum())
            counts.append(n)
        reached = sum((step.embedding(*b).sum() * 0 for _, b in self.pairs), torch.zeros((), device=step.model.device))
        cosine = step.world.sum(torch.stack(cosines).sum()) / torch.stack(counts).sum().clamp_min(1)
        return {"loss": torch.stack(losses).mean() + reached, "cosine": cosine}

    def _predict(self, step: Step, field: str, view: int) -> Tensor:
        """[B, dim] of a view, through the predictor; rows without the field are zero."""
        online = step.embedding(field, view)
        if field not in self.predictors:
            return online
        rows = step.present(field).nonzero()[:, 0]
        found = cast(MLP, self.predictors[field])(online[rows], step.world)
        found = found if found.dtype == torch.float64 else found.float()
        return found.new_zeros(online.shape).index_copy(0, rows, found)

    def _target(self, step: Step, field: str, view: int) -> Tensor:
        if cast(BootstrapConfig, self.config).target == "teacher":
            return step.taught_embedding(field, view)
        online = step.embedding(field, view)
        return online if cast(BootstrapConfig, self.config).target == "online" else online.detach()

    def _each(self, step: Step, x: Tensor, y: Tensor, valid: Tensor) -> Tensor:
        """The loss [n] of each prediction [n, dim] and its target."""
        config = cast(BootstrapConfig, self.config)
        if config.loss == "cosine":
            return 2 - 2 * F.cosine_similarity(x, y, dim=1)
        if config.loss == "mse":
            return (x - y).square().sum(1)
        with torch.autocast(x.device.type, enabled=False):
            keys = step.world.gather(F.normalize(y, dim=1))
            logits = F.normalize(x, dim=1) @ keys.T / config.temperature
        own = torch.arange(len(x), device=x.device) + step.world.offset(len(x))
        if config.use_group and step.group is not None:
            group = step.group[valid]
            same = group[:, None] == step.world.gather(group)
            same[torch.arange(len(x), device=x.device), own] = False
            logits = logits.masked_fill(same, -torch.inf)
        each = F.cross_entropy(logits, own, reduction="none")
        return each * (2 * config.temperature if config.scaled else 1)


def _problems(config: BootstrapConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
    for name in config.fields:
        if name not in fields:
            yield f"fields: unknown {name!r}{near(name, fields)} Fields: {', '.join(fields)}"
        elif model.tower(fields[name]).frozen:
            yield f"fields: tower {fields[name]!r} of {name!r} is frozen: it has no views to learn from"
    for what, values in (("fields", config.fields), ("views", config.views)):
        if len(set(values)) < len(values):
            yield f"{what}: {list(values)} names one twice"
    if len(config.fields) * len(config.views) < 2:
        yield f"views: {list(config.views)} of one field is one view, which has nothing to predict; name two of them"
