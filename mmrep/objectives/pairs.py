"""The graph of pairs of a contrastive objective: edges one by one, or a whole shape of them in a line."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Annotated, Literal

from pydantic import Field

from mmrep.config import config


@config
class PairConfig:
    """One edge of the graph of pairs.

    between: two fields or fusions; the same field twice contrasts two of its views. views: which view of each.
    averaged: further views of the second field, whose embeddings are averaged with that of its view: several positives
    as one (DeCLUTR, arXiv:2006.03659). weight: factor. temperature: name of one of ``model.temperatures``. negatives: a
    field whose embeddings are extra wrong answers to the first field of ``between``. soft: a field of a frozen tower
    whose features soften the targets (``info-nce``).
    """

    between: Annotated[tuple[str, ...], Field(min_length=2, max_length=2)]
    views: Annotated[tuple[int, ...], Field(min_length=2, max_length=2)] = (0, 0)
    averaged: tuple[Annotated[int, Field(ge=0)], ...] = ()
    weight: Annotated[float, Field(gt=0)] = 1.0
    temperature: str = "default"
    negatives: str | None = None
    soft: str | None = None


@config
class EdgesConfig:
    """Many edges at once.

    of: fields. shape: ``all`` pairs of them, a ``star`` from the first to each other, or a ``chain`` of neighbours.
    weight: of each edge. temperature: one name for all; or ``own``: edge a-b has the one of ``model.temperatures`` that
    is called "a-b", so that a noisy pair does not set the sharpness of a clean one.
    """

    of: Annotated[list[str], Field(min_length=2)]
    shape: Literal["all", "star", "chain"] = "all"
    weight: Annotated[float, Field(gt=0)] = 1.0
    temperature: str = "default"

    def __post_init__(self) -> None:
        if len(set(self.of)) < len(self.of):
            raise ValueError(f"of: a field is named twice: {', '.join(self.of)}")

    def pairs(self) -> list[PairConfig]:
        """The edges one by one."""
        first, *rest = self.of
        shapes = {
            "all": list(combinations(self.of, 2)),
            "star": [(first, other) for other in rest],
            "chain": list(pairwise(self.of)),
        }
        return [
            PairConfig(
                between=pair, weight=self.weight,
                temperature="-".join(pair) if self.temperature == "own" else self.temperature,
            )
            for pair in shapes[self.shape]
        ]  # fmt: skip
