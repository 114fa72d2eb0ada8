"""Where an installed package lies, which version it is, and the command that brings it where it is absent."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from mmrep.config import ConfigError


def find(root: str | None, default: str, holds: str, command: str) -> Path:
    """The folder of a data set.

    Args:
        root: where the user says that it lies; None = ``default``, or else the same path below the working directory,
            where ``dpkg -x package.deb .`` puts what ``apt-get install`` would put below ``/``.
        default: where the package installs it.
        holds: a pattern of what must be there, such as ``"*/*.txt"``.
        command: what installs the package.

    Raises:
        ConfigError: nothing of that name is there; the message is the command.
    """
    places = [Path(root).expanduser()] if root is not None else [Path(default), Path(default.lstrip("/"))]
    for folder in places:
        if folder.is_dir() and next(folder.glob(holds), None) is not None:
            return folder
    there = "holds no" if places[0].is_dir() else "is no folder with"
    raise ConfigError([
        f"root: {str(places[0])!r} {there} {holds}; install the data with `{command}`, or let `root` say where it lies"
    ])  # fmt: skip


def find_module(module: str, root: str | None, below: str, holds: str, command: str) -> Path:
    """The folder ``below`` a Python package, which is not imported; arguments and errors as `find`.

    ``root`` takes the place of the package's own folder.
    """
    if root is None:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError([
                f"root: the package {module!r} is not installed; install it with `{command}`, or let `root` say where "
                f"it lies"
            ])  # fmt: skip
        root = next(iter(spec.submodule_search_locations))
    return find(str(Path(root) / below), "", holds, command)


def python_version(package: str) -> str:
    """The installed version of a Python distribution, ``"unknown"`` if it has no metadata."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def debian_version(package: str, folder: Path) -> str:
    """The version that a Debian package's own change log opens with; ``"unknown"`` where documentation is left out.

    Args:
        package: its name.
        folder: what was installed or unpacked, below a folder ``share``: ``/usr/share/tuxpaint/stamps``.
    """
    for share in (parent for parent in folder.absolute().parents if parent.name == "share"):
        for file in sorted((share / "doc" / package).glob("changelog*.gz")):  # changelog.Debian.gz comes first
            with gzip.open(file, "rt", encoding="utf-8", errors="replace") as lines:
                if found := re.search(r"\((\S+)\)", lines.readline()):
                    return found[1]
    return "unknown"


def npm_version(folder: Path) -> str:
    """The version in the ``package.json`` of an npm package."""
    file = folder / "package.json"
    return str(json.loads(file.read_text(encoding="utf-8")).get("version")) if file.is_file() else "unknown"


def sizes(files: Iterable[Path], root: Path) -> str:
    """A digest of the names below ``root`` and the sizes of files: the same on every machine with the same data."""
    digest = blake2b(digest_size=8)
    for name, size in sorted((file.relative_to(root).as_posix(), file.stat().st_size) for file in files):
        digest.update(f"{name}\x1f{size}\x1e".encode())
    return digest.hexdigest()
