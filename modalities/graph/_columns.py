"""Columns of numbers from whatever holds them, checked against what an encoder expects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmrep.encoder import BadSampleError


def numbers(raw: Any, name: str) -> NDArray[Any]:
    """A list, array or tensor of bools, integers or floats as a numpy array.

    Raises:
        BadSampleError: ``not numeric``: ragged lists, strings, objects.
    """
    if isinstance(raw, torch.Tensor):
        raw = raw.detach().cpu()
        raw = (raw.float() if raw.dtype == torch.bfloat16 else raw).numpy()
    try:
        array = np.asarray(raw)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadSampleError("not numeric", f"{name}: {error}") from error
    if array.dtype == object:
        flat = [value for value in array.ravel() if not isinstance(value, int)]
        if not flat:  # integers beyond 64 bits
            raise BadSampleError("not numeric", f"{name} holds integers of more than 64 bits")
        raise BadSampleError("not numeric", f"{name} holds values of type {type(flat[0]).__name__}")
    if array.dtype.kind not in "biuf":
        raise BadSampleError("not numeric", f"{name} has dtype {array.dtype}")
    return array


def columns(raw: Any, expected: int | Sequence[int], rows: int, noun: str, *, extra: str) -> NDArray[Any] | None:
    """Check one table of features.

    Args:
        raw: [rows, columns], or [rows] for one column; None = the graph has none.
        expected: the number of float columns, or the number of values of each integer column.
        rows: how many nodes or edges there are.
        noun: ``"node"`` or ``"edge"``.
        extra: ``"ignore"`` leaves out a table that is not expected, ``"refuse"`` does not.

    Returns:
        float32 or int64 [rows, columns]; None if nothing is expected.

    Raises:
        BadSampleError: ``missing features, unexpected features, feature rows, feature width, feature dtype, category
            range, not finite, not numeric``.
    """
    floats = isinstance(expected, int)
    field = f"{noun}_features" if floats else f"{noun}_categories"
    width = expected if floats else len(expected)
    if raw is None:
        if not width or (rows == 0 and noun == "edge"):
            return np.zeros((rows, width), np.float32 if floats else np.int64) if width else None
        raise BadSampleError("missing features", f"the encoder's config expects {width} columns of {field}")
    if not width and extra == "ignore":
        return None
    array = numbers(raw, field)
    if array.size == 0 and rows == 0:
        return np.zeros((0, width), np.float32 if floats else np.int64) if width else None
    array = array[:, None] if array.ndim == 1 else array
    if not width:
        kind = "categories" if array.dtype.kind in "biu" else "features"
        fix = f"set {noun}_features: {array.shape[-1]}, {noun}_categories, or extra: ignore"
        raise BadSampleError("unexpected features", f"{array.shape[-1]} columns of {noun} {kind}: {fix}")
    if array.ndim != 2 or array.shape[0] != rows:
        raise BadSampleError("feature rows", f"{field} has shape {array.shape} for {rows} {noun}s")
    if array.shape[1] != width:
        raise BadSampleError("feature width", f"{field} has {array.shape[1]} columns; the encoder expects {width}")
    if floats:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)  # what overflows is found not to be finite
        if not np.isfinite(array).all():
            raise BadSampleError("not finite", f"NaN, infinity or a value beyond float32 in {field}")
        return array
    if array.dtype.kind == "f":
        raise BadSampleError("feature dtype", f"{field} is {array.dtype}; categories are integers")
    wrong = (array < 0) | (array >= np.asarray(expected))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise BadSampleError(
            "category range", f"{field}[{row}, {column}] is {array[row, column]}, not 0..{expected[column] - 1}"
        )
    return array.astype(np.int64)
