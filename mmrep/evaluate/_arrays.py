"""What every measure does first: read an array as a finite matrix, and take products in full precision, in tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ArrayLike = Tensor | np.ndarray | Sequence[Any]


def as_matrix(values: ArrayLike, name: str) -> Tensor:
    """`values` as a detached tensor of shape [rows, dim] with finite floating point entries; the dtype is kept."""
    matrix = values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    if matrix.ndim != 2:
        raise ValueError(f"{name} must have shape [rows, dim], got {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        matrix = matrix.float()
    bad = (~torch.isfinite(matrix)).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{name} has NaN or infinity in {len(bad)} of {len(matrix)} rows, the first at row {bad[0]}")
    return matrix


def as_pair(left: ArrayLike, right: ArrayLike, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Two matrices of one width."""
    a, b = as_matrix(left, names[0]), as_matrix(right, names[1])
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{names[0]} have {a.shape[1]} dimensions and {names[1]} {b.shape[1]}: not one space")
    return a, b


def as_labels(labels: ArrayLike, rows: int, name: str) -> np.ndarray:
    """`labels` as a numpy vector with one entry a row."""
    vector = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if vector.shape != (rows,):
        raise ValueError(f"{name} must have one entry for each of the {rows} rows, got shape {vector.shape}")
    return vector


def working_dtype(*matrices: Tensor) -> torch.dtype:
    """fp32, or fp64 where an input has it: half precision makes ties that the model did not make."""
    return torch.float64 if any(m.dtype == torch.float64 for m in matrices) else torch.float32


def spans(length: int, tile: int) -> Iterator[slice]:
    """Slices of at most `tile` that cover `range(length)` in order."""
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    for start in range(0, length, tile):
        yield slice(start, min(start + tile, length))


def products(left: Tensor, right: Tensor) -> Tensor:
    """Products [m, n] of the rows of [m, D] and [n, D], cast *before* the product and out of reach of autocast."""
    dtype = working_dtype(left, right)
    with torch.autocast(left.device.type, enabled=False):
        return left.to(dtype) @ right.to(device=left.device, dtype=dtype).T
