"""Which column of an array of points is which."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from mmrep.encoder import BadSampleError

Columns = Literal["xyz", "xyz-rgb", "xyz-normals", "xyz-rgb-normals", "xyz-normals-rgb"]
_BY_WIDTH: dict[int, Columns] = {3: "xyz", 6: "xyz-rgb", 9: "xyz-rgb-normals"}
_FIELDS = {"xyz": "points", "rgb": "colors", "normals": "normals"}


def split(array: np.ndarray, columns: Columns | None) -> dict[str, Any]:
    """Cut an array [N, W] of any dtype into ``points``, ``colors`` and ``normals``, each [N, 3].

    Args:
        array: one row a point.
        columns: what the columns are. None goes by the width: 3 is xyz; 6 is xyz, rgb; 9 is xyz, rgb, normals.

    Raises:
        BadSampleError: ``wrong columns``.
    """
    if array.ndim == 1 and not array.size:  # an empty list or file has no width to be wrong
        array = array.reshape(0, 3)
    named = columns or (_BY_WIDTH.get(array.shape[1]) if array.ndim == 2 else None)
    parts = named.split("-") if named else []
    if not parts or array.ndim != 2 or array.shape[1] != 3 * len(parts):
        told = f"columns {columns!r}" if columns else "[N, 3] (xyz), [N, 6] (xyz, rgb) or [N, 9] (xyz, rgb, normals)"
        turned = array.ndim == 2 and array.shape[0] in _BY_WIDTH
        other = "cut other columns off, or give a dict of points, colors, normals"
        hint = "it looks transposed" if turned else other
        raise BadSampleError("wrong columns", f"an array of shape {array.shape}, where {told} is read; {hint}")
    return {_FIELDS[part]: array[:, 3 * i : 3 * i + 3] for i, part in enumerate(parts)}
