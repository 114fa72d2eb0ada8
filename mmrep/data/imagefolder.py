"""A folder of pictures, with classes, captions and further columns where it has them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmrep.config import ConfigError, config
from mmrep.data.sample import Sample
from mmrep.data.source import Source, SourceConfig, require_unique
from mmrep.data.table import open_rows
from mmrep.encoder import BadSampleError
from mmrep.registry import near

SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .tga .ico .jp2 .avif .heic".split()
)
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@config
class ImageFolderConfig(SourceConfig):
    """path: the folder, read recursively. classes: class folders to read, in label order; None = all, sorted.

    label: a metadata column; None = the class folder.
    """

    path: str
    classes: list[str] | None = None


class ImageFolder(Source):
    """Pictures below a folder, sorted by path; the id is the path below the folder.

    A picture in a sub-folder has the top-most one as its class: ``label`` is the class's index in `class_names` and
    the column ``class_name`` its name. Further columns come from ``metadata.jsonl``, ``.csv`` or ``.parquet``, whose
    ``file_name`` is relative to the metadata's own folder (the convention of Hugging Face's imagefolder), and
    ``caption`` from a text file beside the picture (``cat.png``, ``cat.txt``). A picture that the metadata names and
    that does not exist is a bad sample when it is read.
    """

    Config = ImageFolderConfig

    def __init__(self, config: ImageFolderConfig) -> None:
        super().__init__(config)
        self._root = Path(config.path).expanduser().absolute()
        if not self._root.is_dir():
            parent = self._root.parent
            there = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
            raise ConfigError([f"path: {config.path!r} is no folder{near(self._root.name, there) or '.'}"])
        files = set(_walk(self._root))
        rows = self._metadata(files)
        images = sorted({name for name in files if _is_image(name)} | {n for n in rows if not n.startswith("\0")})
        folders = {name: name.split("/", 1)[0] for name in images if "/" in name}
        self.class_names = self._classes(sorted(set(folders.values())))
        if config.classes is not None:
            images = [name for name in images if folders.get(name) in config.classes]
        if not images:
            suffixes = ", ".join(sorted(SUFFIXES))
            raise ConfigError([f"path: {config.path!r} holds no picture (a file ending in {suffixes})"])
        self._names = images + [name for name in rows if name.startswith("\0")]
        self._rows = rows
        self._sidecars = {name for name in images if os.path.splitext(name)[0] + ".txt" in files}
        extra = dict.fromkeys(column for row in rows.values() if isinstance(row, Mapping) for column in row)
        columns = dict.fromkeys(["image", *(["class_name"] if folders else []), *extra])
        self.columns = tuple(columns | (dict.fromkeys(["caption"]) if self._sidecars else {}))
        self.require_special_columns()
        if config.id is not None:
            require_unique((row.get(config.id) for row in rows.values() if isinstance(row, Mapping)), config.id)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        name = self._names[index]
        row = self._rows.get(name, {})
        if isinstance(row, BadSampleError):
            raise row
        fields: dict[str, Any] = {"image": self._root / name}
        label = None
        if self.class_names is not None and "/" in name:
            fields["class_name"] = name.split("/", 1)[0]
            label = self.class_names.index(fields["class_name"])
        if name in self._sidecars:
            fields["caption"] = _text((self._root / name).with_suffix(".txt"))
        sample = self.make_sample(fields | {k: v for k, v in row.items() if v != ""}, name)
        return sample if self.config.label is not None else replace(sample, label=label)

    def record_id(self, index: int) -> str:
        return self._names[index].removeprefix("\0")

    def column(self, name: str) -> list[Any]:
        """See `Source.column`; ``caption`` texts beside the pictures count as media."""
        self.require_columns([name], "column")
        if name == "image" or (name == "caption" and self._sidecars):
            return list(super().column(name))
        rows = [self._rows.get(file, {}) for file in self._names]
        values = [row.get(name) if isinstance(row, Mapping) else None for row in rows]
        if name == "class_name" and not any(isinstance(row, Mapping) and name in row for row in rows):
            return [file.split("/", 1)[0] if "/" in file else None for file in self._names]
        return [None if value == "" else value for value in values]

    def fingerprint(self) -> str:
        """Names, sizes and times of change of the pictures."""
        known = [self._root / name for name in self._names if (self._root / name).is_file()]
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in known]
        return f"imagefolder:{stats}:{self.config}"

    def _classes(self, found: list[str]) -> list[str] | None:
        wanted = self.config.classes
        if wanted is None:
            return found or None
        problems = [
            f"classes: {name!r} is no folder of {self._root}{near(name, found) or '.'} "
            f"It has: {', '.join(found) or 'none'}"
            for name in wanted
            if name not in found
        ]
        if problems or not wanted:
            raise ConfigError(problems or ["classes: the list is empty; leave it out to read all"])
        return list(wanted)

    def _metadata(self, files: set[str]) -> dict[str, Mapping[str, Any] | BadSampleError]:
        """Picture → its row; a line that cannot be read is kept under a name that no file can have."""
        found: dict[str, Mapping[str, Any] | BadSampleError] = {}
        for file in sorted(name for name in files if name.rsplit("/", 1)[-1] in METADATA):
            table = open_rows(self._root / file)
            if "file_name" not in table.columns:
                hint = near("file_name", table.columns) or "."
                has = ", ".join(table.columns)
                raise ConfigError([f"{self._root / file}: needs a column 'file_name'{hint} It has: {has}"])
            folder = file.rpartition("/")[0]
            for number in range(len(table)):
                try:
                    row = dict(table.row(number))
                    name = row.pop("file_name", None)
                    if not isinstance(name, str) or not name:
                        raise BadSampleError("malformed row", f"row {number} of {file} names no file")
                except BadSampleError as error:
                    found[f"\0{file}:{number}"] = error
                    continue
                path = os.path.normpath(f"{folder}/{name}" if folder else name).replace(os.sep, "/")
                if path in found:
                    here = self._root / file
                    raise ConfigError([f"{here}: {name!r} has two rows; give it one, with a list of captions"])
                found[path] = row
        return found


def _walk(root: Path) -> Iterator[str]:
    """Files below ``root``, relative, hidden ones left out; links to folders are followed, once."""
    visited: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        base = Path(folder).relative_to(root)
        yield from ((base / name).as_posix() for name in files if not name.startswith("."))


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise BadSampleError("invalid utf-8", f"{path}: {error}") from error
    except OSError as error:
        raise BadSampleError("unreadable file", str(error)) from error
