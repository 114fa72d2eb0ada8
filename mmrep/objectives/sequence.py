"""Views of a sample and the actions between them, taken together to predict what the next view will be: seq-JEPA."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.blocks import Transformer
from mmrep.config import ConfigError, config
from mmrep.model import Model
from mmrep.objectives._condition import told
from mmrep.objectives._heads import MLP
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step, idle


@config
class SequenceConfig(ObjectiveConfig):
    """field: whose views. views: in their order; the last is predicted from those before.

    condition: the parameters whose change from a view to the next is the action, and how many figures each has; empty =
    no action is told. action: width of an action's embedding. depth, heads, mlp_ratio: of the transformer that takes
    the views together. hidden: width within the predictor. target: of what the ``teacher`` makes of the last view, or
    the encoder itself, as a constant (``stop-gradient``).
    """

    field: str
    views: Annotated[tuple[int, ...], Field(min_length=2)] = (0, 1, 2, 3)
    condition: dict[str, Annotated[int, Field(ge=1)]]
    action: Annotated[int, Field(ge=1)] = 128
    depth: Annotated[int, Field(ge=1)] = 3
    heads: Annotated[int, Field(ge=1)] = 4
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    hidden: Annotated[int, Field(ge=1)] = 1024
    target: Literal["teacher", "stop-gradient"] = "teacher"
    weight: Annotated[float, Field(ge=0)] = 1.0


class ViewSequence(Objective):
    """seq-JEPA (Ghaemi et al. 2025, arXiv:2505.03176, section 3): the mean of ``1 - cos(p, sg f(x_last))``.

    With z_t the pooled features of view t and a_t the embedded change of the parameters from view t to the next, ``g =
    transformer([query, (z_1, a_1), ..., (z_M, a_M)])`` at the query, and ``p = MLP(g, a_M)``. What an embedding of the
    model is, is z, which keeps what the actions change; g, which the paper finds invariant, is a part of the objective.
    """

    Config = SequenceConfig
    scope = "sample"

    def __init__(self, config: SequenceConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems = [f"objectives.sequence.{problem}" for problem in _problems(config, model, fields)]
        if problems:
            raise ConfigError(problems)
        tower = model.tower(fields[config.field])
        self.__dict__["_tower"] = tower  # seen, not owned
        D, A = tower.pool.width, config.action if config.condition else 0
        self.action = nn.Linear(sum(config.condition.values()), A) if A else None
        self.query = nn.Parameter(0.02 * torch.randn(D + A))
        self.transformer = Transformer(D + A, config.depth, config.heads, config.mlp_ratio)
        self.norm = nn.LayerNorm(D + A)
        self.predictor = MLP([D + 2 * A, config.hidden, D], "layer")

    def taught(self) -> list[nn.Module]:
        """Encoder and pool, if a teacher gives the target."""
        tower = self.__dict__["_tower"]
        return [tower.encoder, tower.pool] if cast(SequenceConfig, self.config).target == "teacher" else []

    def embedded(self) -> set[str]:
        """No embedding is asked for."""
        return set()

    def pooled(self) -> set[str]:
        """See `Objective.pooled`."""
        return {cast(SequenceConfig, self.config).field}

    def raw(self) -> set[str]:
        """See `Objective.raw`."""
        return {cast(SequenceConfig, self.config).field}

    def count(self, step: Step) -> int:
        """See `Objective.count`: the samples that have the field."""
        return int(step.present(cast(SequenceConfig, self.config).field).sum())

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; part ``cosine`` is the mean cosine of prediction and target."""
        config = cast(SequenceConfig, self.config)
        here = step.present(config.field)
        n = step.world.sum(here.sum())
        if not step.has(config.field):
            return {"loss": (step.pooled(config.field).sum() * 0 + idle(self)) * step.world.size}
        *before, last = config.views
        if config.target == "teacher":
            target = step.taught_pooled(config.field, last)[here]
        else:
            target = step.pooled(config.field, last)[here].detach()
        predicted = self.predict(step, [step.pooled(config.field, view)[here] for view in before])
        cosine = F.cosine_similarity(predicted.to(target.dtype), target, dim=1)
        loss = (1 - cosine).sum() * (step.world.size / n.clamp_min(1))
        return {"loss": loss, "cosine": cosine.detach().mean()}

    def predict(self, step: Step, seen: list[Tensor]) -> Tensor:
        """What the last view's features [n, D] will be, from those of the views before."""
        config = cast(SequenceConfig, self.config)
        tokens = torch.stack(seen, 1)
        actions = tokens[..., :0]
        if self.action is not None:
            where = "objectives.sequence.condition"
            figures = [told(step, config.field, view, config.condition, where) for view in config.views]
            changes = [after - before for before, after in pairwise(figures)]
            actions = self.action(torch.stack(changes, 1).to(tokens.dtype))
        tokens = torch.cat([tokens, actions.to(tokens.dtype)], 2)
        query = self.query.to(tokens.dtype).expand(len(tokens), 1, -1)
        taken, _ = self.transformer(torch.cat([query, tokens], 1))
        together = self.norm(taken[:, 0])
        return self.predictor(torch.cat([together, actions[:, -1].to(together.dtype)], 1), step.world)


def _problems(config: SequenceConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
    if config.field not in fields:
        yield f"field: unknown {config.field!r}{near(config.field, fields)} Fields: {', '.join(fields)}"
        return
    if model.tower(fields[config.field]).frozen:
        yield f"field: tower {fields[config.field]!r} of {config.field!r} is frozen: it has no views to learn from"
    if len(set(config.views)) < len(config.views):
        yield f"views: {list(config.views)} names one twice"
    width = model.tower(fields[config.field]).pool.width + (config.action if config.condition else 0)
    if width % config.heads:
        yield f"heads: {config.heads} does not divide {width}, the width of features and action together"
