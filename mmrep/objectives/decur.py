"""DeCUR: columns that modalities share, and columns that each has for itself, told apart by cross-correlation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import ConfigError, config
from mmrep.losses.cross_correlation import cross_correlation_loss
from mmrep.model import Model
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step


@config
class DeCURConfig(ObjectiveConfig):
    """between: two fields or more, of different modalities. views: of each field, the two that are compared within it.

    common: share of the columns that the modalities have in common, 7/8 in most of the paper's runs. redundancy: weight
    of what is not on a diagonal. within: weight of the terms of one modality; 0 needs no second view.
    """

    between: Annotated[tuple[str, ...], Field(min_length=2)]
    views: Annotated[tuple[int, ...], Field(min_length=2, max_length=2)] = (0, 1)
    common: Annotated[float, Field(gt=0, le=1)] = 0.875
    redundancy: Annotated[float, Field(gt=0)] = 0.0051
    within: Annotated[float, Field(ge=0)] = 1.0


class DeCUR(Objective):
    """Decoupling common and unique representations (arXiv:2309.05300): ``L_com + L_uni + within * (L_M1 + L_M2)``.

    Between the first views of two modalities, the cross-correlation of the common columns is to be the identity, and
    that of the others to vanish; between the two views of one modality, that of all columns is to be the identity
    (Barlow Twins), so that the unique columns tell something. With more than two fields, every two of them and each of
    them make a term. (The authors' code has half of the first two terms, and a third of the sum: ``within: 2`` and a
    ``weight`` of 1/6.) Samples that lack a field take part in the terms of the others.

    The paper's embeddings have thousands of columns and no unit length: ``model.normalize: false`` and a large ``dim``.
    """

    Config = DeCURConfig
    scope = "batch"

    def __init__(self, config: DeCURConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems = [f"objectives.decur.{problem}" for problem in self._problems(config, fields)]
        if problems:
            raise ConfigError(problems)
        self.common = round(config.common * model.dim)

    @staticmethod
    def _problems(config: DeCURConfig, fields: dict[str, str]) -> Iterator[str]:
        for field in config.between:
            if field not in fields:
                yield f"between: unknown field {field!r}{near(field, fields)} Fields: {', '.join(fields)}"
        if len(set(config.between)) < len(config.between):
            yield f"between: {', '.join(config.between)} has a field twice; its own views are compared by `within`"
        if config.within and config.views[0] == config.views[1]:
            yield f"views: {list(config.views)} is one view; name two of them, or set within: 0"

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are named ``first-second.common``, ``first-second.unique`` and ``field``."""
        c = cast(DeCURConfig, self.config)
        first, second = c.views
        total, parts = torch.zeros((), device=step.model.device), dict[str, Tensor]()
        for a, b in combinations(c.between, 2):
            out = cross_correlation_loss(
                step.embedding(a, first),
                step.embedding(b, first),
                common=self.common,
                redundancy=c.redundancy,
                valid=step.present(a) & step.present(b),
                world=step.world,
            )
            total = total + out["common"] + out["unique"]
            parts |= {f"{a}-{b}.{kind}": out[kind].detach() for kind in ("common", "unique")}
        for field in c.between if c.within else ():
            out = cross_correlation_loss(
                step.embedding(field, first),
                step.embedding(field, second),
                redundancy=c.redundancy,
                valid=step.present(field),
                world=step.world,
            )
            total = total + c.within * out["common"]
            parts[field] = out["common"].detach()
        return {"loss": total, **parts}
