"""A vector index in process: FAISS for the numbers, one JSON record a row for what they stand for."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmrep.embed._index_folder import checked_file, read_meta, write_folder

METRICS = ("cosine", "dot")
_FINGERPRINT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Hit:
    """One search result.

    Attributes:
        id: the record's id.
        score: cosine or inner product, higher is nearer.
        record: the record as it was given, after a round trip through JSON.
    """

    id: str | int
    score: float
    record: dict[str, Any]


class Index:
    """Embeddings with their records, searched by inner product; exact unless another FAISS structure is asked for.

    Make one with `Index.build` or `Index.open`.

    Attributes:
        dim: width of the embeddings.
        metric: "cosine" (rows and queries are normalised here) or "dot".
        meta: the caller's JSON-able dict, by convention `model` (its name) and `fingerprint` (see `check_model`).
    """

    def __init__(
        self, dim: int, *, metric: str = "cosine", meta: Mapping[str, Any] | None = None, factory: str = "Flat"
    ):
        """An empty index; arguments as in `build`."""
        import faiss

        if metric not in METRICS:
            near = difflib.get_close_matches(str(metric), METRICS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"metric {metric!r} is unknown: choose one of {', '.join(METRICS)}{hint}")
        if dim < 1:
            raise ValueError(f"an index needs at least one dimension, got {dim}")
        self.dim, self.metric, self._factory = int(dim), metric, factory
        self.meta: dict[str, Any] = json.loads(_to_json(dict(meta or {}), "meta"))
        try:
            self._faiss: Any = faiss.index_factory(self.dim, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(f"FAISS knows no index {factory!r} of {self.dim} dimensions: {error}") from error
        self._lines: list[str] = []
        self._ids: list[str | int] = []
        self._known: set[str] = set()

    @classmethod
    def build(
        cls,
        embeddings: Tensor | np.ndarray | Sequence[Sequence[float]],
        records: Iterable[Mapping[str, Any]],
        *,
        metric: str = "cosine",
        meta: Mapping[str, Any] | None = None,
        factory: str = "Flat",
    ) -> Index:
        """An index of `embeddings` [N, D].

        Args:
            embeddings: finite values; kept in fp32.
            records: N JSON-able dicts, each with its own `id`, a string or an integer ("1" and 1 are the same id).
            metric: "cosine" or "dot".
            meta: what to remember with the index; see the class.
            factory: a FAISS factory string, as "HNSW32" or "SQ8"; the default is exact.

        Raises:
            ValueError: naming the ids, for a repeated or missing id, a row with NaN or infinity, a zero row under
                "cosine", or a record that is not JSON-able.
        """
        matrix = _matrix(embeddings, "embeddings")
        index = cls(matrix.shape[1], metric=metric, meta=meta, factory=factory)
        index.add(matrix, records)
        return index

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, id: object) -> bool:
        return str(id) in self._known

    def __repr__(self) -> str:
        return f"Index({len(self)} x {self.dim}, metric={self.metric!r}, factory={self._factory!r})"

    @property
    def ids(self) -> list[str | int]:
        """The ids in row order."""
        return list(self._ids)

    def add(
        self, embeddings: Tensor | np.ndarray | Sequence[Sequence[float]], records: Iterable[Mapping[str, Any]]
    ) -> None:
        """Append rows. All of them or, on an error, none. Arguments and errors as in `build`."""
        matrix, rows = _matrix(embeddings, "embeddings"), [dict(record) for record in records]
        if len(matrix) != len(rows):
            raise ValueError(f"{len(matrix)} embeddings but {len(rows)} records: there must be one record a row")
        ids = [_checked_id(record, f"record {row}") for row, record in enumerate(rows)]
        seen, repeated = set(self._known), []
        for name in ids:
            if str(name) in seen:
                repeated.append(name)
            seen.add(str(name))
        if repeated:
            raise ValueError(
                f"ids must be unique, but these are already in the index or come twice: {_listed(repeated)}"
            )
        prepared = self._prepare(matrix, ids)
        lines = [_to_json(record, f"the record of {name!r}") for name, record in zip(ids, rows, strict=True)]
        if len(prepared):
            if not self._faiss.is_trained:
                self._faiss.train(prepared)
            self._faiss.add(prepared)
        self._lines += lines
        self._ids += ids
        self._known = seen

    def search(self, queries: Tensor | np.ndarray | Sequence[Any], k: int = 10) -> list[list[Hit]]:
        """The k nearest rows of each query, best first; fewer where the index holds fewer.

        Args:
            queries: [Q, D], or [D] for one query.
            k: at least 1.

        Returns:
            Q lists of hits.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        matrix = _matrix(queries, "queries", promote=True)
        prepared = self._prepare(matrix, [f"query {row}" for row in range(len(matrix))])
        if not len(self) or not len(prepared):
            return [[] for _ in range(len(prepared))]
        scores, rows = self._faiss.search(prepared, min(k, len(self)))
        return [
            # an approximate structure may find fewer than k and pads with row -1
            [Hit(self._ids[r], float(s), json.loads(self._lines[r])) for s, r in zip(*pair, strict=True) if r >= 0]
            for pair in zip(scores, rows, strict=True)
        ]

    def check_model(self, fingerprint: Any) -> None:
        """Refuse a model other than the one that made the embeddings: its vectors live in another space.

        Args:
            fingerprint: any JSON-able value, compared with `meta["fingerprint"]`; lists of numbers may differ by 1e-3
                of their largest entry, so that another machine's rounding is no other model.

        Raises:
            ValueError: when they differ, or when the index does not say.
        """
        name = f" ({self.meta['model']})" if "model" in self.meta else ""
        if self.meta.get("fingerprint") is None:
            raise ValueError(
                f"this index{name} was saved without a model fingerprint, so it cannot be told whether the model fits"
            )
        stored, given = self.meta["fingerprint"], json.loads(_to_json(fingerprint, "fingerprint"))
        if not _same_fingerprint(stored, given):
            raise ValueError(
                f"this index was made by another model{name}: its fingerprint is {_short(stored)}, "
                f"this model's is {_short(given)}. "
                "Index the data again with this model, or load the model that made the index"
            )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the index to `folder`, replacing an index that is there in one step.

        Raises:
            FileExistsError: when the folder holds something that is not an index.
        """
        import faiss

        meta = {"metric": self.metric, "dim": self.dim, "count": len(self), "factory": self._factory, "meta": self.meta}
        return write_folder(Path(folder), meta, lambda path: faiss.write_index(self._faiss, str(path)), self._lines)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Index:
        """Read an index that `save` wrote.

        Raises:
            FileNotFoundError: when the folder, or a file of it, is missing.
            ValueError: when it is not an index folder, or its parts do not agree (truncated, foreign or edited files).
        """
        import faiss

        target = Path(folder)
        meta = read_meta(target)
        paths = {kind: checked_file(target, meta["files"][kind]) for kind in ("index", "records")}
        index = cls(meta["dim"], metric=meta["metric"], meta=meta["meta"])
        index._factory = meta["factory"]
        try:
            index._faiss = faiss.read_index(str(paths["index"]))
        except RuntimeError as error:
            raise ValueError(f"{paths['index']} cannot be read by FAISS: {error}") from error
        for what, found, stated in (
            ("dimensions", index._faiss.d, meta["dim"]),
            ("rows", index._faiss.ntotal, meta["count"]),
            ("metric type", index._faiss.metric_type, faiss.METRIC_INNER_PRODUCT),
        ):
            if found != stated:
                raise ValueError(
                    f"{paths['index']} has {found} {what}, but meta.json says {stated}: the index is damaged"
                )
        with paths["records"].open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                where = f"{paths['records']}, line {number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{where}, is not JSON: {error}") from error
                index._ids.append(_checked_id(record, where))
                index._lines.append(line.rstrip("\n"))
        index._known = {str(name) for name in index._ids}
        if not len(index._known) == len(index._ids) == meta["count"]:
            raise ValueError(
                f"{paths['records']} has {len(index._ids)} records with {len(index._known)} ids, "
                f"but meta.json says {meta['count']}: the index is damaged"
            )
        return index

    def _prepare(self, matrix: np.ndarray, names: Sequence[object]) -> np.ndarray:
        """fp32 rows ready for the inner product, or an error that names the rows that cannot be."""
        if matrix.shape[1] != self.dim:
            raise ValueError(f"the index has {self.dim} dimensions, these vectors have {matrix.shape[1]}")
        bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
        if len(bad):
            raise ValueError(f"NaN or infinity in the vectors of {_listed([names[int(row)] for row in bad])}")
        if self.metric == "cosine":
            norms = np.linalg.norm(matrix.astype(np.float64), axis=1, keepdims=True)
            zero = np.flatnonzero(norms == 0)
            if len(zero):
                raise ValueError(f"a zero vector has no cosine: {_listed([names[int(row)] for row in zero])}")
            matrix = matrix / norms
        return np.ascontiguousarray(matrix, dtype=np.float32)


def _matrix(values: Any, name: str, *, promote: bool = False) -> np.ndarray:
    array = (
        values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=np.float32)
    )
    if promote and array.ndim == 1 and len(array):
        array = array[None]
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape [rows, dim], got {array.shape}")
    return array


def _checked_id(record: Any, where: str) -> str | int:
    name = record.get("id") if isinstance(record, dict) else None
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError(f"{where}: every record is a dict with an 'id', a string or an integer, got {record!r:.200}")
    return name


def _to_json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)  # ASCII only, so that odd file names and line separators survive
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from error


def _listed(names: Sequence[object], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _same_fingerprint(stored: Any, given: Any) -> bool:
    def numbers(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(v) in (int, float) for v in value)

    if numbers(stored) and numbers(given):
        a, b = np.asarray(stored, dtype=np.float64), np.asarray(given, dtype=np.float64)
        return a.shape == b.shape and bool(np.abs(a - b).max() <= _FINGERPRINT_TOLERANCE * np.abs(a).max())
    return stored == given
