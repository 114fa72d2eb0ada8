"""A source whose rows are known when it is built and whose media are read when a sample is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmrep.config import ConfigError
from mmrep.data.sample import Sample
from mmrep.data.source import Source, require_unique


class RowSource(Source):
    """Base of the data sets: rows in memory, ids of their own, and columns of media that `media` reads.

    Attributes:
        media_columns: the columns that `column` refuses, since it would have to read every record.
    """

    media_columns: tuple[str, ...] = ()

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.require_special_columns()
        media = [key for key in ("id", "label", "group") if getattr(config, key) in self.media_columns]
        if media:
            raise ConfigError([f"{key}: {getattr(config, key)!r} holds media, not names" for key in media])
        self._ids: list[str] = []
        self._rows: list[Mapping[str, Any]] = []

    def set_rows(self, rows: Sequence[tuple[str, Mapping[str, Any]]], empty: str) -> None:
        """Keep the rows, id and columns of each.

        Args:
            rows: in an order that is the same on every machine.
            empty: what to say if there are none, with its config key.

        Raises:
            ConfigError: there are none, or the id column that the config names does not tell them apart.
        """
        if not rows:
            raise ConfigError([empty])
        self._ids = [name for name, _ in rows]
        self._rows = [row for _, row in rows]
        if self.config.id is not None:
            require_unique((row.get(self.config.id) for row in self._rows), self.config.id)

    def media(self, index: int) -> Mapping[str, Any]:
        """The values of `media_columns` of one record, None = missing. Raises BadSampleError if one is unreadable."""
        return {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self.make_sample({**self._rows[index], **self.media(index)}, self._ids[index])

    def record_id(self, index: int) -> str:
        named = self._rows[index].get(self.config.id or "")
        return self._ids[index] if named is None else str(named)

    def column(self, name: str) -> Sequence[Any]:
        """See `Source.column`."""
        self.require_columns([name], "column")
        if name in self.media_columns:
            return super().column(name)
        return [row.get(name) for row in self._rows]
