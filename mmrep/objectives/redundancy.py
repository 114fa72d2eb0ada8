"""Agreement without a teacher or negatives: views of a field, or fields of a sample, kept apart by their statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, cast

from pydantic import Field
from torch import Tensor

from mmrep.config import Component, ConfigError, Of, config
from mmrep.losses._views import ViewLoss
from mmrep.model import Model
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step, idle


@config
class RedundancyConfig(ObjectiveConfig):
    """fields: one, or several that are compared with each other. views: of each field. loss: of ``view_losses``.

    of: what is compared: the ``embedding``; ``pooled`` features before the projector; or ``tokens``, each a row by
    itself (special ones and padding left out), for a loss that compares no rows.
    """

    fields: Annotated[tuple[str, ...], Field(min_length=1)]
    loss: Annotated[Component, Of("view_losses")]
    views: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1)
    of: Literal["embedding", "pooled", "tokens"] = "embedding"
    weight: Annotated[float, Field(ge=0)] = 1.0


class Redundancy(Objective):
    """One loss of views on all views of all named fields: VICReg, Barlow Twins, LeJEPA, KoLeo, within or across fields.

    Statistics are those of the samples of all processes. With ``loss: {type: vicreg, invariance: 0}`` on ``pooled`` or
    ``tokens`` it is the term against collapse beside a predictive objective. Papers compare embeddings without unit
    length: ``model.normalize: false``.
    """

    Config = RedundancyConfig
    scope = "batch"

    def __init__(self, config: RedundancyConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        self.loss = config.loss.build()
        problems = [f"objectives.redundancy.{p}" for p in _problems(config, self.loss, model, fields)]
        if problems:
            raise ConfigError(problems)

    def embedded(self) -> set[str]:
        """See `Objective.embedded`."""
        config = cast(RedundancyConfig, self.config)
        return set(config.fields) if config.of == "embedding" else set()

    def pooled(self) -> set[str]:
        """See `Objective.pooled`."""
        config = cast(RedundancyConfig, self.config)
        return set(config.fields) if config.of == "pooled" else set()

    def raw(self) -> set[str]:
        """See `Objective.raw`."""
        config = cast(RedundancyConfig, self.config)
        return set() if config.of == "embedding" else set(config.fields)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are those of the loss."""
        config = cast(RedundancyConfig, self.config)
        slots = [(field, view) for field in config.fields for view in config.views]
        if config.of == "tokens":
            return self.loss([_tokens(step, *slot) for slot in slots], world=step.world)
        read = step.embedding if config.of == "embedding" else step.pooled
        valid = [step.present(field) for field, _ in slots]
        return self.loss([read(*slot) for slot in slots], valid=valid, world=step.world)

    def after_optimizer_step(self) -> None:
        """See `Objective.after_optimizer_step`."""
        cast(ViewLoss, self.loss).after_optimizer_step()


def _tokens(step: Step, field: str, view: int) -> Tensor:
    """The tokens [n, width] of all samples that have the field."""
    encoder = step.tower(field).encoder
    if not step.has(field):
        parameter = next(encoder.parameters())
        return parameter.new_zeros(0, encoder.width) + idle(encoder)
    tokens = step.encoding(field, view).tokens
    return tokens.values[tokens.grid.valid & ~tokens.grid.special]


def _problems(config: RedundancyConfig, loss: ViewLoss, model: Model, fields: dict[str, str]) -> Iterator[str]:
    unknown = [name for name in config.fields if name not in fields]
    for name in unknown:
        yield f"fields: unknown {name!r}{near(name, fields)} Fields: {', '.join(fields)}"
    for what, values in (("fields", config.fields), ("views", config.views)):
        if len(set(values)) < len(values):
            yield f"{what}: {list(values)} names one twice"
    if not loss.paired or unknown:
        return
    if len(config.fields) * len(config.views) < 2:
        yield f"views: loss {config.loss.type!r} compares views, and {list(config.views)} of one field is one view"
    if config.of == "tokens":
        yield (
            f"of: loss {config.loss.type!r} compares rows of two views, and tokens of two views are not pairs; use "
            "embedding or pooled, or leave that part of the loss out (vicreg: invariance: 0; sigreg: weight: 1)"
        )
    widths = {name: model.tower(fields[name]).pool.width for name in config.fields}
    if config.of == "pooled" and len(set(widths.values())) > 1:
        found = ", ".join(f"{name} {width}" for name, width in widths.items())
        yield f"of: pooled features of these fields have different widths ({found}); use embedding"
