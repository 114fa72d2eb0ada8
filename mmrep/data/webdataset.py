"""Tar shards in the webdataset format: files that share a name up to the first dot are one sample."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import field
from itertools import count
from typing import Any

from mmrep.config import config
from mmrep.data.files import DataFile, expand, names
from mmrep.data.sample import Quarantined, Sample, stable_hash
from mmrep.data.source import Source, SourceConfig
from mmrep.encoder import BadSampleError
from mmrep.registry import require

_BLOCK = 2**18
_TEXT = frozenset({"txt", "text", "caption", "transcript"})


@config
class WebDatasetConfig(SourceConfig):
    """shards: a path or URL, glob or brace pattern (``s3://bucket/train-{000..099}.tar``), or a list of them.

    columns: column → extension, or several separated by ``;`` of which the first present is taken
    (``{image: "png;jpg;jpeg;webp", caption: txt}``); empty = every extension is a column.
    """

    shards: str | list[str]
    columns: dict[str, str] = field(default_factory=dict)


class WebDataset(Source):
    """A stream of samples from tar shards, on disk or behind any URL that fsspec knows. The id is ``shard name/key``.

    ``txt`` becomes text, ``json`` is parsed, ``cls`` is a whole number, anything else stays bytes. A damaged shard
    yields what comes before the damage and one quarantined entry; a sample that the damage may have cut is left out.
    A shard that has gone since the run started, and a transfer that breaks off, are damages too; nothing is tried
    twice. A remote shard is read forwards in one transfer and never kept.
    """

    Config = WebDatasetConfig
    streaming = True

    def __init__(self, config: WebDatasetConfig) -> None:
        super().__init__(config)
        require("webdataset", "webdataset")
        self._shards = expand([config.shards] if isinstance(config.shards, str) else config.shards, "shards")
        self._names = dict(zip(self._shards, names(self._shards), strict=True))
        self.columns = tuple(config.columns) or None
        self.require_special_columns()

    def stream(self, part: int = 0, parts: int = 1, seed: int | None = None) -> Iterator[Sample | Quarantined]:
        """See `Source.stream`. Whole shards go to a part if there are enough of them, else single samples."""
        shards = self._shards
        if seed is not None:
            shards = sorted(shards, key=lambda shard: stable_hash(seed, self._names[shard]))
        if len(shards) >= parts:
            for shard in shards[part::parts]:
                yield from self._shard(shard)
            return
        number = count()
        for shard in shards:
            yield from (record for record in self._shard(shard) if next(number) % parts == part)

    def fingerprint(self) -> str:
        """Paths, sizes and times of change of the shards."""
        return f"webdataset:{[shard.stamp for shard in self._shards]}:{self.config}"

    def _shard(self, shard: DataFile) -> Iterator[Sample | Quarantined]:
        tariterators = require("webdataset.tariterators", "webdataset")
        damage: list[str] = []
        held: Mapping[str, Any] | None = None
        for group in tariterators.group_by_keys(_files(shard, damage), handler=lambda error: _note(damage, error)):
            if held is not None:
                yield self._record(shard, held)
            held = group
        if held is not None and (not damage or self._is_whole(held)):
            yield self._record(shard, held)
        if damage:
            yield Quarantined(self._names[shard], "", "damaged shard", f"{shard}: {damage[0]}")

    def _is_whole(self, group: Mapping[str, Any]) -> bool:
        """Whether the last group before a damage certainly lost nothing."""
        wanted = self.config.columns.values()
        return bool(wanted) and all(any(s in group for s in _suffixes(choices)) for choices in wanted)

    def _record(self, shard: DataFile, group: Mapping[str, Any]) -> Sample | Quarantined:
        name = f"{self._names[shard]}/{group['__key__']}"
        columns = self.config.columns or {key: key for key in group if not key.startswith("__")}
        row: dict[str, Any] = {}
        column = ""
        try:
            for column, choices in columns.items():
                suffix = next((s for s in _suffixes(choices) if s in group), None)
                if suffix is not None:
                    row[column] = _decode(suffix, group[suffix])
            column = ""
            return self.make_sample(row, name)
        except BadSampleError as error:
            return Quarantined(name, column, error.cause, str(error))


def _suffixes(choices: str) -> list[str]:
    return [suffix.strip().lstrip(".").lower() for suffix in choices.split(";")]


def _note(damage: list[str], error: Exception) -> bool:
    """Keep the error and stop reading the shard."""
    damage.append(str(error.args[0]))
    return False


class _Tar(tarfile.TarFile):
    """Knows whether it was read to its end-of-archive block.

    tarfile ends silently at a header that it cannot read, so only that block tells a whole archive from a cut one.
    """

    whole = False

    class tarinfo(tarfile.TarInfo):  # the attribute that tarfile looks up
        @classmethod
        def fromtarfile(cls, tarfile: Any) -> Any:
            try:
                return super().fromtarfile(tarfile)
            except EndOfArchive:
                tarfile.whole = True
                raise


EndOfArchive: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]


def _files(shard: DataFile, damage: list[str]) -> Iterator[dict[str, Any]]:
    """The regular files of a tar, in the form that webdataset groups; stops at the first damage and notes it."""
    try:
        with shard.open() as raw, _Tar.open(fileobj=raw, mode="r|*", bufsize=_BLOCK) as tar:
            while (info := tar.next()) is not None:
                content = tar.extractfile(info) if info.isreg() else None
                if content is not None:
                    yield {"fname": info.name, "data": content.read(), "__url__": str(shard)}
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
            if not tar.whole:
                damage.append(f"no end-of-archive block at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        damage.append(str(error))


def _decode(suffix: str, data: bytes) -> Any:
    kind = suffix.rsplit(".", 1)[-1]
    if kind not in _TEXT | {"json", "cls"}:
        return data
    try:
        text = data.decode()
        if kind == "json":
            return json.loads(text)
        return int(text) if kind == "cls" else text
    except UnicodeDecodeError as error:
        raise BadSampleError("invalid utf-8", f".{suffix}: {error}") from error
    except ValueError as error:
        raise BadSampleError(f"invalid {kind}", str(error)) from error
