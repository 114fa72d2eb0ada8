"""What a report is made of: plain data, so that a page can be made and tested without a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmrep.evaluate.encoded import EncodedSet

Preview = Callable[[str, Any], "Image | str"]
"""``preview(field, raw)``: what a person is shown of a raw value, a picture or a line of text."""


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """An embedded held-out set and the two of its fields that are compared.

    Attributes:
        name: what the set is called.
        encoded: its samples and embeddings.
        fields: two different fields of it. Either may hold pictures, text or anything that ``preview`` can show.
        preview: shows a raw value of a field.
    """

    name: str
    encoded: EncodedSet
    fields: tuple[str, str]
    preview: Preview

    def __post_init__(self) -> None:
        unknown = [name for name in self.fields if name not in self.encoded.embeddings]
        if unknown or len(self.fields) != 2 or self.fields[0] == self.fields[1]:
            raise ValueError(
                f"set {self.name!r}: fields must be two different ones of {', '.join(self.encoded.embeddings)}; "
                f"got {', '.join(self.fields)}"
            )

    @property
    def title(self) -> str:
        """Name and fields."""
        return f"{self.name}: {self.fields[0]} and {self.fields[1]}"

    def paired(self) -> NDArray[np.int64]:
        """Indices of the samples that have both fields."""
        left, right = (self.encoded.present[name] for name in self.fields)
        return np.flatnonzero(left & right)

    def unusable(self) -> str:
        """Why nothing can be drawn of the set, or an empty string."""
        if not len(self.paired()):
            return f"no sample has both {self.fields[0]} and {self.fields[1]}"
        bad = [name for name in self.fields if not np.isfinite(self.encoded.embeddings[name]).all()]
        return f"the embeddings of {' and '.join(bad)} are not finite" if bad else ""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything a report shows. Whatever is absent is left out, and the page says why.

    Attributes:
        title: of the page.
        about: one line on what the run is.
        config: the resolved config, as YAML text.
        versions: by package (and ``python``, ``machine`` and the like).
        metrics: the lines of ``metrics.jsonl``: ``step`` and figures by name, among them ``loss``,
            ``<objective>/loss``, ``lr``, ``grad_norm`` and, at evaluation steps,
            ``eval/<evaluation>/<direction>/<figure>``.
        evaluations: by name, ``{"type": …, "data": …, "rows": [{"who": …, "direction": …, figures by name}, …]}``.
        quarantined: number of unreadable training samples by cause; None if it is not known.
        temperatures: by name, ``scale`` and, where there is one, ``bias``.
        sets: what heatmaps, maps and examples are drawn from.
    """

    title: str
    about: str = ""
    config: str = ""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    metrics: Sequence[Mapping[str, Any]] = ()
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    quarantined: Mapping[str, int] | None = None
    temperatures: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    sets: Sequence[PairSet] = ()
