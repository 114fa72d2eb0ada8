"""Two readings of a sample are to attend to the same: the second term of miCSE, beside a contrast of embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import ConfigError, config
from mmrep.encoder import unsupported
from mmrep.losses.attention import attention_information
from mmrep.model import Model
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step, idle


@config
class AttentionConfig(ObjectiveConfig):
    """field: of an encoder that says what its tokens attend to. views: two readings of it, token for token alike.

    layers: which, 1-based; null = all.
    """

    field: str
    views: Annotated[tuple[int, ...], Field(min_length=2, max_length=2)] = (0, 1)
    layers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None


class AttentionAgreement(Objective):
    """Minus the mean over samples of `mmrep.losses.attention`: it falls below 0 as the two readings agree.

    miCSE (Klein and Nabi 2022, arXiv:2211.04928). The maps are of the very pass whose embeddings other objectives read.
    Two readings of the same text differ by dropout, which the encoder must have.
    """

    Config = AttentionConfig
    scope = "sample"

    def __init__(self, config: AttentionConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems = [f"objectives.attention.{problem}" for problem in _problems(config, model, fields)]
        if problems:
            raise ConfigError(problems)

    def embedded(self) -> set[str]:
        """No embedding is asked for."""
        return set()

    def raw(self) -> set[str]:
        """See `Objective.raw`."""
        return {cast(AttentionConfig, self.config).field}

    def attended(self) -> set[str]:
        """See `Objective.attended`."""
        return {cast(AttentionConfig, self.config).field}

    def count(self, step: Step) -> int:
        """See `Objective.count`: the samples that have the field."""
        return int(step.present(cast(AttentionConfig, self.config).field).sum())

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; part ``information`` is in nats, a mean over this process's samples."""
        config = cast(AttentionConfig, self.config)
        n = step.world.sum(step.present(config.field).sum()).clamp_min(1)
        if not step.has(config.field):
            return {"loss": idle(step.tower(config.field).encoder)}
        first, second = (step.attention(config.field, view) for view in config.views)
        if first.shape != second.shape:
            raise ConfigError([
                f"objectives.attention.views: {list(config.views)} of {config.field!r} have {first.shape[-1]} and "
                f"{second.shape[-1]} tokens; readings whose attention is compared have the same tokens"
            ])  # fmt: skip
        if config.layers is not None:
            chosen = torch.tensor(config.layers, device=first.device) - 1
            first, second = first[:, chosen], second[:, chosen]
        valid = step.tokens(config.field, config.views[0]).grid.valid
        each = attention_information(first, second, valid)
        # What lies behind the last attention has no part in it, and a gradient of zero all the same.
        reached = sum(step.encoding(config.field, view).tokens.values.sum() * 0 for view in config.views)
        return {"loss": reached - each.sum() * (step.world.size / n), "information": each.mean()}


def _problems(config: AttentionConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
    if config.field not in fields:
        yield f"field: unknown {config.field!r}{near(config.field, fields)} Fields: {', '.join(fields)}"
        return
    tower = model.tower(fields[config.field])
    if tower.frozen:
        yield f"field: tower {fields[config.field]!r} is frozen: its attention cannot change"
    if "attention" not in tower.encoder.supports:
        yield f"field: {unsupported(tower.encoder, 'attention')}"
    if config.views[0] == config.views[1]:
        yield f"views: {list(config.views)} is one view, which agrees with itself"
    if bad := [layer for layer in config.layers or () if layer > tower.encoder.depth]:
        yield f"layers: {bad}, but the encoder has layers 1 to {tower.encoder.depth}"
