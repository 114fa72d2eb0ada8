"""Any form of one time series to values and times: the single door through which series come in.

What a naive ``np.asarray(x, dtype=float)`` gets wrong is put right here: strings and objects that numpy would parse or
carry along, missing values (NaN, None, masked) told from infinite ones, timestamps in whatever form and in order, and
an error a run can count and survive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import torch

from mmrep.data.raw import is_location, raw_stream, unwrap
from mmrep.encoder import BadSampleError
from mmrep.modalities.time_series._files import read_file

MAX_VALUES = 1 << 26  # 67 million, 256 MB as float32
_LONGEST = 1e30
_NUMBERS = (bool, int, float, np.integer, np.floating, np.bool_)
LARGEST = 1e38  # the difference of two such values still fits float32


@dataclass(frozen=True)
class Series:
    """One series, decoded.

    Attributes:
        values: float32 [L, C], time first; NaN is a gap (nothing was measured). Never infinite, never all NaN.
        times: float64 [L], not decreasing, 0 at the first step: seconds where the raw times were dates, their own unit
            where they were numbers, the index where there were none.
    """

    values: np.ndarray
    times: np.ndarray


def decode(raw: Any, *, max_values: int = MAX_VALUES) -> Series:
    """Decode one series.

    Args:
        raw: an array, tensor or list [L] or [L, C] of numbers (time first; bool, integer or float; NaN, None or masked
            is a gap); a dict with ``values`` and, optionally, ``times``; a pandas Series or DataFrame (columns are
            channels; an index of numbers or dates is the times); or a path, ``file://`` or ``data:`` URL, bytes, binary
            file object, or dict with ``bytes`` and/or ``path``, of a file as `_files.read_file` reads it. Times are
            numbers, datetimes, datetime64 or timedelta64, or ISO 8601 strings (without a zone: UTC); equal neighbours
            are allowed, decreasing ones are not.
        max_values: refuse longer series (L * C).

    Raises:
        BadSampleError: it cannot be read; the cause is one of ``missing file``, ``unreadable file``, ``url``, ``not a
            series``, ``damaged file``, ``not numbers``, ``wrong shape``, ``empty series``, ``all missing``, ``not
            finite``, ``value range``, ``too long``, ``bad times``, ``unsorted times``.
    """
    raw = unwrap(raw)
    times: Any = None
    if isinstance(raw, Mapping):
        raw, times = _from_dict(cast("Mapping[Any, Any]", raw))
    if is_location(raw):
        with raw_stream(raw, "a series") as stream:
            raw, times = read_file(stream, max_values)
    elif not (_is_pandas(raw) or isinstance(raw, (np.ndarray, torch.Tensor, list, tuple))):
        raw, times = read_file(raw_stream(raw, "a series"), max_values)
    if _is_pandas(raw):
        raw, index = _from_pandas(raw)
        times = index if times is None else times
    values = _values(raw, max_values)
    return Series(values, np.arange(len(values), dtype=np.float64) if times is None else _times(times, len(values)))


def _from_dict(raw: Mapping[Any, Any]) -> tuple[Any, Any]:
    if "values" not in raw or set(raw) - {"values", "times"}:
        keys = ", ".join(repr(key) for key in raw) or "nothing"
        raise BadSampleError("not a series", f"a dict of {keys}; allowed: 'values', and 'times' with it")
    return raw["values"], raw.get("times")


def _is_pandas(raw: Any) -> bool:
    """A Series, a DataFrame or their like: known by what they do, so that pandas is not imported to ask."""
    return hasattr(raw, "to_numpy") and hasattr(raw, "index") and not callable(raw.index)


def _from_pandas(table: Any) -> tuple[np.ndarray, Any]:
    """Values as float64 with NaN, and the index as times."""
    dtypes = [table.dtype] if table.ndim == 1 else list(table.dtypes)
    names = [table.name] if table.ndim == 1 else list(table.columns)
    for name, dtype in zip(names, dtypes, strict=True):
        if getattr(dtype, "kind", "O") not in "biuf":
            raise BadSampleError("not numbers", f"column {name!r} is {dtype}; make it the index if it is the time")
    values = table.to_numpy(dtype=np.float64, na_value=np.nan)
    index = table.index
    return values, index.to_numpy(dtype="datetime64[ns]") if index.dtype.kind == "M" else index.to_numpy()


def _values(raw: Any, max_values: int) -> np.ndarray:
    """Anything like an array to float32 [L, C]."""
    array = _array(raw)
    if array.ndim not in (1, 2):
        raise BadSampleError("wrong shape", f"an array of shape {array.shape}, not [L] or [L, C] with time first")
    if array.size == 0:
        raise BadSampleError("empty series", f"an array of shape {array.shape}")
    if array.size > max_values:
        raise BadSampleError("too long", f"{array.size} values are more than {max_values}; cut it into pieces")
    if array.dtype.kind not in "biuf":
        raise BadSampleError("not numbers", f"dtype {array.dtype}; allowed: bool, integer, float")
    wide = array.astype(np.float64).reshape(len(array), -1)
    if np.isinf(wide).any():
        where = [int(i) for i in np.argwhere(np.isinf(wide))[0]]
        raise BadSampleError("not finite", f"step {where[0]} of channel {where[1]} is infinite; NaN marks a gap")
    seen = np.abs(wide[~np.isnan(wide)])
    if not len(seen):
        raise BadSampleError("all missing", f"all {array.size} values are NaN")
    if seen.max() > LARGEST:
        raise BadSampleError("value range", f"{seen.max():g} is beyond {LARGEST:g}; use a larger unit")
    return wide.astype(np.float32)


def _array(raw: Any) -> np.ndarray:
    if isinstance(raw, torch.Tensor):
        raw = raw.detach().cpu()
        return (raw.float() if raw.dtype == torch.bfloat16 else raw).numpy()
    if isinstance(raw, np.ma.MaskedArray):
        return np.where(np.ma.getmaskarray(raw), np.nan, raw.data) if raw.dtype.kind in "biuf" else raw.data
    if isinstance(raw, np.ndarray) and raw.dtype != object:
        return raw
    try:
        array = np.asarray(raw)
    except (ValueError, TypeError) as error:
        raise BadSampleError("wrong shape", f"rows of different lengths, or not numbers: {error}") from error
    if array.dtype != object:
        return array
    # None is how JSON and parquet write a gap; whatever else is an object is not a number, even if float() would do it.
    for entry in array.flat:
        if not (entry is None or isinstance(entry, _NUMBERS)):
            raise BadSampleError("not numbers", f"{repr(entry)[:40]} of type {type(entry).__name__} among the values")
    try:
        return array.astype(np.float64)
    except OverflowError as error:
        raise BadSampleError("value range", f"{error}; use a larger unit") from error


def _times(raw: Any, length: int) -> np.ndarray:
    """Times of any form to float64 [L] from 0."""
    seconds = _seconds(raw)
    if seconds.shape != (length,):
        raise BadSampleError("bad times", f"times of shape {seconds.shape} for {length} steps")
    if not np.isfinite(seconds).all():
        raise BadSampleError("bad times", "NaN, NaT or infinity among the times")
    seconds = seconds - seconds[0]
    if np.abs(seconds).max() > _LONGEST:
        raise BadSampleError("bad times", f"a span of {np.abs(seconds).max():g}; at most {_LONGEST:g}")
    steps = np.diff(seconds)
    if (steps < 0).any():
        at = int(np.argmax(steps < 0))
        raise BadSampleError(
            "unsorted times", f"step {at + 1} is before step {at}; sort both: order = np.argsort(times, kind='stable')"
        )
    return seconds


def _seconds(raw: Any) -> np.ndarray:
    if isinstance(raw, torch.Tensor):
        raw = raw.detach().cpu().numpy()
    array = np.asarray(raw)
    if array.size == 0:
        raise BadSampleError("bad times", "no times")
    if array.dtype.kind in "OUT":
        array = np.array([_stamp(entry) for entry in array.flat], dtype="datetime64[us]").reshape(array.shape)
    if array.dtype.kind in "mM":
        if np.datetime_data(array.dtype)[0] in ("Y", "M"):  # not of one length: numpy would take the average month
            array = array.astype("datetime64[s]") if array.dtype.kind == "M" else array
        try:
            # From the first step on, before the cast: float64 holds seconds since 1970 to a quarter of a microsecond.
            return (array - array.flat[0]) / np.timedelta64(1, "s")
        except TypeError as error:
            raise BadSampleError("bad times", f"{array.dtype} is no number of seconds") from error
    if array.dtype.kind not in "iuf":
        raise BadSampleError("bad times", f"times of dtype {array.dtype}; give numbers, dates or ISO 8601 strings")
    return array.astype(np.float64)


def _stamp(entry: Any) -> datetime:
    """A datetime or an ISO 8601 string, in UTC without saying so, as numpy wants it."""
    try:
        stamp = datetime.fromisoformat(entry) if isinstance(entry, str) else entry
    except ValueError as error:
        raise BadSampleError("bad times", f"{entry[:40]!r} is not an ISO 8601 time") from error
    if not isinstance(stamp, datetime):
        raise BadSampleError("bad times", f"{repr(entry)[:40]} of type {type(entry).__name__}")
    return stamp if stamp.tzinfo is None else stamp.astimezone(UTC).replace(tzinfo=None)
