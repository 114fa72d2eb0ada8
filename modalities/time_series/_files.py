"""Reading one series from a file: CSV, TSV, NumPy or Parquet, told apart by content."""

from __future__ import annotations

import io
from datetime import datetime
from typing import Any, BinaryIO

import numpy as np

from mmrep.encoder import BadSampleError

TIME_COLUMNS = frozenset({"", "time", "times", "timestamp", "date", "datetime"})
"""Names of a first column that holds the times, in lower case; pandas writes its index under the empty name."""
_ERRORS = (OSError, ValueError, EOFError, KeyError, IndexError, TypeError, SyntaxError, UnicodeError)


def read_file(stream: BinaryIO, max_values: int) -> tuple[Any, Any]:
    """Read one file.

    A text file has one step a line, columns separated by comma, semicolon or tab, decimal points, and a header or
    none; blank lines are skipped. Empty cells and ``NA``, ``NaN``, ``null`` and the like are gaps. Its first column is
    the times if its header says so (`TIME_COLUMNS`) or if it holds ISO 8601 dates; every other column is a channel. A
    NumPy file is an array [L] or [L, C]. A Parquet table is what pandas reads; without an index, its first column is
    treated as a text file's.

    Args:
        stream: an open binary file.
        max_values: refuse larger files unread, where their header tells.

    Returns:
        Values, and times or None, as `decode` takes them.

    Raises:
        BadSampleError: ``damaged file``, ``empty series``, ``not numbers`` or ``too long``.
    """
    try:
        data = stream.read()
    except OSError as error:
        raise BadSampleError("unreadable file", str(error)) from error
    if not data.strip():
        raise BadSampleError("empty series", "an empty file")
    try:
        if data.startswith(b"\x93NUMPY"):
            return _numpy(data, max_values), None
        if data.startswith(b"PAR1"):
            return _parquet(data, max_values)
        if data.startswith(b"PK"):
            raise BadSampleError("damaged file", "an archive (zip, npz, xlsx), not a CSV, TSV, NumPy or Parquet file")
        return _text(data, max_values)
    except BadSampleError:
        raise
    except _ERRORS as error:
        raise BadSampleError("damaged file", f"not a CSV, TSV, NumPy or Parquet file: {str(error)[:200]}") from error


def _numpy(data: bytes, max_values: int) -> np.ndarray:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    _check_size(int(np.prod(shape, dtype=object)), max_values)
    if dtype.hasobject:
        raise BadSampleError("not numbers", "a NumPy file of Python objects: a pickle can run any program")
    return np.load(io.BytesIO(data), allow_pickle=False)


def _parquet(data: bytes, max_values: int) -> tuple[Any, Any]:
    import pandas as pd
    import pyarrow as pa
    from pyarrow import parquet

    try:
        meta = parquet.read_metadata(io.BytesIO(data))
        _check_size(meta.num_rows * meta.num_columns, max_values)
        table = pd.read_parquet(io.BytesIO(data), engine="pyarrow")
    except pa.ArrowException as error:
        raise BadSampleError("damaged file", str(error)[:200]) from error
    if isinstance(table.index, pd.RangeIndex):
        return _split(table, str(table.columns[0]) if len(table.columns) else None)
    return table, None


def _text(data: bytes, max_values: int) -> tuple[Any, Any]:
    import pandas as pd

    text = data.decode("utf-8-sig").lstrip()
    first = text.splitlines()[0]
    separator = next((mark for mark in ("\t", ";") if mark in first), ",")
    options: dict[str, Any] = {"header": None, "sep": separator, "skipinitialspace": True}
    cells = pd.read_csv(io.StringIO(first), dtype=str, keep_default_na=False, **options).iloc[0].tolist()
    header = not all(_is_number(cell) or _is_date(cell) for cell in cells)
    # A guess by the lines, half of which may be blank, that spares the parser; the exact check follows.
    _check_size(text.count("\n") * len(cells), 2 * max_values)
    try:
        table = pd.read_csv(io.StringIO(text), skiprows=int(header), low_memory=False, **options)
    except pd.errors.EmptyDataError as error:
        raise BadSampleError("empty series", "a header without rows") from error
    if len(table.columns) != len(cells):
        raise BadSampleError("damaged file", f"{len(cells)} columns in the first line, {len(table.columns)} below")
    table.columns = cells if header else [f"column {i + 1}" for i in range(len(cells))]
    return _split(table, cells[0] if header else None)


def _split(table: Any, name: str | None) -> tuple[Any, Any]:
    """Take the first column off as times, if that is what it is."""
    if not len(table) or not len(table.columns):
        raise BadSampleError("empty series", "a table without rows or columns")
    first = table.iloc[:, 0]
    named = name is not None and name.strip().lower() in TIME_COLUMNS
    dated = first.dtype.kind == "M" or (first.dtype.kind not in "biuf" and _is_date(first.iloc[0]))
    if not (named or dated):
        return table, None
    if len(table.columns) == 1:
        raise BadSampleError("empty series", "a table of times without values")
    times = first.to_numpy(dtype="datetime64[ns]") if first.dtype.kind == "M" else first.to_numpy()
    return table.iloc[:, 1:].reset_index(drop=True), times


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise BadSampleError("too long", f"{size} values are more than {most}; cut it into pieces")


def _is_number(cell: str) -> bool:
    try:
        float(cell or "nan")
    except ValueError:
        return cell.strip().lower() in ("na", "n/a", "null", "none", "<na>")
    return True


def _is_date(cell: Any) -> bool:
    try:
        datetime.fromisoformat(str(cell))
    except ValueError:
        return False
    return True
