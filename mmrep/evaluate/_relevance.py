"""Which items answer which queries, without a queries x items matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmrep.evaluate._arrays import ArrayLike


@dataclass(frozen=True, eq=False)
class Relevance:
    """Which of N items answer which of Q queries. Build it with `paired`, `from_groups`, `from_sets` or `from_csr`.

    Attributes:
        queries: Q.
        items: N.
        counts: relevant items of each query, int64 [Q].
    """

    queries: int
    items: int
    counts: np.ndarray
    _codes: tuple[Tensor, Tensor] | None = None  # group number of each query and item
    _csr: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def paired(cls, n: int) -> Relevance:
        """Item i, and only it, answers query i."""
        return cls.from_groups(np.arange(n), np.arange(n))

    @classmethod
    def from_groups(cls, query_group: ArrayLike, item_group: ArrayLike) -> Relevance:
        """An item answers a query when their groups are equal. None is in no group.

        Args:
            query_group: [Q] integers, strings or None.
            item_group: [N] likewise.
        """
        numbers: dict[object, int] = {}
        codes = [
            np.array(
                [alone if g is None else numbers.setdefault(g, len(numbers)) for g in _tolist(groups)], dtype=np.int64
            )
            for groups, alone in ((query_group, -1), (item_group, -2))
        ]
        sizes = np.bincount(codes[1][codes[1] >= 0], minlength=len(numbers) + 1)
        counts = np.where(codes[0] >= 0, sizes[codes[0]], 0)
        return cls(
            len(codes[0]), len(codes[1]), counts, _codes=(torch.from_numpy(codes[0]), torch.from_numpy(codes[1]))
        )

    @classmethod
    def from_sets(cls, relevant: Sequence[Iterable[int]], items: int) -> Relevance:
        """`relevant[q]` holds the indices of the items that answer query q."""
        rows = [np.asarray([int(i) for i in indices], dtype=np.int64) for indices in relevant]
        indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        return cls.from_csr(indptr, np.concatenate(rows) if rows else np.zeros(0, np.int64), items)

    @classmethod
    def from_csr(cls, indptr: ArrayLike, indices: ArrayLike, items: int) -> Relevance:
        """As `from_sets`, flattened: query q is answered by `indices[indptr[q]:indptr[q + 1]]`."""
        starts, columns = np.asarray(indptr, dtype=np.int64), np.asarray(indices, dtype=np.int64)
        if (
            starts.ndim != 1
            or not len(starts)
            or starts[0] != 0
            or starts[-1] != len(columns)
            or (np.diff(starts) < 0).any()
        ):
            raise ValueError(f"indptr must rise from 0 to {len(columns)}, the number of indices")
        bad = columns[(columns < 0) | (columns >= items)]
        if len(bad):
            raise ValueError(f"relevant item {bad[0]} does not exist: there are {items} items, numbered from 0")
        # an item named twice for one query is still one item
        rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        rows, columns = np.divmod(np.unique(rows * max(items, 1) + columns), max(items, 1))
        counts = np.bincount(rows, minlength=len(starts) - 1)
        return cls(len(counts), items, counts, _csr=(np.concatenate([[0], np.cumsum(counts)]), columns))

    def block(self, rows: slice, columns: slice, device: torch.device) -> Tensor:
        """Relevance of the given queries and items, bool [rows, columns]."""
        if self._codes is not None:
            queries, items = self._codes
            return queries[rows, None].to(device) == items[None, columns].to(device)
        assert self._csr is not None
        indptr, indices = self._csr
        entries = indices[indptr[rows.start] : indptr[rows.stop]]
        local = np.repeat(np.arange(rows.stop - rows.start), self.counts[rows])
        inside = (entries >= columns.start) & (entries < columns.stop)
        block = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool)
        block[torch.from_numpy(local[inside]), torch.from_numpy(entries[inside] - columns.start)] = True
        return block.to(device)


def _tolist(groups: ArrayLike) -> list[object]:
    return list(groups.tolist()) if isinstance(groups, Tensor | np.ndarray) else list(groups)
