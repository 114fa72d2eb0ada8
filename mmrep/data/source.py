"""The contract of a data source: records by number (map-style) or in a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmrep.config import ConfigError, config
from mmrep.data.files import UrlFolder
from mmrep.data.sample import Quarantined, Sample
from mmrep.encoder import BadSampleError
from mmrep.registry import near


@config
class SourceConfig:
    """Columns with a meaning of their own; the config of every source of ours begins with these.

    id: column of unique ids; None makes an id of where the record stands. label: column of the class. group: column
    whose equal values mark samples as positives of each other.
    """

    id: str | None = None
    label: str | None = None
    group: str | None = None


class Source:
    """Where records come from. A map-style source has ``__len__`` and ``__getitem__``; a streaming one ``stream``.

    Attributes:
        columns: the columns that a record may have, or None if that is not known before reading.
        streaming: whether records come in a stream of unknown length.
        has_group: whether its samples carry a ``group``.
        class_names: names of the integer labels, where known.
    """

    Config: ClassVar[type]
    columns: Sequence[str] | None = None
    streaming: bool = False
    has_group: bool = False
    class_names: Sequence[str] | None = None

    def __init__(self, config: Any) -> None:
        self.config = config
        self.has_group = getattr(config, "group", None) is not None

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} is a stream and has no length")

    def __getitem__(self, index: int) -> Sample:
        """The record at ``index``, 0 ≤ index < len. Raises BadSampleError if the record itself cannot be read."""
        raise TypeError(f"{type(self).__name__} is a stream; iterate over stream()")

    def record(self, index: int) -> Sample | Quarantined:
        """The record at ``index``, or the note that it could not be read."""
        try:
            return self[index]
        except BadSampleError as error:
            return Quarantined(self.record_id(index), "", error.cause, str(error))

    def record_id(self, index: int) -> str:
        """What a record that cannot be read is called; its id, where that is known without reading it."""
        return f"#{index}"

    def stream(self, part: int = 0, parts: int = 1, seed: int | None = None) -> Iterator[Sample | Quarantined]:
        """The records of one of ``parts`` disjoint parts that together hold each record once.

        Args:
            part: which part, 0 ≤ part < parts.
            parts: how many parts.
            seed: a stream reads its shards in an order derived from it; None keeps the source's own order. A
                map-style source ignores it: its loader draws the order.
        """
        for index in range(part, len(self), parts):
            yield self.record(index)

    @property
    def epoch_length(self) -> int:
        """Samples of a shuffled epoch. A mixture with weights may draw some records twice and leave others out."""
        return len(self)

    @property
    def most_repeats(self) -> int:
        """How often a shuffled epoch holds one record at most."""
        return 1

    def epoch_order(self, seed: int) -> Tensor:
        """The record numbers of a shuffled epoch, int64 [`epoch_length`]: a function of ``seed`` alone."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))

    def column(self, name: str) -> Sequence[Any]:
        """The values of a column, one a record, None where it is missing or unreadable; no media is opened.

        Raises:
            ConfigError: no such column, or a source that cannot tell it without reading every record.
        """
        why = "a stream is not known before it is read" if self.streaming else "it has no method `column`"
        raise ConfigError([f"{type(self).__name__} cannot give the column {name!r} ahead of the samples: {why}"])

    def groups(self) -> Sequence[int | str | None]:
        """The group of every record, None where it has none; no media is opened.

        Raises:
            ConfigError: the source has no groups, or cannot tell them without reading every record.
        """
        name = getattr(self.config, "group", None)
        if name is None:
            raise ConfigError(["the data has no groups: name the column that holds them, `group: <column>`"])
        return [_group(value) for value in self.column(name)]

    def fingerprint(self) -> str:
        """What identifies the data (path, size, revision): part of the key of cached embeddings."""
        return f"{type(self).__name__}:{self.config}"

    def require_columns(self, names: Iterable[str | None], key: str) -> None:
        """Refuse names that are no column; None and sources whose columns are unknown pass.

        Args:
            names: columns that are asked for.
            key: the config key that asks, for the message.

        Raises:
            ConfigError: names the column, what exists and the near match.
        """
        if self.columns is None:
            return
        known = list(self.columns)
        problems = [
            f"{key}: the data has no column {name!r}{near(name, known) or '.'} It has: {', '.join(known)}"
            for name in names
            if name is not None and name not in known
        ]
        if problems:
            raise ConfigError(problems)

    def require_special_columns(self) -> None:
        """Refuse ``id``, ``label`` and ``group`` of the config that are no columns."""
        for key in ("id", "label", "group"):
            self.require_columns([getattr(self.config, key)], key)

    def make_sample(self, row: Mapping[str, Any], default_id: str) -> Sample:
        """A sample of a row: missing cells left out, id, label and group taken from the config's columns.

        Raises:
            BadSampleError: the id column is empty, or a label or group is neither text nor a whole number.
        """
        fields = {name: value for name, value in row.items() if not is_missing(value)}
        special = {key: fields.get(getattr(self.config, key) or "") for key in ("id", "label", "group")}
        if self.config.id is not None and special["id"] is None:
            raise BadSampleError("missing id", f"the record at {default_id} has nothing in column {self.config.id!r}")
        return Sample(
            id=default_id if special["id"] is None else str(special["id"]),
            fields=fields,
            label=_class(special["label"], "label"),
            group=_class(special["group"], "group"),
        )


def require_unique(ids: Iterable[Any], column: str) -> None:
    """Refuse ids that occur twice: views, queues, resume and the quarantine all go by id.

    Raises:
        ConfigError: names the first duplicates and the ways out.
    """
    twice = [(value, n) for value, n in Counter(str(v) for v in ids if not is_missing(v)).items() if n > 1]
    if twice:
        shown = ", ".join(f"{value!r} ({n} times)" for value, n in twice[:3])
        raise ConfigError(
            [
                f"id: column {column!r} holds {len(twice)} ids more than once: {shown}. Ids must be unique: leave `id` "
                f"out to number the records, and say `group: {column}` if equal values mark positives of each other"
            ]
        )


def is_missing(value: Any) -> bool:
    """Whether a raw value says "nothing here": None, or the NaN that tables write for it."""
    return value is None or (isinstance(value, float) and value != value)


def unwrap_media(value: Any, folder: Path | UrlFolder | None = None) -> Any:
    """The content of a Hugging Face media cell ``{"bytes", "path"}``: its bytes, else its path; other values as is."""
    if not (isinstance(value, Mapping) and value.keys() == {"bytes", "path"}):
        return value
    if value["bytes"] is not None:
        return value["bytes"]
    if value["path"] is None:
        return None
    return Path(value["path"]) if folder is None else folder / value["path"]


def _group(value: Any) -> int | str | None:
    try:
        return None if is_missing(value) else _class(value, "group")
    except BadSampleError:  # met again, and counted, when the record is read
        return None


def _class(value: Any, what: str) -> int | str | None:
    """A label or group as Python's own int or str; tables hand over numpy scalars, bools and floats like 3.0."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, int)) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise BadSampleError(f"wrong {what}", f"a {what} is text or a whole number, got {value!r}")
