"""From a record to prepared tensors, and from those to a batch. Runs in loader workers."""

from __future__ import annotations

import dataclasses
import math
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from mmrep.data.batch import Batch
from mmrep.data.sample import Quarantined, Sample, stable_hash
from mmrep.embed.memo import content_key
from mmrep.encoder import BadSampleError, Encoder
from mmrep.tokens import Inputs
from mmrep.views.view import Params, Recorded, View

NOT_THE_DATA = (MemoryError, ImportError, NotImplementedError, AssertionError, NameError)
"""Exceptions that no value of a sample is to blame for: they stop the run at once."""


@dataclass(frozen=True)
class Item:
    """A sample that could be read.

    Attributes:
        id: the sample's id.
        label: class index or name, or None.
        group: 63-bit hash of the sample's group (of its id where it has none); 0 if the reader leaves groups out.
        seed: 63 bits; the batch-level randomness of this sample's views in this epoch derives from it.
        inputs: per field that the sample has, one prepared item per view.
        keys: per memoised field that the sample has, the content key of its item.
        params: per field that the sample has and whose views draw parameters, those of each view.
    """

    id: str
    label: int | str | None
    group: int
    seed: int
    inputs: dict[str, list[Inputs]]
    keys: dict[str, bytes]
    params: dict[str, list[Params]] = dataclasses.field(default_factory=dict)

    def only(self, fields: Collection[str]) -> Item:
        """The item without its other fields."""
        parts = {"inputs": self.inputs, "keys": self.keys, "params": self.params}
        return replace(self, **{k: {f: v for f, v in part.items() if f in fields} for k, part in parts.items()})


class Reader:
    """Reads the fields of samples with their encoders.

    A sample of which one field cannot be read is skipped whole: with half a sample, the pairs that it takes part in
    would depend on which half was broken.

    Args:
        encoders: per field, the encoder that reads it.
        columns: per field, the column that it is; a field without an entry is the column of its name.
        views: per field, its views, None for the deterministic reading; a field without an entry has one of these.
        memoised: fields whose prepared items are kept apart, with a content key, for a frozen encoder's memo. They
            have one reading, and no view that acts on the device.
        seed: what all randomness derives from, with epoch, sample id, field and view.
        group: whether batches carry groups; the source says so for all ranks alike.
        drop: by field, the probability that a sample's value is treated as missing in an epoch (modality dropout).
            Something always stays of a sample.

    Raises:
        ValueError: a memoised field has several views or one that acts on the device, or an entry names no field.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        views: Mapping[str, Sequence[View | None]] | None = None,
        memoised: Collection[str] = (),
        seed: int = 0,
        group: bool = False,
        drop: Mapping[str, float] | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        unknown = {*(views or {}), *memoised, *(drop or {})} - set(encoders)
        if unknown:
            raise ValueError(f"no field {', '.join(map(repr, sorted(unknown)))}; fields: {', '.join(encoders)}")
        self.encoders = dict(encoders)
        self.columns = {field: (columns or {}).get(field, field) for field in encoders}
        given = views or {}
        self.views = {f: tuple(given.get(f, ())) or (None,) for f in encoders}
        self.drawn = frozenset(f for f, views in self.views.items() if any(_overrides(v, "parameters") for v in views))
        """Fields some view of which draws parameters sample by sample."""
        self.memoised = frozenset(memoised)
        self.seed = seed
        self.group = group
        self.drop = dict(drop or {})
        for field in self.memoised:
            if len(self.views[field]) != 1 or _overrides(self.views[field][0], "batch"):
                raise ValueError(f"field {field!r} is memoised: it must have one reading, and no view on the device")
        self.fixed = frozenset(f for f, views in self.views.items() if not any(_overrides(v, "sample") for v in views))
        """Fields whose prepared items are the same in every epoch: no view acts on single samples."""

    @property
    def fields(self) -> list[str]:
        """The fields that are read."""
        return list(self.encoders)

    def read(self, sample: Sample | Quarantined, epoch: int, kept: Item | None = None) -> Item | Quarantined:
        """Prepare every field that the sample has.

        Args:
            sample: the record; a quarantined one is passed on.
            epoch: part of the seed of every random reading.
            kept: an earlier reading of the same sample, whose `inputs` are used in place of preparing again.
        """
        if isinstance(sample, Quarantined):
            return sample
        inputs = {} if kept is None else dict(kept.inputs)
        keys = {} if kept is None else dict(kept.keys)
        params = {} if kept is None else dict(kept.params)
        for field, encoder in self.encoders.items():
            raw = sample.fields.get(self.columns[field])
            if raw is None or field in inputs:
                continue
            views = [Recorded(v) if v and _overrides(v, "parameters") else v for v in self.views[field]]
            try:
                inputs[field] = [
                    encoder.prepare(raw, view=view, seed=stable_hash(self.seed, epoch, sample.id, field, own))
                    for own, view in ((_followed(number, view), view) for number, view in enumerate(views))
                ]
            except Exception as error:
                return failure(error, sample.id, field)
            if field in self.drawn:
                params[field] = [view.params if isinstance(view, Recorded) else {} for view in views]
            if field in self.memoised:
                keys[field] = content_key(inputs[field][0])
        if not inputs:
            wanted, has = ", ".join(dict.fromkeys(self.columns.values())), ", ".join(sample.fields) or "nothing"
            return Quarantined(sample.id, "", "empty sample", f"it has none of {wanted}; it has {has}")
        mine = ("id", sample.id) if sample.group is None else ("group", sample.group)
        group = stable_hash(*mine) if self.group else 0
        return Item(sample.id, sample.label, group, stable_hash(self.seed, epoch, sample.id), inputs, keys, params)

    def again(self, kept: Item, epoch: int) -> Item:
        """The reading in another epoch of an item all of whose fields are `fixed`."""
        return replace(kept, seed=stable_hash(self.seed, epoch, kept.id))

    def collate(self, items: Sequence[Item | Quarantined], micro_batch: int | None = None) -> Batch:
        """Make a batch of the samples that could be read; there may be none.

        Args:
            items: what was read.
            micro_batch: collate the fields in parts of at most so many samples, of nearly equal size; there is always
                a part, so that all processes see alike whether batches come in parts. None: all at once.
        """
        # Only here, not when an item is read: a loader may keep what was read for other epochs.
        good = [self._thinned(item) for item in items if isinstance(item, Item)]
        batch = self._frame(good, [item for item in items if isinstance(item, Quarantined)])
        if micro_batch is None:
            return self._fill(batch, good)
        count = max(1, -(-len(good) // micro_batch))
        edges = [len(good) * k // count for k in range(count + 1)]
        for start, stop in pairwise(edges):
            batch.parts.append(self._fill(self._frame(good[start:stop], []), good[start:stop]))
        return batch

    def _thinned(self, item: Item) -> Item:
        """The item without the fields that modality dropout takes from it; of its last ones, the likeliest stays."""
        own = [field for field in item.inputs if self.columns[field] == field]
        if not self.drop or not own:
            return item
        # How far each field is from being dropped: the draw over its probability. Below 1 it goes.
        draws = {field: stable_hash(item.seed, "drop", field) / 2**63 for field in own}
        margins = {f: u / self.drop[f] if self.drop.get(f, 0) > 0 else math.inf for f, u in draws.items()}
        kept = [field for field, margin in margins.items() if margin >= 1]
        kept = kept or [max(margins, key=lambda field: margins[field])]
        return item.only([*kept, *(field for field in item.inputs if field not in own)])

    def _frame(self, good: Sequence[Item], bad: list[Quarantined]) -> Batch:
        """A batch that lacks only the values of its fields."""
        return Batch(
            ids=[item.id for item in good],
            seeds=torch.tensor([item.seed for item in good], dtype=torch.long),
            group=torch.tensor([item.group for item in good], dtype=torch.long) if self.group else None,
            labels=[item.label for item in good],
            quarantined=bad,
            present={f: torch.tensor([f in item.inputs for item in good], dtype=torch.bool) for f in self.encoders},
        )

    def _fill(self, batch: Batch, good: Sequence[Item]) -> Batch:
        for field, encoder in self.encoders.items():
            have = [item for item in good if field in item.inputs]
            if not have:
                continue
            count = range(len(self.views[field]))
            if field in self.memoised:
                batch.items[field] = [item.inputs[field][0] for item in have]
                batch.keys[field] = [item.keys[field] for item in have]
            else:
                batch.inputs[field] = [encoder.collate([item.inputs[field][view] for item in have]) for view in count]
            if field in self.drawn:
                batch.params[field] = [_stacked([item.params[field][view] for item in have]) for view in count]
        return batch


def failure(error: Exception, id: str, field: str) -> Quarantined:
    """The note of a value that could not be read.

    What users feed is arbitrary, so whatever a decoder raises counts as a bad sample; a mistake in the code behaves
    the same way, fails on nearly every sample, and so meets the quarantine's limit, which shows the note's words.

    Args:
        error: what ``Encoder.prepare`` raised.
        id: the sample's id.
        field: the field that was read.

    Raises:
        Exception: the error itself, if it is one of `NOT_THE_DATA`, with the sample named in a note.
    """
    if isinstance(error, NOT_THE_DATA):
        error.add_note(f"while reading field {field!r} of sample {id!r}")
        raise error
    detail = str(error)
    if isinstance(error, BadSampleError):
        cause = error.cause
    elif isinstance(error, FileNotFoundError):
        cause = "missing file"
    elif isinstance(error, OSError):
        cause = "unreadable file"
    elif isinstance(error, UnicodeError):
        cause = "invalid utf-8"
    else:
        cause = f"unexpected {type(error).__name__}"
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        detail = f"{detail}{where}"
    return Quarantined(id, field, cause, detail[:500])


def _stacked(params: Sequence[Params]) -> Params:
    return {name: torch.stack([one[name] for one in params]) for name in params[0]}


def _overrides(view: View | None, method: str) -> bool:
    return view is not None and getattr(type(view), method) is not getattr(View, method)


def _followed(number: int, view: View | None) -> int:
    """The number of the reading whose random numbers a reading draws: its own, or that which it follows."""
    return number if view is None or view.follows is None else view.follows
