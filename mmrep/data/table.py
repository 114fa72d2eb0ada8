"""Tables in files: CSV, TSV, JSON lines and parquet."""

from __future__ import annotations

import csv
import io
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from mmrep.config import ConfigError, config
from mmrep.data.files import DataFile, UrlFolder, expand, is_url, names, read_url
from mmrep.data.sample import Sample
from mmrep.data.source import Source, SourceConfig, is_missing, require_unique, unwrap_media
from mmrep.encoder import BadSampleError

Format = Literal["csv", "tsv", "jsonl", "parquet"]
SUFFIXES: Mapping[str, Format] = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip


@config
class TableConfig(SourceConfig):
    """files: a path or URL, a glob or brace pattern, or a list of them. format: None goes by the suffix.

    paths: columns that hold paths of files. root: folder that relative paths start from, or its URL; None = the
    table's folder.
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

    Any URL that fsspec knows is read like a file: when the run starts, and whole. Paths beside a table behind a URL
    are URLs too, and read when the sample is.
    """

    Config = TableConfig

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        patterns = [config.files] if isinstance(config.files, str) else config.files
        self._files = expand(patterns, "files")
        root = config.root
        self._root = None if root is None else UrlFolder(root.rstrip("/")) if is_url(root) else Path(root).expanduser()
        self._tables = [open_rows(file, config.format) for file in self._files]
        self._ends = list(accumulate(len(table) for table in self._tables))
        if not self._ends[-1]:
            raise ConfigError([f"files: {', '.join(map(str, self._files))} holds no rows"])
        self.columns = tuple(dict.fromkeys(name for table in self._tables for name in table.columns))
        self.require_columns(config.paths, "paths")
        self.require_special_columns()
        self._names = names(self._files)
        if config.id is not None:
            require_unique((value for table in self._tables for value in table.column(config.id)), config.id)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        number, row = self._place(index)
        values = self._tables[number].row(row)
        folder = self._root or self._files[number].folder
        cells = {name: _here(unwrap_media(value, folder), value, folder) for name, value in values.items()}
        cells = {name: value for name, value in cells.items() if value not in ("", b"", [])}
        for name in self.config.paths:
            if isinstance(cells.get(name), str):
                cells[name] = _here(folder / cells[name], None, folder)
        return self.make_sample(cells, f"{self._names[number]}:{row}")

    def record_id(self, index: int) -> str:
        number, row = self._place(index)
        return f"{self._names[number]}:{row}"

    def fingerprint(self) -> str:
        """Paths, sizes and times of change of the files."""
        return f"table:{[file.stamp for file in self._files]}:{self.config}"

    def column(self, name: str) -> list[Any]:
        """See `Source.column`."""
        self.require_columns([name], "column")
        return [value for table in self._tables for value in table.column(name)]

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

    def __init__(self, content: bytes) -> None:
        self.lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
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


def open_rows(file: Path | DataFile, format: Format | None = None) -> Rows:
    """Open one table file.

    Raises:
        ConfigError: the format is unknown, the file is not of it, or it cannot be read to its end.
    """
    file = file if isinstance(file, DataFile) else DataFile.local(file)
    format = format or SUFFIXES.get(file.suffix)
    if format is None:
        known = ", ".join(SUFFIXES)
        raise ConfigError([f"files: {file} ends in none of {known}; set `format` to csv, tsv, jsonl or parquet"])
    import pyarrow as pa

    try:
        if format == "jsonl":
            return _JsonRows(file.read())
        if format == "parquet":
            import pyarrow.parquet

            return _ArrowRows(pyarrow.parquet.read_table(file.path or pa.BufferReader(file.read())))
        return _read_csv(file, "\t" if format == "tsv" else ",")
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError([f"files: {file} cannot be read as {format}: {error}"]) from error


def _read_csv(file: DataFile, delimiter: str) -> Rows:
    import pyarrow as pa
    import pyarrow.csv

    content = None if file.path is not None else file.read()
    with io.TextIOWrapper(file.open() if content is None else io.BytesIO(content), "utf-8-sig", "replace", "") as lines:
        header = next(csv.reader(lines, delimiter=delimiter), [])
    if len(set(header)) != len(header) or not all(header):
        raise ConfigError([f"files: the first line of {file} must name each column once, got {header}"])
    rejected: list[str] = []

    def reject(row: Any) -> str:
        counts = f"{row.actual_columns} cells for {row.expected_columns} columns"
        rejected.append(f"line {row.number}: {counts}: {row.text[:80]!r}")
        return "skip"

    table = pyarrow.csv.read_csv(
        file.path or pa.BufferReader(content),
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


def _here(value: Any, cell: Any, folder: Path | UrlFolder) -> Any:
    """The content of what a table behind a URL names beside itself; other values as they are."""
    return read_url(value) if isinstance(folder, UrlFolder) and isinstance(value, str) and value is not cell else value


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadSampleError("invalid utf-8", f"{error} in {data[:80]!r}") from error
