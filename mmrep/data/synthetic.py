"""A world of N modalities whose shared, unique and synergistic information is known to the bit.

In a recipe::

    train: {type: synthetic, fields: 3, shared: 4, unique: 2, synergy: 2, label: synergy}
    fields: {m0: m0, m1: m1, m2: m2}            # each read by a `features` encoder with inputs: 32
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import combinations
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.data.sample import Sample, stable_hash
from mmrep.data.source import Source, SourceConfig
from mmrep.views.view import uniform

Bits = Annotated[int, Field(ge=0, le=16)]
_LATENTS, _NOISE, _MISSING, _MAP = range(4)  # independent streams of one seed

_SLOPE = 0.2  # of the leaky rectifier


@config
class SyntheticConfig(SourceConfig):
    """split: which of three disjoint sets of samples. fields: N, at least 2. size: samples.

    shared: bits that all fields hold. pairwise: bits that exactly two fields hold, for each pair. unique: bits of each
    field alone. synergy: bits of each of the first two fields of ``triple``, whose parity (exclusive or) the third
    holds; with two fields the parity is a label only. triple: three fields, None: 0, 1, 2. width: of the vectors; at
    least the number of bits that one field holds. map: how a field's bits become its vector. noise: standard deviation
    of the normal noise, where the signal's mean square is 1. missing: probability that a field is missing, one for all
    or one each; one field of a sample is always there. seed: of the world, its maps included.
    """

    split: Literal["train", "validation", "test"] = "train"
    fields: Annotated[int, Field(ge=2, le=16)] = 3
    size: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    shared: Bits = 4
    pairwise: Bits = 1
    unique: Bits = 2
    synergy: Bits = 2
    triple: tuple[int, int, int] | None = None
    width: Annotated[int, Field(ge=1)] = 32
    map: Literal["linear", "nonlinear"] = "linear"
    noise: Annotated[float, Field(ge=0)] = 0.1
    missing: (
        Annotated[float, Field(ge=0, lt=1)] | Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2)]
    ) = 0.0
    seed: int = 0
    label: str | None = "shared"

    def __post_init__(self) -> None:
        if isinstance(self.missing, list) and len(self.missing) != self.fields:
            raise ValueError(f"missing: {len(self.missing)} probabilities for {self.fields} fields")
        chosen = self.triple
        if chosen is not None and (len(set(chosen)) < 3 or not all(0 <= f < self.fields for f in chosen)):
            raise ValueError(f"triple: three different fields of 0 to {self.fields - 1}, not {list(chosen)}")
        most = max(len(held) for held in _layout(self)[0])
        if not most:
            raise ValueError("shared, pairwise, unique and synergy are all 0: there is nothing to tell")
        if self.width < most:
            raise ValueError(f"width={self.width} is less than the {most} bits that a field holds")


class Synthetic(Source):
    """Vectors ``m0`` … ``m<N-1>``, float32 [width], each a fixed one-to-one map of its field's bits, plus noise.

    All bits are fair and independent, but for the parity. A linear map is a random matrix with orthogonal columns, so a
    linear reader recovers every bit; a nonlinear one sends that through leaky rectifiers and a second rotation.

    Labels are columns too, each the bits of one part as a whole number (bit b is ``(label >> b) & 1``): ``shared``,
    ``pair_<i>_<j>``, ``unique_<i>`` and ``synergy`` (the parity); those of parts without bits are left out.
    `mutual_information` and `label_information` say what can be known from what.

    Samples are numbers of a counter: the same on every machine, different in every split.
    """

    Config = SyntheticConfig

    def __init__(self, config: SyntheticConfig) -> None:
        super().__init__(config)
        self._held, self._parts = _layout(config)
        self._names = [f"m{i}" for i in range(config.fields)]
        self.columns = (*self._names, *self._parts)
        self.require_special_columns()
        # Counters of one seed: consecutive, far from those of the other splits.
        first = stable_hash("synthetic", config.seed, config.split) >> 1
        self._seeds = torch.arange(config.size) + first
        self._bits = _draw_bits(self._seeds, config)
        self._vectors = [self._make(field) for field in range(config.fields)]
        self._present = self._draw_present()

    def __len__(self) -> int:
        return self.config.size

    def __getitem__(self, index: int) -> Sample:
        row: dict[str, Any] = {
            name: vectors[index] if present else None
            for name, vectors, present in zip(self._names, self._vectors, self._present[index], strict=True)
        }
        row |= {name: int(self._packed(bits, index)) for name, bits in self._parts.items()}
        return self.make_sample(row, f"{self.config.split}/{index}")

    def column(self, name: str) -> list[Any]:
        """See `Source.column`."""
        self.require_columns([name], "column")
        if name in self._parts:
            return self._packed(self._parts[name]).tolist()
        field = self._names.index(name)
        return [
            vector if present else None
            for vector, present in zip(self._vectors[field], self._present[:, field], strict=True)
        ]

    def latents(self, field: int) -> np.ndarray:
        """The bits that a field holds: bool [size, bits]."""
        return self._bits[:, self._held[field]]

    def _packed(self, bits: Sequence[int], index: int | None = None) -> np.ndarray:
        chosen = self._bits[:, bits] if index is None else self._bits[index, bits]
        return chosen @ (1 << np.arange(len(bits)))

    def _make(self, field: int) -> np.ndarray:
        """The vectors of one field: float32 [size, width]."""
        c = self.config
        signs = 2.0 * self.latents(field) - 1
        width = c.width
        seed = torch.tensor([stable_hash("synthetic map", c.seed, field)])
        signal = np.zeros((c.size, width))
        if signs.shape[1]:
            spread = math.sqrt(width / signs.shape[1])
            signal = spread * signs @ _orthogonal(seed, width, signs.shape[1], _MAP).T
        if c.map == "nonlinear":
            # Bits and their opposites are as likely, so the rectifier leaves this share of the mean square.
            bent = np.where(signal > 0, signal, _SLOPE * signal) / math.sqrt((1 + _SLOPE**2) / 2)
            signal = bent @ _orthogonal(seed, width, width, _MAP + 1000).T
        noise = _normal(self._seeds, width, _NOISE + 16 * (field + 1)).numpy()
        return (signal + c.noise * noise).astype(np.float32)

    def _draw_present(self) -> np.ndarray:
        c = self.config
        u = uniform(self._seeds, c.fields, _MISSING).numpy()
        present = u >= np.asarray(c.missing)
        # Where all would go, the one that came nearest to staying stays.
        rescued = (u - np.asarray(c.missing)).argmax(1)[:, None] == np.arange(c.fields)
        return np.where(present.any(1, keepdims=True), present, rescued)


def mutual_information(config: SyntheticConfig, a: Collection[int], b: Collection[int]) -> dict[str, float]:
    """I(fields ``a``; fields ``b``) in bits, by part and in total.

    It is that of the fields' bits, exactly; of their vectors it is the upper bound (data processing), reached where the
    noise is small enough for every bit to be read. With uniform bits and parities it is
    rank(a) + rank(b) - rank(a and b together) over GF(2): a field and one it forms a parity with share nothing, but
    the third and the other two share ``synergy`` bits.

    Args:
        config: the world.
        a: field numbers.
        b: field numbers, none of them in ``a``.

    Returns:
        ``shared``, ``pairwise``, ``unique`` (always 0), ``synergy`` and ``total``.
    """
    first, second = _fields(config, a), _fields(config, b)
    if first & second:
        raise ValueError(f"fields {sorted(first & second)} stand on both sides")
    parity = [min(len(side & set(_triple(config))), 2) for side in (first, second, first | second)]
    parts = {
        "shared": float(config.shared * bool(first and second)),
        "pairwise": float(config.pairwise * len(first) * len(second)),
        "unique": 0.0,
        "synergy": float(config.synergy * (parity[0] + parity[1] - parity[2])),
    }
    return {**parts, "total": sum(parts.values())}


def label_information(config: SyntheticConfig, fields: Collection[int], label: str) -> float:
    """I(``fields``; a label column) in bits: how much a probe on those fields' vectors can know of it at most.

    The same remark on noise as for `mutual_information`. The parity (``synergy``) is known to the third field of the
    triple alone, and to any two of the three together.

    Raises:
        ValueError: no such label.
    """
    known, parts = _fields(config, fields), _layout(config)[1]
    if label not in parts:
        raise ValueError(f"label {label!r} is none of {', '.join(parts)}")
    kind, *where = label.split("_")
    if kind == "synergy":
        triple = _triple(config)
        return float(config.synergy * (len(known & set(triple)) >= 2 or (config.fields > 2 and triple[-1] in known)))
    told = bool(known) if kind == "shared" else bool(known & {int(field) for field in where})
    return float(len(parts[label]) * told)


def _fields(config: SyntheticConfig, fields: Collection[int]) -> set[int]:
    wrong = [field for field in fields if not 0 <= field < config.fields]
    if wrong:
        raise ValueError(f"there is no field {wrong[0]}; fields are 0 to {config.fields - 1}")
    return set(fields)


def _triple(config: SyntheticConfig) -> tuple[int, ...]:
    """The two fields that hold the operands and, if there are three fields, the one that holds their parity."""
    return config.triple or tuple(range(min(config.fields, 3)))


def _layout(config: SyntheticConfig) -> tuple[list[list[int]], dict[str, list[int]]]:
    """Which columns of the table of bits each field holds, and which make up each label."""
    held: list[list[int]] = [[] for _ in range(config.fields)]
    parts: dict[str, list[int]] = {}
    count = 0

    def add(name: str | None, bits: int, fields: Collection[int]) -> None:
        nonlocal count
        columns = list(range(count, count + bits))
        count += bits
        for field in fields:
            held[field] += columns
        if name is not None and bits:
            parts[name] = columns

    add("shared", config.shared, range(config.fields))
    for i, j in combinations(range(config.fields), 2):
        add(f"pair_{i}_{j}", config.pairwise, (i, j))
    for i in range(config.fields):
        add(f"unique_{i}", config.unique, (i,))
    first, second, *third = _triple(config)
    add(None, config.synergy, (first,))
    add(None, config.synergy, (second,))
    add("synergy", config.synergy, third)
    return held, parts


def _draw_bits(seeds: Tensor, config: SyntheticConfig) -> np.ndarray:
    """All bits of all samples: bool [size, bits]; the last ``synergy`` columns are the parities."""
    pairs = config.fields * (config.fields - 1) // 2
    free = config.shared + config.pairwise * pairs + config.unique * config.fields + 2 * config.synergy
    bits = (uniform(seeds, free, _LATENTS) < 0.5).numpy()
    first, second = free - 2 * config.synergy, free - config.synergy
    return np.concatenate([bits, bits[:, first:second] ^ bits[:, second:]], 1)


def _orthogonal(seed: Tensor, rows: int, columns: int, stream: int) -> np.ndarray:
    """A random matrix with orthonormal columns, float64 [rows, columns], uniform over all such."""
    made = _normal(seed, rows * columns, stream).view(rows, columns).double().numpy()
    q, r = np.linalg.qr(made)
    return q * np.sign(np.diag(r))  # libraries differ in the signs that they choose


def _normal(seeds: Tensor, n: int, stream: int) -> Tensor:
    """Standard normal numbers by Box and Muller: float32 [B, n], a function of the seeds."""
    u = uniform(seeds, 2 * n, stream)
    return (-2 * torch.log1p(-u[:, 0::2])).sqrt() * (2 * math.pi * u[:, 1::2]).cos()
