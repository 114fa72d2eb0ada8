"""Furniture of Sweet Home 3D: shapes, icons and names in twenty languages.

The data are the Debian packages ``sweethome3d-furniture`` (1.8: five catalogues by others, 820 models, CC0 and
CC-BY 3.0) and ``sweethome3d`` (the program, whose jar holds 100 models by eTeks). The program draws in Java. To have
the files alone, unpack both where you run mmrep, or anywhere and let ``root`` say where::

    apt-get download sweethome3d sweethome3d-furniture
    for file in sweethome3d*.deb; do dpkg -x $file .; done    # ./usr/share/sweethome3d

A catalogue is a zip with a property file of entries, a mesh (OBJ) and an icon for each, and a property file of names a
language. Eight entries are light sources: they have a name and an icon, and no surface.
"""

from __future__ import annotations

import functools
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mmrep.config import ConfigError, config
from mmrep.data.sample import stable_hash
from mmrep.data.sets._obj import read_obj, sample_surface
from mmrep.data.sets._options import wrong_names
from mmrep.data.sets._packages import debian_version, find, sizes
from mmrep.data.sets._rows import RowSource
from mmrep.data.source import SourceConfig
from mmrep.encoder import BadSampleError

ROOT = "/usr/share/sweethome3d"
COMMAND = "apt-get install sweethome3d-furniture sweethome3d"

# Catalogue → file below the root, and the stem of its property files.
CATALOGUES = {
    "Scopia": ("furniture/Scopia.sh3f", "PluginFurnitureCatalog"),
    "BlendSwap-CC-0": ("furniture/BlendSwap-CC-0.sh3f", "PluginFurnitureCatalog"),
    "BlendSwap-CC-BY": ("furniture/BlendSwap-CC-BY.sh3f", "PluginFurnitureCatalog"),
    "KatorLegaz": ("furniture/KatorLegaz.sh3f", "PluginFurnitureCatalog"),
    "Reallusion": ("furniture/Reallusion.sh3f", "PluginFurnitureCatalog"),
    "eTeks": ("sweethome3d.jar", "com/eteks/sweethome3d/io/DefaultFurnitureCatalog"),
}

_ENTRY = re.compile(r"(?P<key>\w+)#(?P<number>\d+)\s*[=:]\s*(?P<value>.*)")
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_VERSION = 1  # of the sampled points: raise it when the same mesh gives others
_NOT_SAID = {"Blend Swap", "SCPTS", "Default", "Adjustable"}  # tags that tell the source, or how the program treats it


@config
class SweetHomeConfig(SourceConfig):
    """root: the folder ``sweethome3d``; None = where Debian installs it, or ``./usr/share/sweethome3d``.

    split: part of the catalogues. held_out: catalogues of the test; validation: of the validation; the others train.
    languages: of ``caption``, which lists the names in all of them. tags: also list the English name with its tags
    ("Armchair, seat, couch"). points: of a shape; 0 = read no shapes. cache: folder that keeps the sampled points
    between runs; None = in memory only, and the first epoch reads the meshes (40 ms each).
    """

    root: str | None = None
    split: Literal["train", "validation", "test", "all"] = "train"
    held_out: list[str] = field(default_factory=lambda: ["KatorLegaz", "eTeks"])
    validation: list[str] = field(default_factory=lambda: ["BlendSwap-CC-BY"])
    languages: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["en"])
    tags: bool = True
    points: Annotated[int, Field(ge=0)] = 2048
    cache: str | None = None
    label: str | None = "category"
    group: str | None = "concept"


class SweetHome(RowSource):
    """One row per catalogue entry.

    Columns: ``shape`` (``{"points": float32 [points, 3]}``, spread evenly over the surface, in metres; x to the right,
    y up, the middle of the bounding box at 0; the same points each time), ``icon`` (PNG bytes, 128 pixels),
    ``caption`` (list of names), ``category``, ``source`` (the catalogue), ``creator`` and ``concept`` (the English
    name). Entries of one name are positives of each other, and the twelve categories are the classes.

    The split goes by catalogue: shapes of a test are of makers whose models were never seen. Names recur.
    """

    Config = SweetHomeConfig
    columns = ("shape", "icon", "caption", "category", "source", "creator", "concept")
    media_columns = ("shape", "icon")
    config: SweetHomeConfig

    def __init__(self, config: SweetHomeConfig) -> None:
        super().__init__(config)
        _check_catalogues(config)
        self._root = find(config.root, ROOT, "furniture/*.sh3f", COMMAND)
        chosen = [name for name in CATALOGUES if config.split in ("all", _part(name, config))]
        absent = [name for name in chosen if not (self._root / CATALOGUES[name][0]).is_file()]
        if absent:
            raise ConfigError([
                f"root: no {CATALOGUES[name][0]} in {str(self._root)!r}, which is the catalogue {name!r}; install it "
                f"with `{COMMAND}`"
                for name in absent
            ])  # fmt: skip
        entries = [(name, entry) for name in chosen for entry in _entries(self._root, name)]
        known = {language for _, entry in entries for language in entry["names"]}
        problems = wrong_names("languages", config.languages, known, "name in")
        if entries and problems:
            raise ConfigError(problems)
        self._entries = [entry for _, entry in entries]
        self._shapes: dict[int, np.ndarray | None] = {}
        self._icons: dict[int, bytes | None] = {}
        rows = [(entry["id"], _row(name, entry, config)) for name, entry in entries]
        self.set_rows(rows, f"split: no catalogue is in {config.split!r}; name one in `held_out` or `validation`")

    def media(self, index: int) -> Mapping[str, Any]:
        """The shape and the icon; both are kept in memory."""
        entry = self._entries[index]
        if index not in self._icons:
            self._icons[index] = _read(entry["archive"], entry["icon"])
            if self._icons[index] is None and entry["icon"]:
                raise BadSampleError("missing file", f"{entry['icon']} in {entry['archive']}")
        if index not in self._shapes:
            self._shapes[index] = self._shape(entry) if self.config.points else None
        points = self._shapes[index]
        return {"shape": None if points is None else {"points": points}, "icon": self._icons[index]}

    def fingerprint(self) -> str:
        """The config, the versions of the packages, and names and sizes of the catalogues."""
        packages = [debian_version(name, self._root) for name in ("sweethome3d-furniture", "sweethome3d")]
        files = [
            self._root / CATALOGUES[name][0] for name in CATALOGUES if (self._root / CATALOGUES[name][0]).is_file()
        ]
        return f"sweet-home:{self.config}:{packages}:{sizes(files, self._root)}"

    def _shape(self, entry: Mapping[str, Any]) -> np.ndarray | None:
        file = None
        if self.config.cache is not None:
            info = _info(entry["archive"], entry["model"])
            name = stable_hash(_VERSION, entry["id"], None if info is None else info.CRC, self.config.points)
            file = Path(self.config.cache).expanduser() / f"{name:016x}.npy"
            if file.is_file():
                return np.load(file, allow_pickle=False)
        data = _read(entry["archive"], entry["model"])
        if data is None:
            raise BadSampleError("missing file", f"{entry['model']} in {entry['archive']}")
        corners, triangles = read_obj(data)
        if not len(triangles):
            return None
        points = _to_scale(corners, triangles, entry, self.config.points)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.tmp")
            with partial.open("wb") as out:
                np.save(out, points)
            partial.replace(file)  # two processes may write the same
        return points


def _part(catalogue: str, config: SweetHomeConfig) -> str:
    if catalogue in config.held_out:
        return "test"
    return "validation" if catalogue in config.validation else "train"


def _check_catalogues(config: SweetHomeConfig) -> None:
    both = sorted(set(config.held_out) & set(config.validation))
    problems = [f"validation: {name!r} is in held_out too; a catalogue is in one part" for name in both]
    for key in ("held_out", "validation"):
        problems += wrong_names(key, getattr(config, key), CATALOGUES, "catalogue")
    if problems:
        raise ConfigError(problems)


def _entries(root: Path, catalogue: str) -> list[dict[str, Any]]:
    """The entries of a catalogue, in its own order."""
    file, stem = CATALOGUES[catalogue]
    archive = str(root / file)
    found = _properties(archive, f"{stem}.properties")
    translated = {
        name[len(stem) + 1 : -len(".properties")]: _properties(archive, name)
        for name in _open(archive, os.getpid()).namelist()
        if name.startswith(f"{stem}_") and name.endswith(".properties")
    }
    entries = []
    for number, entry in found.items():
        names = {"en": entry.get("name", "")} | {code: of[number].get("name", "") for code, of in translated.items()
                                                 if number in of}  # fmt: skip
        entries.append({
            **entry,
            "id": entry.get("id", f"{catalogue}#{number}"),
            "names": {code: name for code, name in names.items() if name},
            "archive": archive,
            "model": entry.get("model", "").lstrip("/"),
            "icon": entry.get("icon", "").lstrip("/"),
        })  # fmt: skip
    return entries


def _properties(archive: str, name: str) -> dict[str, dict[str, str]]:
    """Number of an entry → its keys, of a Java property file (ISO 8859-1 with escapes)."""
    text = (_read(archive, name) or b"").decode("latin-1")
    found: dict[str, dict[str, str]] = {}
    for line in re.sub(r"\\\r?\n[ \t]*", "", text).splitlines():
        if match := _ENTRY.fullmatch(line.strip()):
            value = _ESCAPE.sub(lambda code: chr(int(code[1], 16)), match["value"]).replace("\\", "").strip()
            found.setdefault(match["number"], {})[match["key"]] = value
    return found


def _row(catalogue: str, entry: Mapping[str, Any], config: SweetHomeConfig) -> dict[str, Any]:
    captions = [entry["names"][code] for code in config.languages if code in entry["names"]]
    tags = [tag.strip() for tag in entry.get("tags", "").split(",")]
    tags = [tag.lower() for tag in tags if tag and tag not in _NOT_SAID]
    name = entry["names"].get("en", "")
    if config.tags and tags and name:
        captions.append(", ".join([name, *tags]))
    return {
        "caption": captions or None,
        "category": entry.get("category") or None,
        "source": catalogue,
        "creator": entry.get("creator") or None,
        "concept": name.casefold() or entry["id"],
    }


def _to_scale(corners: np.ndarray, triangles: np.ndarray, entry: Mapping[str, Any], count: int) -> np.ndarray:
    """Points on a mesh that stands in the box of the entry's width, height and depth, float32 [count, 3] in metres."""
    if "modelRotation" in entry:
        corners = corners @ np.array(entry["modelRotation"].split(), dtype=np.float64).reshape(3, 3).T
    used = corners[np.unique(triangles)]
    low, high = used.min(axis=0), used.max(axis=0)
    size = np.array([float(entry[key]) / 100 for key in ("width", "height", "depth")])
    extent = high - low
    # A flat thing (a picture, a carpet) has no thickness to stretch.
    corners = (corners - (low + high) / 2) * np.divide(size, extent, out=np.ones(3), where=extent > 0)
    return sample_surface(corners, triangles, count, stable_hash("shape", entry["id"])).astype(np.float32)


@functools.lru_cache(maxsize=32)
def _open(archive: str, process: int) -> zipfile.ZipFile:
    """An archive, opened once in each process: a forked one would share its place in the file with its parent."""
    return zipfile.ZipFile(archive)


def _info(archive: str, name: str) -> zipfile.ZipInfo | None:
    try:
        return _open(archive, os.getpid()).getinfo(name)
    except KeyError:
        return None


def _read(archive: str, name: str) -> bytes | None:
    """A member of an archive; None if it has no such member."""
    if _info(archive, name) is None:
        return None
    try:
        return _open(archive, os.getpid()).read(name)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
        raise BadSampleError("unreadable file", f"{name} in {archive}: {error}") from error
