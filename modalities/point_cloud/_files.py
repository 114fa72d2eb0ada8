"""The content of a file of points or triangles, by format."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import PurePath
from typing import Any

import numpy as np

from mmrep.encoder import BadSampleError
from mmrep.modalities.point_cloud._columns import Columns, split
from mmrep.modalities.point_cloud._surface import read_geometry
from mmrep.registry import near, require

MAX_BYTES = 1 << 30
MESHES = ("ply", "obj", "glb", "gltf", "off", "stl")
TEXTS = ("xyz", "pts", "txt", "csv")
FORMATS = (*MESHES, "npy", "npz", *TEXTS)
_BEGINNINGS = {
    b"ply\n": "ply", b"ply\r": "ply", b"glTF": "glb", b"OFF\n": "off", b"OFF\r": "off", b"COFF": "off",
    b"\x93NUM": "npy", b"PK\x03\x04": "npz", b"LASF": "las",
}  # fmt: skip
# What readers of trimesh, numpy and zipfile raise over damaged files. An ImportError is not among them: a missing
# package is no fault of the sample.
ERRORS = (
    OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, MemoryError,
    NotImplementedError, RecursionError, NameError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def read_file(
    data: bytes, name: str, *, columns: Columns | None, samples: int, seed: int, limit: int
) -> dict[str, Any]:
    """``points``, ``colors`` and ``normals`` of a file; arguments as in `decode`."""
    if len(data) > MAX_BYTES:
        raise BadSampleError("too large", f"a file of more than {MAX_BYTES} bytes")
    kind = format_of(data, name)
    try:
        if kind in TEXTS:
            return _text(data, columns)
        if kind in ("npy", "npz"):
            return _arrays(data, kind, columns)
        return read_geometry(_load(data, kind), samples=samples, seed=seed, limit=limit)
    except ERRORS as error:
        if isinstance(error, BadSampleError):
            raise
        raise BadSampleError("damaged cloud", f"as {kind}: {type(error).__name__}: {str(error)[:200]}") from error


def format_of(data: bytes, name: str) -> str:
    """One of `FORMATS`: by the suffix of the name, or else by how the content begins.

    Raises:
        BadSampleError: ``unknown format``.
    """
    suffix = PurePath(name).suffix.lower().removeprefix(".")
    if suffix in FORMATS:
        return suffix
    kind = _BEGINNINGS.get(data[:4]) or ("gltf" if data[:1] == b"{" and b'"asset"' in data else "")
    if kind in FORMATS and not suffix:
        return kind
    told = f"{suffix!r}{near(suffix, FORMATS)}" if suffix else "bytes that begin as no format does"
    if "las" in (kind, suffix) or suffix == "laz":
        raise BadSampleError("unknown format", "LAS is not read; convert it to PLY, or give arrays that laspy reads")
    raise BadSampleError(
        "unknown format", f'{told}; give a name with a suffix ({{"bytes": …, "path": "a.ply"}}): {", ".join(FORMATS)}'
    )


def _load(data: bytes, kind: str) -> Any:
    """A trimesh scene. Nothing beside the file is opened: there is no resolver for textures, materials or buffers."""
    exchange = require("trimesh.exchange.load", "point-cloud")
    inside = {} if kind in ("glb", "gltf") else {"skip_materials": True}  # only these can hold their own textures
    scene = exchange.load_scene(
        io.BytesIO(data), file_type=kind, resolver=None, allow_remote=False, process=False, **inside
    )
    if kind == "ply":
        for geometry in scene.geometry.values():
            _check_complete(geometry.metadata.get("_ply_raw", {}))
    return scene


def _check_complete(elements: dict[str, Any]) -> None:
    """A text PLY that was cut after a line reads without complaint."""
    for name, element in elements.items():
        rows = element.get("data")
        rows = next(iter(rows.values()), ()) if isinstance(rows, dict) else rows
        if rows is not None and len(rows) != element["length"]:
            raise ValueError(f"{len(rows)} of {element['length']} of element {name}")


def _arrays(data: bytes, kind: str, columns: Columns | None) -> dict[str, Any]:
    """NPY: one array. NPZ: one array, or arrays called points, colors, normals."""
    if kind == "npy":
        return split(np.load(io.BytesIO(data), allow_pickle=False), columns)
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        if sum(member.file_size for member in archive.zip.infolist()) > MAX_BYTES:
            raise BadSampleError("too large", f"an archive that unpacks to more than {MAX_BYTES} bytes")
        names = [name for name in ("points", "colors", "normals") if name in archive.files]
        if "points" in names:
            return {name: archive[name] for name in names}
        if len(archive.files) == 1:
            return split(archive[archive.files[0]], columns)
        raise BadSampleError("not a point cloud", f"arrays {archive.files[:8]}; one must be called points")


def _text(data: bytes, columns: Columns | None) -> dict[str, Any]:
    """Rows of numbers between blanks or commas; comments begin with # or //; PTS opens with the number of points."""
    lines = [line.split("#")[0].split("//")[0].replace(",", " ") for line in data.decode("utf-8-sig").splitlines()]
    rows = [line.split() for line in lines if line.strip()]
    counted = len(rows) > 1 and len(rows[0]) == 1 and len(rows[1]) > 1
    if counted and int(rows[0][0]) != len(rows) - 1:
        raise ValueError(f"{rows[0][0]} points announced, {len(rows) - 1} rows")
    table = np.array(rows[counted:], dtype=np.str_)
    fields = split(table, columns)
    whole = "colors" in fields and bool(np.char.isdigit(fields["colors"]).all())
    return {name: part.astype(np.int64 if whole and name == "colors" else np.float64) for name, part in fields.items()}
