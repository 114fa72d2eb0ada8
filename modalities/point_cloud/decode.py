"""Any form of one point cloud to coordinates, colours and normals: the single door through which clouds come in.

Coordinates stay in double precision until the encoder has centred them: survey data lie at offsets of a million metres,
where single precision has steps of centimetres.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import torch

from mmrep.data.raw import is_location, raw_stream
from mmrep.encoder import BadSampleError
from mmrep.modalities.point_cloud._columns import Columns, split
from mmrep.modalities.point_cloud._files import MAX_BYTES, read_file
from mmrep.modalities.point_cloud._surface import is_geometry, read_geometry

MAX_POINTS = 1 << 24  # 17 million, 400 MB of coordinates
MAX_COORDINATE = 1e15  # squared distances, and their sums over a cloud, stay far inside single precision


@dataclass(frozen=True)
class Cloud:
    """One decoded cloud of N points, at least one.

    Attributes:
        points: float64 [N, 3], in the units of the source.
        colors: float32 [N, 3], RGB in 0..1, or None.
        normals: float32 [N, 3], of unit length (or zero where the source has zero), or None.
    """

    points: np.ndarray
    colors: np.ndarray | None = None
    normals: np.ndarray | None = None

    def take(self, index: np.ndarray) -> Cloud:
        """The points at ``index`` int64 [K], in that order."""
        return Cloud(*(None if part is None else part[index] for part in (self.points, self.colors, self.normals)))  # pyright: ignore[reportArgumentType]


def decode(
    raw: Any, *, columns: Columns | None = None, samples: int = 2048, seed: int = 0, max_points: int = MAX_POINTS
) -> Cloud:
    """Decode one point cloud.

    Args:
        raw: an array, torch tensor or nested list [N, 3], [N, 6] or [N, 9]; a dict with ``points`` and perhaps
            ``colors`` and ``normals``, each [N, 3]; a trimesh object; or a path, ``file://`` or ``data:`` URL, bytes,
            binary file object or dict with ``bytes`` and/or ``path`` of a PLY, OBJ, GLB, glTF, OFF, STL, NPY, NPZ or
            text file (xyz, pts, txt). The suffix of the name says which; bytes without a name are read if they begin
            as no other format does. Colours are integers (16 bits 0..65535, others 0..255; in text files, too, whole
            numbers are 0..255) or floats in 0..1.
        columns: what the columns of an array or text file are; None goes by the width, see `split`.
        samples: how many points to draw from a surface. A mesh is sampled in proportion to area; a file that has no
            faces gives its vertices.
        seed: of that draw.
        max_points: refuse larger clouds (and meshes of more vertices or faces).

    Raises:
        BadSampleError: it cannot be read; the cause is one of ``missing file``, ``unreadable file``, ``url``, ``not a
            point cloud``, ``unknown format``, ``too large``, ``damaged cloud``, ``empty cloud``, ``wrong columns``,
            ``unsupported values``, ``value range``, ``not finite``.
    """
    if isinstance(raw, Mapping) and not ("bytes" in raw or "path" in raw):
        fields = _fields(cast("Mapping[str, Any]", raw))
    elif is_geometry(raw):
        fields = read_geometry(raw, samples=samples, seed=seed, limit=max_points)
    elif isinstance(raw, (np.ndarray, torch.Tensor, list, tuple)):
        fields = split(_array(raw), columns)
    else:
        data, name = _bytes(raw)
        fields = read_file(data, name, columns=columns, samples=samples, seed=seed, limit=max_points)
    return _cloud(fields, max_points)


def _fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    allowed = ("points", "colors", "normals")
    if "points" not in raw or any(key not in allowed for key in raw):
        raise BadSampleError("not a point cloud", f"a dict of {list(raw)[:8]}; the keys are points, colors and normals")
    return {key: value for key, value in raw.items() if value is not None}


def _bytes(raw: Any) -> tuple[bytes, str]:
    """The content of a file and the name that tells its format ('' if there is none)."""
    named = raw.get("path") if isinstance(raw, Mapping) else raw
    named = named if is_location(named) else getattr(named, "name", "")
    name = os.fsdecode(cast("str", named)) if is_location(named) else ""
    name = "" if name.startswith("data:") else urlsplit(name).path if "://" in name else name
    stream = raw_stream(raw, "a point cloud")
    try:
        data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadSampleError("unreadable file", str(error)) from error
    finally:
        if not hasattr(raw, "read"):  # a file object of the caller stays open
            stream.close()
    return (data.encode() if isinstance(data, str) else data), name


def _cloud(fields: Mapping[str, Any], max_points: int) -> Cloud:
    points = _array(fields["points"])
    points = points.reshape(0, 3) if points.ndim == 1 and not points.size else points
    for name, part in fields.items():
        shape = np.shape(part)
        if points.ndim != 2 or points.shape[1] != 3 or (shape != points.shape and name != "points"):
            raise BadSampleError("wrong columns", f"{name} of shape {shape}; points, colors, normals are [N, 3] each")
    if not len(points):
        raise BadSampleError("empty cloud", "no points")
    if len(points) > max_points:
        raise BadSampleError("too large", f"{len(points)} points are more than {max_points}")
    colors, normals = fields.get("colors"), fields.get("normals")
    return Cloud(
        points=_coordinates(points),
        colors=None if colors is None else _colors(_array(colors)),
        normals=None if normals is None else _unit(_floats(_array(normals), "normals")),
    )


def _array(raw: Any) -> np.ndarray:
    if isinstance(raw, torch.Tensor):
        raw = raw.detach().cpu()
        return (raw.double() if raw.dtype in (torch.bfloat16, torch.float16) else raw).numpy()
    try:
        return np.asarray(raw)
    except (ValueError, TypeError) as error:
        raise BadSampleError("wrong columns", f"rows of different lengths: {error}") from error


def _floats(array: np.ndarray, name: str) -> np.ndarray:
    """Numbers in double precision, all finite."""
    if array.dtype.kind not in "fiu":
        raise BadSampleError("unsupported values", f"{name} of dtype {array.dtype}; allowed: integers and floats")
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values).all(1)).sum())
        raise BadSampleError("not finite", f"NaN or infinity in {name}, in {bad} of {len(values)} rows")
    return values


def _coordinates(array: np.ndarray) -> np.ndarray:
    points = _floats(array, "points")
    if np.abs(points).max() > MAX_COORDINATE:
        raise BadSampleError("value range", f"a coordinate of {np.abs(points).max():g}; at most {MAX_COORDINATE:g}")
    return points


def _colors(array: np.ndarray) -> np.ndarray:
    """To 0..1 by the range that the dtype stands for, never by the content."""
    values = _floats(array, "colors")
    whole = array.dtype.kind in "iu"
    top = 1.0 if not whole else 65535.0 if array.dtype.itemsize == 2 and array.dtype.kind == "u" else 255.0
    low, high = values.min(), values.max()
    slack = 0.0 if whole else 1e-3
    if low < -slack or high > top + slack:
        fix = "divide by 255, or give integers" if low >= 0 else "if they are normals, say so in columns or by a dict"
        seen = f"colours {low:g}..{high:g} of dtype {array.dtype}, where 0..{top:g} is read"
        raise BadSampleError("value range", f"{seen}; {fix}")
    return np.clip(values / top, 0, 1).astype(np.float32)


def _unit(normals: np.ndarray) -> np.ndarray:
    peak = np.abs(normals).max(1, keepdims=True)  # first, since the square of a tiny or huge number is not one
    scaled = normals / np.where(peak > 0, peak, 1)
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    return (scaled / np.where(length > 0, length, 1)).astype(np.float32)
