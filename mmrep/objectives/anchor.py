"""Not forgetting: embeddings stay near those of the model as it was when the run began (teacher anchoring)."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import ConfigError, config
from mmrep.losses.distillation import pointwise, relational
from mmrep.model import Model, Tower
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step


@config
class AnchorConfig(ObjectiveConfig):
    """fields: whose embeddings are kept. view: which reading of each.

    by: ``cosine`` or ``mse`` of each embedding and what it was; or ``similarity``: a batch's distribution of
    similarities (Kullback-Leibler, see `mmrep.losses.distillation`), which leaves the space free to turn. temperature:
    of the latter.
    """

    fields: Annotated[tuple[str, ...], Field(min_length=1)]
    by: Literal["cosine", "mse", "similarity"] = "cosine"
    view: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(gt=0)] = 0.1


class Anchor(Objective):
    """The distance of embeddings from those of a frozen copy, summed over fields, each a mean over its samples.

    The copy is made when the objective is built. By then the weights of a recipe's ``start`` or of a pretrained encoder
    are in the model; of a tower with tokens that change it from the beginning (`representation-tokens`) it is the
    tower without them. It is always in eval mode, has no gradient, and is in checkpoints, so that a resumed run is
    anchored to the same model; the saved model does not have it. Give it samples of what should not be forgotten: a
    field of other data that no other objective reads is fine.
    """

    Config = AnchorConfig
    scope = "batch"  # a mean over the samples of all processes

    def __init__(self, config: AnchorConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems = [f"objectives.anchor.{problem}" for problem in _problems(config, model, fields)]
        if problems:
            raise ConfigError(problems)
        towers = {fields[name]: model.tower(fields[name]) for name in config.fields}
        self._of = {name: fields[name] for name in config.fields}
        self.copies = nn.ModuleDict({name: _frozen_copy(tower) for name, tower in towers.items()})
        self.train()

    def train(self, mode: bool = True) -> Anchor:
        """The copies are never in training mode."""
        super().train(mode)
        self.copies.eval()
        return self

    def embedded(self) -> set[str]:
        """See `Objective.embedded`."""
        return set(self._of)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; a part for each of several fields."""
        config = cast(AnchorConfig, self.config)
        total = torch.zeros((), device=step.model.device)
        parts: dict[str, Tensor] = {}
        for field in config.fields:
            present = step.present(field)
            now = step.embedding(field, config.view)[present]
            copy = cast(Tower, self.copies[self._of[field]])
            with copy.without_adapter():
                then = step.embedding_by(copy, field, config.view)[present]
            if config.by == "similarity":
                loss = relational(now, then, "similarity", temperature=config.temperature, world=step.world)
            else:
                loss = pointwise(now, then, config.by, world=step.world)
            total = total + loss
            parts[field] = loss.detach()
        return {"loss": total, **(parts if len(parts) > 1 else {})}


def _frozen_copy(tower: Tower) -> Tower:
    """A copy without gradient; what is frozen in the tower anyway is the same module in both."""
    shared = [] if not tower.config.frozen else [tower.encoder, tower.pool]
    return deepcopy(tower, {id(part): part for part in shared}).requires_grad_(False)


def _problems(config: AnchorConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
    for name in config.fields:
        if name not in fields:
            yield f"fields: unknown {name!r}{near(name, fields)} Fields: {', '.join(fields)}"
        elif model.tower(fields[name]).config.frozen == "tower":
            yield f"fields: tower {fields[name]!r} of {name!r} is frozen whole: nothing can move its embeddings"
    if len(set(config.fields)) < len(config.fields):
        yield f"fields: {list(config.fields)} names one twice"
