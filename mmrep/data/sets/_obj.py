"""Points on the surface of a mesh in Wavefront's OBJ format."""

from __future__ import annotations

import numpy as np

from mmrep.encoder import BadSampleError


def read_obj(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The triangles of a mesh; a polygon becomes a fan of them. Materials, normals and curves are not read.

    Args:
        data: the content of the file.

    Returns:
        Corners float64 [V, 3], and triangles int64 [T, 3] of indices into them.

    Raises:
        BadSampleError: a line that is no OBJ, or a face of corners that do not exist.
    """
    corners: list[list[float]] = []
    triangles: list[tuple[int, int, int]] = []
    for line in data.decode("utf-8", "replace").replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        try:
            if line.startswith("v "):
                corners.append([float(value) for value in line.split()[1:4]])
            elif line.startswith("f "):
                # "7/1/3" is corner 7; corners are counted from 1, and negative ones from the last that was read.
                face = [int(token.partition("/")[0]) for token in line.split()[1:]]
                face = [index - 1 if index > 0 else len(corners) + index for index in face]
                triangles += [(face[0], face[i], face[i + 1]) for i in range(1, len(face) - 1)]
        except ValueError as error:
            raise BadSampleError("malformed mesh", f"{line[:80]!r}: {error}") from error
    if any(len(corner) != 3 for corner in corners):
        raise BadSampleError("malformed mesh", "a corner has fewer than three coordinates")
    faces = np.array(triangles, dtype=np.int64).reshape(-1, 3)
    if faces.size and not 0 <= faces.min() <= faces.max() < len(corners):
        raise BadSampleError("malformed mesh", f"a face names a corner that is none of the {len(corners)}")
    return np.array(corners, dtype=np.float64).reshape(-1, 3), faces


def sample_surface(corners: np.ndarray, triangles: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Points spread evenly over the area of a mesh, in random order: a function of the arguments alone.

    Args:
        corners: [V, 3], in any unit of length.
        triangles: int [T, 3], indices of corners.
        count: how many points.
        seed: of their places, 0 ≤ seed < 2⁶³.

    Returns:
        float64 [count, 3].

    Raises:
        BadSampleError: the mesh has no surface.
    """
    a, b, c = (corners[triangles[:, i]] for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    total = float(area.sum())
    if not 0 < total < np.inf:
        raise BadSampleError("empty mesh", f"{len(triangles)} triangles with no area between them")
    random = np.random.default_rng(seed)
    # One point in each of `count` strips of equal area; which triangle a strip lies in, the running sum says.
    place = (np.arange(count) + random.random(count)) / count * total
    chosen = np.searchsorted(np.cumsum(area), place, side="right").clip(max=len(area) - 1)
    # Uniform in a triangle: with r = √u, (1 - r, r(1 - v), rv) (Osada et al. 2002, Shape distributions, eq. 1).
    root, v = np.sqrt(random.random((count, 1))), random.random((count, 1))
    points = (1 - root) * a[chosen] + root * (1 - v) * b[chosen] + root * v * c[chosen]
    return random.permutation(points)
