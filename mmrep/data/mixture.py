"""Several sources as one, each with a weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from fractions import Fraction
from heapq import heapify, heapreplace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import Component, ConfigError, Of, config
from mmrep.data.sample import Quarantined, Sample, stable_hash
from mmrep.data.source import Source


@config
class PartConfig:
    """source: any data source. weight: its share of an epoch, relative to the others'; all or none are given.

    columns: field → column of this source (``{caption: title}``), so that columns of different names meet in one field.
    """

    source: Annotated[Component, Of("sources")]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    columns: dict[str, str] = field(default_factory=dict)


@config
class MixtureConfig:
    """parts: sources by name. stop: when an epoch ends (see `Mixture`).

    shared_groups: equal groups of different parts are one group (captions as groups); otherwise a group is of one part.
    """

    parts: dict[str, PartConfig]
    stop: Literal["first", "all"] = "first"
    shared_groups: bool = False


class Mixture(Source):
    """Parts with weights; map-style if all parts are, else a stream. Ids are ``part name/id``.

    Read in order (`stream` without a seed, evaluation, ``shuffle=False``), a mixture is every record of every part
    once, evenly interleaved. A shuffled epoch keeps the weights exactly, not only on average: whenever it is stopped,
    each part has given its share of what was read to within as many samples as there are parts. Without weights an
    epoch is again every record once. With weights and

    * ``stop: first``, the epoch ends when the first part is exhausted; of the others it holds a random choice;
    * ``stop: all``, it ends when every part was read whole; smaller ones begin anew, in a new order. The views of a
      sample that is read again in the epoch differ from those of the first time.

    Of a stream each process interleaves its own piece of every part by the same rules. A column that a part lacks is a
    missing field there. Integer labels become class names where the parts' `class_names` differ.
    """

    Config = MixtureConfig

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        if not config.parts:
            raise ConfigError(["parts: at least one is needed"])
        self._names = list(config.parts)
        self._parts: list[Source] = []
        problems: list[str] = []
        for name, part in config.parts.items():
            try:
                if "/" in name or not name:
                    raise ConfigError(["a name is not empty and has no '/', which separates it from the id"])
                source: Source = part.source.build()
                _check_columns(source, part.columns)
                self._parts.append(source)
            except ConfigError as error:
                problems += [f"parts.{name}: {problem}" for problem in error.problems]
        if problems:
            raise ConfigError(problems)
        self.streaming = any(part.streaming for part in self._parts)
        self.has_group = any(part.has_group for part in self._parts)
        self._back = [{old: new for new, old in part.columns.items()} for part in config.parts.values()]
        self.columns = self._all_columns()
        classes = [part.class_names for part in self._parts]
        self.class_names = classes[0] if all(names == classes[0] for names in classes) else None
        self._weights = self._all_weights()
        if not self.streaming:
            self._counts = self._epoch_counts()
            # Position of a record in its part, as a share: sorting by it interleaves the parts evenly.
            part, row = _interleave([len(part) for part in self._parts], np.full(len(self._parts), 0.5))
            self._part_of, self._row_of = part.astype(np.int16), row

    def __len__(self) -> int:
        return super().__len__() if self.streaming else len(self._row_of)

    def __getitem__(self, index: int) -> Sample:
        if self.streaming:
            return super().__getitem__(index)
        number, row = self._place(index)
        return self._renamed(number, self._parts[number][row])

    def record(self, index: int) -> Sample | Quarantined:
        """The record at ``index``, or the note that it could not be read."""
        number, row = self._place(index)
        return self._named(number, self._parts[number].record(row))

    def record_id(self, index: int) -> str:
        number, row = self._place(index)
        return f"{self._names[number]}/{self._parts[number].record_id(row)}"

    @property
    def epoch_length(self) -> int:
        return super().__len__() if self.streaming else sum(self._counts)

    @property
    def most_repeats(self) -> int:
        return max(
            -(-count // part.epoch_length) * part.most_repeats
            for count, part in zip(self._counts, self._parts, strict=True)
        )

    def epoch_order(self, seed: int) -> Tensor:
        """See `Source.epoch_order`; each part is shuffled by itself, and the parts are interleaved by weight."""
        part, row = _interleave(self._counts, self._offsets(seed))
        found = np.empty(len(part), dtype=np.int64)
        for number, source in enumerate(self._parts):
            count = self._counts[number]
            passes = range(-(-count // source.epoch_length))
            drawn = torch.cat([source.epoch_order(self._seed(seed, number, again)) for again in passes])[:count]
            indices = np.flatnonzero(self._part_of == number)  # row → record number: rows are in order
            mine = part == number
            found[mine] = indices[drawn.numpy()[row[mine]]]
        return torch.from_numpy(found)

    def stream(self, part: int = 0, parts: int = 1, seed: int | None = None) -> Iterator[Sample | Quarantined]:
        """See `Source.stream`: in order every record once, with a seed an epoch by weight."""
        if not self.streaming:
            yield from super().stream(part, parts, seed)
            return
        offsets = [0.5] * len(self._parts) if seed is None else self._offsets(seed).tolist()
        weights = [float(weight) for weight in self._weights]
        inputs = [_Input(source, part, parts) for source in self._parts]
        queue = [
            (offset / weight, number) for number, (offset, weight) in enumerate(zip(offsets, weights, strict=True))
        ]
        heapify(queue)
        times = [0] * len(inputs)
        waiting = set(range(len(inputs)))  # parts that were not yet read whole
        given = [0] * len(inputs)
        while queue:
            at, number = queue[0]
            record = inputs[number].next(None if seed is None else self._seed(seed, number, times[number]))
            if record is None:
                waiting.discard(number)
                if seed is not None and (self.config.stop == "first" or not waiting):
                    return
                if seed is None or not given[number]:  # an empty piece of a part: nothing to begin anew
                    queue.remove((at, number))
                    heapify(queue)
                else:
                    times[number] += 1
                continue
            given[number] += 1
            heapreplace(queue, ((offsets[number] + given[number]) / weights[number], number))
            yield _again(self._named(number, record), times[number])

    def column(self, name: str) -> Sequence[Any]:
        """See `Source.column`; None where the part lacks the column."""
        self.require_columns([name], "column")
        return self._gathered([self._column(number, name) for number in range(len(self._parts))])

    def groups(self) -> Sequence[int | str | None]:
        """The groups of the parts that have them."""
        if self.streaming or not self.has_group:
            return super().groups()
        found = [part.groups() if part.has_group else [None] * len(part) for part in self._parts]
        return self._gathered([[self._group(i, group) for group in groups] for i, groups in enumerate(found)])

    def fingerprint(self) -> str:
        """The fingerprints of the parts, and how they are mixed."""
        return f"mixture:{[part.fingerprint() for part in self._parts]}:{self.config}"

    def _place(self, index: int) -> tuple[int, int]:
        return int(self._part_of[index]), int(self._row_of[index])

    def _gathered(self, values: Sequence[Sequence[Any]]) -> list[Any]:
        return [values[i][row] for i, row in zip(self._part_of.tolist(), self._row_of.tolist(), strict=True)]

    def _column(self, number: int, name: str) -> Sequence[Any]:
        source, mapping = self._parts[number], self.config.parts[self._names[number]].columns
        old = mapping.get(name, name)
        if (old == name and name in self._back[number]) or (source.columns is not None and old not in source.columns):
            return [None] * len(source)
        return source.column(old)

    def _renamed(self, number: int, sample: Sample) -> Sample:
        back, classes = self._back[number], self._parts[number].class_names
        label = sample.label
        if self.class_names is None and classes is not None and isinstance(label, int):
            label = classes[label] if 0 <= label < len(classes) else None  # -1 marks an unknown class
        fields = {back.get(name, name): value for name, value in sample.fields.items()} if back else sample.fields
        group = self._group(number, sample.group)
        return replace(sample, id=f"{self._names[number]}/{sample.id}", fields=fields, label=label, group=group)

    def _named(self, number: int, record: Sample | Quarantined) -> Sample | Quarantined:
        if isinstance(record, Sample):
            return self._renamed(number, record)
        field = self._back[number].get(record.field, record.field)
        return replace(record, id=f"{self._names[number]}/{record.id}", field=field)

    def _group(self, number: int, group: int | str | None) -> int | str | None:
        return group if group is None or self.config.shared_groups else f"{self._names[number]}/{group}"

    def _seed(self, seed: int, number: int, again: int) -> int:
        return stable_hash(seed, self._names[number], again)

    def _offsets(self, seed: int) -> np.ndarray:
        """Where in its first interval each part begins, in [0, 1): another order of the parts each epoch."""
        return np.array([stable_hash(seed, "offset", name) % 2**32 / 2**32 for name in self._names])

    def _all_columns(self) -> tuple[str, ...] | None:
        known: dict[str, None] = {}
        for part, back in zip(self._parts, self._back, strict=True):
            if part.columns is None:
                return None
            known.update(dict.fromkeys(back.get(name, name) for name in part.columns))
        return tuple(known)

    def _all_weights(self) -> list[Fraction]:
        given = {name: part.weight for name, part in self.config.parts.items()}
        without = [name for name, weight in given.items() if weight is None]
        if without and len(without) < len(given):
            raise ConfigError([f"parts.{name}: give every part a weight, or none" for name in without])
        if without and self.streaming:
            streams = [name for name, part in zip(self._names, self._parts, strict=True) if part.streaming]
            raise ConfigError([f"parts.{name}.weight: needed, since the length of a stream is unknown"
                               for name in streams])  # fmt: skip
        # A weight is the decimal number that was written: 0.1 and 0.3 are as 1 to 3.
        return [Fraction(part.epoch_length) if given[name] is None else Fraction(repr(given[name]))
                for name, part in zip(self._names, self._parts, strict=True)]  # fmt: skip

    def _epoch_counts(self) -> list[int]:
        """Samples of each part in a shuffled epoch."""
        sizes = [Fraction(part.epoch_length, 1) / w for part, w in zip(self._parts, self._weights, strict=True)]
        first = self.config.stop == "first"
        length = min(sizes) if first else max(sizes)
        counts = [(math.floor if first else math.ceil)(length * w) for w in self._weights]
        problems = [
            f"parts.{name}.weight: so small beside the others that an epoch of {sum(counts)} samples holds none of its "
            f"{len(part)}; raise it, or set `stop: all`"
            for name, part, count in zip(self._names, self._parts, counts, strict=True)
            if not count
        ]
        if problems:
            raise ConfigError(problems)
        return counts


class _Input:
    """One process's piece of a part of a stream, which can be begun anew."""

    def __init__(self, source: Source, part: int, parts: int) -> None:
        self.source, self.part, self.parts = source, part, parts
        self.records: Iterator[Sample | Quarantined] | None = None

    def next(self, seed: int | None) -> Sample | Quarantined | None:
        """The next record; None at the end of a pass, after which the next one begins."""
        if self.records is None:
            self.records = self._pass(seed)
        record = next(self.records, None)
        if record is None:
            self.records = None
        return record

    def _pass(self, seed: int | None) -> Iterator[Sample | Quarantined]:
        source = self.source
        if source.streaming or seed is None:
            return source.stream(self.part, self.parts, seed)
        return (source.record(index) for index in source.epoch_order(seed)[self.part :: self.parts].tolist())


def _again(record: Sample | Quarantined, times: int) -> Sample | Quarantined:
    return replace(record, times=times) if times and isinstance(record, Sample) else record


def _interleave(counts: Sequence[int], offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Part and row of each sample of an epoch: row k of a part of n is due at (k + offset) / n."""
    due = np.concatenate([(np.arange(n) + offset) / n for n, offset in zip(counts, offsets, strict=True)])
    order = np.argsort(due, kind="stable")
    part = np.repeat(np.arange(len(counts)), counts)[order]
    row = np.concatenate([np.arange(n) for n in counts])[order]
    return part, row


def _check_columns(source: Source, columns: Mapping[str, str]) -> None:
    """Refuse a mapping from columns that do not exist, or onto one that does, or of one column onto two fields."""
    source.require_columns(columns.values(), "columns")
    twice = sorted({old for old in columns.values() if list(columns.values()).count(old) > 1})
    taken = [new for new in columns if new in (source.columns or ()) and new not in columns.values()]
    problems = [f"columns: {old!r} is read into two fields; a column goes into one" for old in twice]
    problems += [
        f"columns.{new}: the source has a column {new!r} of its own; map that one to another name too" for new in taken
    ]
    if problems:
        raise ConfigError(problems)
