"""Files of a recipe: paths, globs, braces, and whatever fsspec reads (``s3://``, ``gs://``, ``https://``, ``hf://`` …).

A file of this machine stays a path; only URLs go through fsspec. What a transfer raises is turned into `OSError`, so
that a broken one is met by the same hands as a broken disk.
"""

from __future__ import annotations

import glob
import io
import os
import posixpath
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from mmrep.config import ConfigError
from mmrep.encoder import BadSampleError
from mmrep.registry import MissingPackageError, near, require

_STAMPS = ("size", "mtime", "created", "LastModified", "last_modified", "Last-Modified", "ETag", "etag", "updated")
_AT_ONCE = 16
_NOT_THERE = (404, 410)


class UrlFolder(str):
    """A folder behind a URL; like `Path`, ``folder / name`` is a file in it (a URL)."""

    def __truediv__(self, name: str) -> str:
        return name if is_url(name) else f"{self}/{name}"


@dataclass(frozen=True)
class DataFile:
    """One file.

    Attributes:
        url: absolute path on this machine, or URL.
        path: the same as a `Path`; None behind a URL.
        version: what is known of a remote file's size and time of change.
    """

    url: str
    path: Path | None = None
    version: str = field(default="", compare=False)

    @classmethod
    def local(cls, path: Path | str) -> DataFile:
        """A file of this machine. Absolute, not resolved: files beside a link are looked for beside the link."""
        return cls(Path(path).absolute().as_posix(), Path(path).absolute())

    @property
    def folder(self) -> Path | UrlFolder:
        """Where relative paths inside the file start."""
        return self.path.parent if self.path is not None else UrlFolder(posixpath.dirname(self.bare))

    @property
    def bare(self) -> str:
        """The URL without the query of an ``http`` address, which may hold a signature."""
        return self.url.split("?")[0] if urlsplit(self.url).scheme in ("http", "https") else self.url

    @property
    def suffix(self) -> str:
        """``.csv``, in lower case; of ``zip://a.csv::s3://…`` that of the inner file."""
        return next(filter(None, (posixpath.splitext(link)[1].lower() for link in self.bare.split("::"))), "")

    @property
    def stamp(self) -> tuple[object, ...]:
        """What tells one content from another without reading it."""
        if self.path is None:
            return self.url, self.version
        stat = self.path.stat()
        return str(self.path), stat.st_size, stat.st_mtime_ns

    def open(self) -> BinaryIO:
        """The content from its beginning, to be read forwards. Raises OSError, then and while reading.

        A remote file may give fewer bytes than were asked for: what has come is of use, even if nothing follows.
        """
        return self.path.open("rb") if self.path is not None else cast(BinaryIO, _Transfer(self.url))

    def read(self) -> bytes:
        """The whole content. Raises OSError."""
        with self.open() as file:
            return file.read()

    def __str__(self) -> str:
        return self.url


class _Transfer(io.RawIOBase):
    """A remote file read forwards; whatever its file system raises comes out as OSError."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._file: Any = None
        fs, path = _file_system(url)
        # One request for the whole file: asking a web server for ranges fails where it knows none.
        options = {"block_size": 0} if "https" in _protocols(fs) else {}
        self._file = _told(url, lambda: fs.open(path, "rb", **options))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = _told("transfer", lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def _told(what: str, action: Any) -> Any:
    try:
        return action()
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:  # every file system brings its own: aiohttp's, botocore's, …
        raise OSError(f"{what}: {type(error).__name__}: {error}") from error


def is_url(name: str) -> bool:
    """Whether fsspec is to read it."""
    return "://" in name or "::" in name


def read_url(url: str) -> bytes:
    """The content behind a URL that a sample holds.

    Raises:
        BadSampleError: there is none, or the transfer broke.
    """
    try:
        return DataFile(url).read()
    except OSError as error:
        raise BadSampleError("unreadable file", f"{url}: {error}") from error


def names(files: Sequence[DataFile]) -> list[str]:
    """Each file's path below the folder that all have in common: unique, and short enough for an id."""
    split = [file.bare.split("/") for file in files]
    if len({tuple(parts) for parts in split}) < len(split):
        split = [file.url.split("/") for file in files]
    folders = zip(*(parts[:-1] for parts in split), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, folders))
    return ["/".join(parts[shared:]) for parts in split]


def expand(patterns: Iterable[str], key: str) -> list[DataFile]:
    """Paths, URLs, globs and braces to existing files, sorted within each glob, each file once.

    Args:
        patterns: such as ``train-{000..099}.tar``, ``s3://bucket/train-*.tar`` or ``~/captions.csv``.
        key: the config key, for messages.

    Raises:
        ConfigError: a pattern matches nothing; the message names similar files of its folder.
        MissingPackageError: the URL's protocol needs a package that is absent.
    """
    every: list[str] = []
    for pattern in patterns:
        whole = "{" not in pattern or os.path.isfile(os.path.expanduser(pattern))
        every.extend([pattern] if whole else require("braceexpand", "webdataset").braceexpand(pattern))
    found: dict[DataFile, None] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # a hundred shards would otherwise be asked for one after the other
        asked = [pool.submit(_remote, name, key) if is_url(name) else None for name in every]
        for name, waiting in zip(every, asked, strict=True):
            found.update(dict.fromkeys(_local(name, key) if waiting is None else waiting.result()))
    return list(found)


def _local(pattern: str, key: str) -> list[DataFile]:
    name = os.path.expanduser(pattern)
    matches = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
    if matches:
        return [DataFile.local(match) for match in matches]
    folder = Path(name).parent
    if not folder.is_dir():
        hint = "" if glob.has_magic(str(folder)) else f": there is no folder {folder}"
        raise ConfigError([f"{key}: {pattern!r} matches no file{hint}"])
    raise _nothing(pattern, key, Path(name).name, str(folder), sorted(p.name for p in folder.iterdir() if p.is_file()))


def _remote(pattern: str, key: str) -> list[DataFile]:
    try:
        fs, path = _file_system(pattern)
    except ImportError as error:
        extra = ': pip install "mmrep[s3]"' if pattern.startswith("s3") else ""
        raise MissingPackageError(f"{key}: {pattern!r}: {error}{extra}") from error
    except ValueError as error:
        raise ConfigError([f"{key}: {pattern!r}: {error}"]) from error
    if "file" in _protocols(fs):
        return _local(path, key)
    web = "https" in _protocols(fs)  # whose addresses may hold a question mark
    try:
        magic = any(sign in pattern for sign in ("*[" if web else "*[?"))
        found = _told(pattern, lambda: _matches(fs, path, magic))
    except OSError as error:
        raise ConfigError([f"{key}: {pattern!r} cannot be reached: {error}"]) from error
    if not found:
        folder = posixpath.dirname(path)
        raise _nothing(pattern, key, posixpath.basename(path), posixpath.dirname(pattern), _listed(fs, folder))
    return [DataFile(url if chained else fs.unstrip_protocol(name), None, version)
            for (name, version), url, chained in ((item, pattern, "::" in pattern) for item in found)]  # fmt: skip


def _matches(fs: Any, path: str, magic: bool) -> list[tuple[str, str]]:
    try:
        info = fs.info(path)
        if info.get("type") == "file":
            return [(path, _version(info))]
    except FileNotFoundError as error:
        why = error.__cause__
        if "https" in _protocols(fs) and why is not None and getattr(why, "status", None) not in _NOT_THERE:
            raise OSError(f"{type(why).__name__}: {why}") from error  # whatever failed, it says "not found"
    found = fs.glob(path, detail=True) if magic else {}
    return [(name, _version(info)) for name, info in sorted(found.items()) if info.get("type") == "file"]


def _version(info: dict[str, Any]) -> str:
    return ",".join(f"{key}={info[key]}" for key in _STAMPS if info.get(key) is not None)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec.core

    return fsspec.core.url_to_fs(url)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _listed(fs: Any, folder: str) -> list[str]:
    """File names in a remote folder; none where the server does not list them."""
    try:
        found = _told(folder, lambda: fs.ls(folder, detail=True))
    except OSError:
        return []
    return sorted(posixpath.basename(item["name"]) for item in found if item.get("type") == "file")


def _nothing(pattern: str, key: str, name: str, folder: str, there: Sequence[str]) -> ConfigError:
    hint = f"{near(name, there) or '.'} {folder} holds: {', '.join(there[:10]) or 'no files'}"
    return ConfigError([f"{key}: {pattern!r} matches no file{hint}"])
