"""A sentence's vector recognises what the layers of its own past self make of the sentence: self-guided contrast."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrep.config import ConfigError, config
from mmrep.data.sample import stable_hash
from mmrep.encoder import Encoder, unsupported
from mmrep.losses.layerwise import layerwise
from mmrep.model import Model
from mmrep.objectives._heads import MLP
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step
from mmrep.tokens import Encoding
from mmrep.views.view import uniform


@config
class SelfGuidedConfig(ObjectiveConfig):
    """field, view: whose pooled vector. layers: of the frozen copy, 1-based; null = all. sampled: so many of them are
    drawn for each sample, by its seed; null = all. pool: of a layer's tokens. hidden: width of the projection head.
    """

    field: str
    view: Annotated[int, Field(ge=0)] = 0
    layers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None
    sampled: Annotated[int, Field(ge=1)] | None = None
    pool: Literal["max", "mean"] = "max"
    temperature: Annotated[float, Field(gt=0)] = 0.01
    hidden: Annotated[int, Field(ge=1)] = 4096


class SelfGuided(Objective):
    """`mmrep.losses.layerwise` between the pooled vector of the encoder and the pooled layers of a frozen copy of it.

    Kim, Yoo and Lee 2021, arXiv:2106.07345, section 3. The copy is made when the objective is built, from the weights
    of the recipe's ``start`` or of a checkpoint, as that of `anchor`; it is in checkpoints, and not in the saved model.
    One head of two layers with GELU projects both sides; it is not saved with the model either. The paper's pull of the
    weights towards the copy is an objective ``l2-sp`` beside this, with an ``alpha`` of twice its lambda.
    """

    Config = SelfGuidedConfig
    scope = "batch"

    def __init__(self, config: SelfGuidedConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems = [f"objectives.self-guided.{problem}" for problem in _problems(config, model, fields)]
        if problems:
            raise ConfigError(problems)
        tower = model.tower(fields[config.field])
        self.layers = config.layers or tuple(range(1, tower.encoder.depth + 1))
        self.past = copy.deepcopy(tower.encoder).requires_grad_(False)
        self.head = MLP([tower.encoder.width, config.hidden, config.hidden], "none", "gelu")
        self.train()

    def train(self, mode: bool = True) -> SelfGuided:
        """The copy is never in training mode."""
        super().train(mode)
        self.past.eval()
        return self

    def embedded(self) -> set[str]:
        """No embedding is asked for."""
        return set()

    def pooled(self) -> set[str]:
        """See `Objective.pooled`."""
        return {cast(SelfGuidedConfig, self.config).field}

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`."""
        config = cast(SelfGuidedConfig, self.config)
        here = step.present(config.field)
        own = step.pooled(config.field, config.view)[here]
        past = own.detach().new_zeros(len(own), len(self.layers), own.shape[1])
        if step.has(config.field):
            with torch.no_grad():
                encoder = cast(Encoder, self.past)
                tokens = encoder.tokenize(step.inputs(config.field, config.view))
                past = self._pooled(encoder.encode(tokens, None, self.layers)).to(own.dtype)
        queries = F.gelu(self.head(own, step.world))
        keys = F.gelu(self.head(past.flatten(0, 1), step.world)).view(len(own), len(self.layers), config.hidden)
        seeds = step.batch.seeds[here] + stable_hash(config.field, config.view, "layers", config.name)
        loss = layerwise(
            queries, keys, temperature=config.temperature, chosen=self._chosen(seeds), world=step.world
        )  # fmt: skip
        return {"loss": loss}

    def _pooled(self, encoding: Encoding) -> Tensor:
        """Each of the layers asked for in one vector: [n, K, width]."""
        layers, valid = torch.stack(encoding.layers, 1), encoding.tokens.grid.valid[:, None, :, None]
        if cast(SelfGuidedConfig, self.config).pool == "max":
            return layers.masked_fill(~valid, -torch.inf).amax(2)
        return layers.masked_fill(~valid, 0).sum(2) / valid.sum(2)

    def _chosen(self, seeds: Tensor) -> Tensor | None:
        """Which layers of each sample count: bool [n, K]."""
        sampled = cast(SelfGuidedConfig, self.config).sampled
        if sampled is None:
            return None
        order = uniform(seeds, len(self.layers)).argsort(1)
        return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :sampled], True)


def _problems(config: SelfGuidedConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
    if config.field not in fields:
        yield f"field: unknown {config.field!r}{near(config.field, fields)} Fields: {', '.join(fields)}"
        return
    tower = model.tower(fields[config.field])
    if tower.frozen:
        yield f"field: tower {fields[config.field]!r} is frozen: it would stay its past self"
    if "layers" not in tower.encoder.supports:
        yield f"field: {unsupported(tower.encoder, 'layers')}"
        return
    depth = tower.encoder.depth
    if bad := [layer for layer in config.layers or () if layer > depth]:
        yield f"layers: {bad}, but the encoder has layers 1 to {depth}"
    if config.sampled is not None and config.sampled > len(config.layers or range(depth)):
        yield f"sampled: {config.sampled} of {len(config.layers or range(depth))} layers; name fewer"
    if tower.pool.width != tower.encoder.width:
        yield f"field: its pool gives {tower.pool.width} figures, its layers {tower.encoder.width}: one head reads both"
