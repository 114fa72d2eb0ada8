"""Tables in files: CSV, TSV, JSON lines and parquet."""

from __future__ import annotations

import csv
import glob
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from mmrep.config import ConfigError, config
from mmrep.data.sample import Sample
from mmrep.data.source import Source, SourceConfig, is_missing, require_unique, unwrap_media
from mmrep.encoder import BadSampleError
from mmrep.registry import near

Format = Literal["csv", "tsv", "jsonl", "parquet"]
SUFFIXES: Mapping[str, Format] = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip


@config
class TableConfig(SourceConfig):
    """files: a file, a glob, or a list of them. format: None goes by the suffix.

    paths: columns that hold paths of files. root: folder that relative paths start from; None = the table's folder.
    """

    files: str | list[str]
    format: Format | None = None
    paths: list[str] = field(default_factory=list)
    root: str | None = None


class Table(Source):
    """Rows of one or more table files, held in memory in compact form.

    An empty cell, null and NaN are missing. A CSV cell is text, whatever it looks like. A line that cannot be parsed
    is a bad sample, not the end of the run. Ids are ``file name:row`` unless a column is named. A parquet file whose
    pictures do not fit in memory is better read by ``hf-dataset`` (``path: parquet``), which maps it from disk.
    """

    Config = TableConfig

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        patterns = [config.files] if isinstance(config.files, str) else config.files
        self._files = expand(patterns, "files")
        self._tables = [open_rows(file, config.format) for file in self._files]
        self._ends = list(accumulate(len(table) for table in self._tables))
        if not self._ends[-1]:
            raise ConfigError([f"files: {', '.join(map(str, self._files))} holds no rows"])
        self.columns = tuple(dict.fromkeys(name for table in self._tables for name in table.columns))
        self.require_columns(config.paths, "paths")
        self.require_special_columns()
        shared = os.path.commonpath([file.parent for file in self._files])
        self._names = [file.relative_to(shared).as_posix() for file in self._files]
        if config.id is not None:
            require_unique((value for table in self._tables for value in table.column(config.id)), config.id)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        number, row = self._place(index)
        values = self._tables[number].row(row)
        folder = Path(self.config.root).expanduser() if self.config.root else self._files[number].parent
        cells = {name: unwrap_media(value, folder) for name, value in values.items()}
        cells = {name: value for name, value in cells.items() if value not in ("", b"", [])}
        for name in self.config.paths:
            if isinstance(cells.get(name), str):
                cells[name] = folder / cells[name]
        return self.make_sample(cells, f"{self._names[number]}:{row}")

    def record_id(self, index: int) -> str:
        number, row = self._place(index)
        return f"{self._names[number]}:{row}"

    def fingerprint(self) -> str:
        """Paths, sizes and times of change of the files."""
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self._files]
        return f"table:{stats}:{self.config}"

    def _place(self, index: int) -> tuple[int, int]:
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)


class Rows:
    """Rows of one file, read on demand. Base of the formats."""

    columns: Sequence[str]

    def __len__(self) -> int:
        raise NotImplementedError

    def row(self, index: int) -> dict[str, Any]:
        """The cells of one row. Raises BadSampleError if the row is malformed."""
        raise NotImplementedError

    def column(self, name: str) -> list[Any]:
        """The values of one column, None where a row lacks it or is malformed."""
        values: list[Any] = []
        for index in range(len(self)):
            try:
                value = self.row(index).get(name)
            except BadSampleError:
                value = None
            values.append(None if value == "" or is_missing(value) else value)
        return values


class _ArrowRows(Rows):
    """An Arrow table, and behind its rows the lines that could not be parsed."""

    def __init__(self, table: Any, rejected: list[str] | None = None) -> None:
        self.table = table
        self.rejected = rejected or []
        self.columns = table.column_names

    def __len__(self) -> int:
        return self.table.num_rows + len(self.rejected)

    def row(self, index: int) -> dict[str, Any]:
        if index >= self.table.num_rows:
            raise BadSampleError("malformed row", self.rejected[index - self.table.num_rows])
        return {name: self.table.column(name)[index].as_py() for name in self.columns}

    def column(self, name: str) -> list[Any]:
        known = self.table.column(name).to_pylist() if name in self.columns else [None] * self.table.num_rows
        return known + [None] * len(self.rejected)


class _TextRows(_ArrowRows):
    """A CSV table: every cell is text. Kept as bytes, so that one badly encoded cell spoils one row only."""

    def row(self, index: int) -> dict[str, Any]:
        return {name: _utf8(value) for name, value in super().row(index).items()}

    def column(self, name: str) -> list[Any]:
        return [value.decode(errors="replace") if value else None for value in super().column(name)]


class _JsonRows(Rows):
    """JSON lines: one object a line; empty lines are skipped."""

    def __init__(self, file: Path) -> None:
        self.lines = [line for line in file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
        columns: dict[str, None] = {}
        for index in range(len(self)):
            try:
                columns.update(dict.fromkeys(self.row(index)))
            except BadSampleError:
                continue  # met again, and counted, when the row is read
        self.columns = tuple(columns)

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> dict[str, Any]:
        text = _utf8(self.lines[index])
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSampleError("malformed row", f"{error} in {text[:80]!r}") from error
        if not isinstance(value, dict):
            raise BadSampleError("malformed row", f"a line holds one JSON object, got {text[:80]!r}")
        return value


def open_rows(file: Path, format: Format | None = None) -> Rows:
    """Open one table file.

    Raises:
        ConfigError: the format is unknown, or the file is not of it.
    """
    format = format or SUFFIXES.get(file.suffix.lower())
    if format is None:
        known = ", ".join(SUFFIXES)
        raise ConfigError([f"files: {file} ends in none of {known}; set `format` to csv, tsv, jsonl or parquet"])
    if format == "jsonl":
        return _JsonRows(file)
    import pyarrow as pa

    try:
        if format == "parquet":
            import pyarrow.parquet

            return _ArrowRows(pyarrow.parquet.read_table(file))
        return _read_csv(file, "\t" if format == "tsv" else ",")
    except pa.ArrowInvalid as error:
        raise ConfigError([f"files: {file} cannot be read as {format}: {error}"]) from error


def _read_csv(file: Path, delimiter: str) -> Rows:
    import pyarrow as pa
    import pyarrow.csv

    with file.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        header = next(csv.reader(lines, delimiter=delimiter), [])
    if len(set(header)) != len(header) or not all(header):
        raise ConfigError([f"files: the first line of {file} must name each column once, got {header}"])
    rejected: list[str] = []

    def reject(row: Any) -> str:
        counts = f"{row.actual_columns} cells for {row.expected_columns} columns"
        rejected.append(f"line {row.number}: {counts}: {row.text[:80]!r}")
        return "skip"

    table = pyarrow.csv.read_csv(
        file,
        # One thread: only then does a rejected row know its number.
        read_options=pyarrow.csv.ReadOptions(column_names=header, skip_rows=0, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=reject
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(header, pa.large_binary()), strings_can_be_null=False, check_utf8=False
        ),
    )
    return _TextRows(table.slice(1), rejected)  # the names were given above, so the first row is the header itself


def expand(patterns: Sequence[str], key: str) -> list[Path]:
    """Paths and globs to existing files, sorted within each glob, each file once.

    Raises:
        ConfigError: a pattern matches nothing; the message names similar files of its folder.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        name = os.path.expanduser(pattern)
        matches = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        if not matches:
            folder = Path(name).parent
            if folder.is_dir():
                there = sorted(p.name for p in folder.iterdir() if p.is_file())
                hint = f"{near(Path(name).name, there) or '.'} {folder} holds: {', '.join(there[:10]) or 'no files'}"
            else:
                hint = "" if glob.has_magic(str(folder)) else f": there is no folder {folder}"
            raise ConfigError([f"{key}: {pattern!r} matches no file{hint}"])
        # absolute, not resolved: files beside a link are looked for beside the link
        found.update(dict.fromkeys(Path(match).absolute() for match in matches))
    return list(found)


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadSampleError("invalid utf-8", f"{error} in {data[:80]!r}") from error
