"""The first few samples of another source, for smoke runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from mmrep.data.sample import Quarantined, Sample
from mmrep.data.source import Source


class Limited(Source):
    """At most ``count`` samples of ``source``, in its order."""

    def __init__(self, source: Source, count: int) -> None:
        super().__init__(source.config)
        self._source = source
        self._count = count
        self.columns = source.columns
        self.streaming = source.streaming
        self.has_group = source.has_group
        self.class_names = source.class_names

    def __len__(self) -> int:
        return min(self._count, len(self._source))

    def __getitem__(self, index: int) -> Sample:
        return self._source[index]

    def record(self, index: int) -> Sample | Quarantined:
        """The record at ``index``, or the note that it could not be read."""
        return self._source.record(index)

    def column(self, name: str) -> Sequence[Any]:
        """The first ``count`` values of the column."""
        return self._source.column(name)[: self._count]

    def groups(self) -> Sequence[int | str | None]:
        """The groups of the first ``count`` samples."""
        return self._source.groups()[: self._count]

    def stream(self, part: int = 0, parts: int = 1, seed: int | None = None) -> Iterator[Sample | Quarantined]:
        """The first ``count`` records, split into ``parts``."""
        return islice(islice(self._source.stream(seed=seed), self._count), part, None, parts)
