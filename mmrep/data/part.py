"""A share of a source, held out or kept, by a hash of each record's group (or id): for data that has no split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from mmrep.config import Component, ConfigError, Of, config
from mmrep.data.sample import Quarantined, Sample, stable_hash
from mmrep.data.source import Source


@config
class PartOfConfig:
    """source: a map-style source. share: of its groups that are held out. keep: which side this is. seed: of the hash.

    Records of one group are on one side; without groups each record is its own. The side of a group does not depend on
    what else is in the data, so that data that grows keeps its split.
    """

    source: Annotated[Component, Of("sources")]
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    keep: Literal["rest", "held-out"] = "rest"
    seed: int = 0


class PartOf(Source):
    """The records of one side, in the source's order, with their ids."""

    Config = PartOfConfig

    def __init__(self, config: PartOfConfig) -> None:
        super().__init__(config)
        inner: Source = config.source.build()
        if inner.streaming:
            raise ConfigError([f"source: {config.source.type!r} is a stream; a part is taken of map-style sources"])
        self._source = inner
        self.columns, self.has_group, self.class_names = inner.columns, inner.has_group, inner.class_names
        keys = inner.groups() if inner.has_group else [None] * len(inner)
        held = [
            stable_hash(config.seed, "id", inner.record_id(i))
            if key is None
            else stable_hash(config.seed, "group", key)
            for i, key in enumerate(keys)
        ]
        wanted = config.keep == "held-out"
        self._rows = [i for i, value in enumerate(held) if (value / 2**63 < config.share) is wanted]
        if not self._rows:
            raise ConfigError([f"keep: {config.keep!r} is empty: share {config.share} of {len(inner)} records"])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self._source[self._rows[index]]

    def record(self, index: int) -> Sample | Quarantined:
        """See `Source.record`."""
        return self._source.record(self._rows[index])

    def record_id(self, index: int) -> str:
        """See `Source.record_id`."""
        return self._source.record_id(self._rows[index])

    def column(self, name: str) -> Sequence[Any]:
        """See `Source.column`."""
        values = self._source.column(name)
        return [values[row] for row in self._rows]

    def groups(self) -> Sequence[int | str | None]:
        """See `Source.groups`."""
        values = self._source.groups()
        return [values[row] for row in self._rows]

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        c = self.config
        return f"part:{c.share}:{c.keep}:{c.seed}:{self._source.fingerprint()}"
