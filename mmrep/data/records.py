"""Records in memory: Python lists, or a list of mappings written in a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mmrep.config import ConfigError, config
from mmrep.data.sample import Sample
from mmrep.data.source import Source, SourceConfig, require_unique


@config
class RecordsConfig(SourceConfig):
    """records: one mapping of column to value a sample; a column may be left out or null."""

    records: list[dict[str, Any]]


class Records(Source):
    """Records in a list. Values are passed on as they are; only None and NaN are missing."""

    Config = RecordsConfig

    def __init__(self, config: RecordsConfig) -> None:
        super().__init__(config)
        self._rows = config.records
        if not self._rows:
            raise ConfigError(["records: the list is empty"])
        self.columns = tuple(dict.fromkeys(name for row in self._rows for name in row))
        self.require_special_columns()
        if config.id is not None:
            require_unique((row.get(config.id) for row in self._rows), config.id)

    @classmethod
    def from_lists(cls, **columns: Sequence[Any]) -> Records:
        """Build from one list a column: ``Records.from_lists(image=[...], caption=[...])``.

        Args:
            **columns: lists of equal length, None where a value is missing. Lists called ``id``, ``label`` and
                ``group`` are used as such.

        Raises:
            ConfigError: no lists, a string in place of a list, unequal lengths, or ids that are not unique.
        """
        for name, values in columns.items():
            if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
                raise ConfigError([f"{name}: expected a list with one value a sample, got {type(values).__name__}"])
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) != 1:
            shown = ", ".join(f"{name} has {n}" for name, n in lengths.items()) or "there are none"
            raise ConfigError([f"the lists must have one length: {shown}"])
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return cls(RecordsConfig(records=rows, **{key: key for key in ("id", "label", "group") if key in columns}))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self.make_sample(self._rows[index], str(index))

    def column(self, name: str) -> list[Any]:
        """See `Source.column`."""
        self.require_columns([name], "column")
        return [row.get(name) for row in self._rows]

    def fingerprint(self) -> str:
        """A digest of the values."""
        digest = blake2b(digest_size=16)
        for row in self._rows:
            for name, value in row.items():
                digest.update(f"\x1e{name}\x1f{type(value).__name__}\x1f".encode())
                digest.update(_content(value))
        return f"list:{len(self)}:{digest.hexdigest()}"


def _content(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Path):
        return str(value.resolve()).encode()
    if hasattr(value, "tobytes"):  # arrays and PIL images, whose repr leaves the values out
        return f"{getattr(value, 'shape', None) or getattr(value, 'size', '')}".encode() + value.tobytes()
    return repr(value).encode("utf-8", "surrogatepass")
