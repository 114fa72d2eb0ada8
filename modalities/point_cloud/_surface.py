"""Points of a trimesh object: drawn from its surface, or its vertices where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmrep.encoder import BadSampleError
from mmrep.registry import require


def is_geometry(raw: Any) -> bool:
    """Whether a value is of a trimesh class (without importing trimesh for those that are not)."""
    return any(cls.__module__.partition(".")[0] == "trimesh" for cls in type(raw).__mro__)


def read_geometry(geometry: Any, *, samples: int, seed: int, limit: int) -> dict[str, Any]:
    """``points`` [N, 3], and ``colors`` and ``normals`` where there are any.

    Meshes are sampled in proportion to area, the parts of a scene each in its place and by its share; a scene with a
    surface gives no other points. Colours are those of vertices (interpolated), faces, textures inside the file, or
    the material.

    Args:
        geometry: a trimesh ``Trimesh``, ``PointCloud`` or ``Scene``.
        samples: how many points to draw from a surface.
        seed: of the draw.
        limit: refuse more vertices or faces.
    """
    trimesh = require("trimesh", "point-cloud")
    if isinstance(geometry, trimesh.Scene):
        _check_size([geometry.geometry[geometry.graph[node][1]] for node in geometry.graph.nodes_geometry], limit)
        parts = geometry.dump()
    else:
        parts = [geometry]
        _check_size(parts, limit)
    parts = [part for part in parts if isinstance(part, (trimesh.Trimesh, trimesh.PointCloud)) and len(part.vertices)]
    if not parts:
        raise BadSampleError("empty cloud", f"a {type(geometry).__name__} without vertices")
    areas = [_area(part) for part in parts]
    if sum(areas) == 0:
        return _join([_vertices(part) for part in parts])
    counts = _shares(np.array(areas), samples)
    draws = [(part, int(n)) for part, n in zip(parts, counts, strict=True) if n]
    return _join([_draw(part, n, seed + i) for i, (part, n) in enumerate(draws)])


def _check_size(parts: Sequence[Any], limit: int) -> None:
    for what in ("vertices", "faces"):
        count = sum(len(found) for part in parts if (found := getattr(part, what, None)) is not None)
        if count > limit:
            raise BadSampleError("too large", f"{count} {what} are more than {limit}")


def _area(part: Any) -> float:
    faces = getattr(part, "faces", None)
    if faces is None or not len(faces):
        return 0.0
    if faces.min() < 0 or faces.max() >= len(part.vertices):
        raise BadSampleError("damaged cloud", f"a face of vertex {faces.max()}, of {len(part.vertices)} vertices")
    if not np.isfinite(part.vertices).all():
        raise BadSampleError("not finite", "NaN or infinity among the vertices")
    return float(part.area)


def _shares(areas: np.ndarray, samples: int) -> np.ndarray:
    """``samples`` divided in proportion to the areas; what rounding leaves goes to the largest remainders."""
    exact = areas / areas.sum() * samples
    counts = np.floor(exact).astype(np.int64)
    rest = np.argsort(counts - exact, kind="stable")[: samples - counts.sum()]
    counts[rest] += 1
    return counts


def _draw(mesh: Any, count: int, seed: int) -> dict[str, Any]:
    sample = require("trimesh.sample", "point-cloud")
    points, faces, corners = sample.sample_surface(mesh, count, return_barycentric=True, seed=seed)
    out = {"points": np.asarray(points), "normals": mesh.face_normals[faces]}
    kind, colors = _colors(mesh)
    if kind == "face":
        out["colors"] = colors[faces]
    elif kind == "vertex":
        out["colors"] = np.einsum("nc,ncd->nd", corners, colors[mesh.faces[faces]])
    return out


def _vertices(part: Any) -> dict[str, Any]:
    kind, colors = _colors(part)
    out = {"points": np.asarray(part.vertices), **({"colors": colors} if kind == "vertex" else {})}
    raw = part.metadata.get("_ply_raw", {}).get("vertex", {}).get("data")  # a trimesh PointCloud has no normals itself
    if isinstance(raw, dict):
        names = set(raw)
    else:
        names = set(getattr(getattr(raw, "dtype", None), "names", None) or ())
    if {"nx", "ny", "nz"} <= names:
        out["normals"] = np.column_stack([raw[axis] for axis in ("nx", "ny", "nz")])  # pyright: ignore[reportOptionalSubscript]
    return out


def _colors(part: Any) -> tuple[str | None, np.ndarray]:
    """Whose colours there are, ``"vertex"``, ``"face"`` or None, and they, float [V or F, 3] in 0..1."""
    visual = part.visual
    kind = getattr(visual, "kind", None)
    if kind == "texture":
        colors = visual.to_color().vertex_colors[..., :3]
        return "vertex", np.broadcast_to(colors, (len(part.vertices), 3)) / 255.0
    colors = getattr(visual, f"{kind}_colors", None) if kind in ("vertex", "face") else None
    if colors is not None and np.ndim(colors) == 2:  # a PointCloud without colours says "vertex", and has one for none
        return kind, colors[:, :3] / 255.0
    return None, np.zeros((0, 3))


def _join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One cloud of several. Parts without colours are grey among coloured ones; normals only if all have them."""
    out = {"points": np.concatenate([part["points"] for part in parts])}
    if any("colors" in part for part in parts):
        grey = [part.get("colors", np.full(part["points"].shape, 0.5)) for part in parts]
        out["colors"] = np.concatenate(grey)
    if all("normals" in part for part in parts):
        out["normals"] = np.concatenate([part["normals"] for part in parts])
    return out
