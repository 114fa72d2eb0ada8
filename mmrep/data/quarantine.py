"""The count of samples that could not be read, and the share at which a run stops for them."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from mmrep.data.sample import Quarantined

logger = logging.getLogger(__name__)

FILE = "quarantine.jsonl"
_EXAMPLES = 3
_HOPELESS = 20


class TooManyBadSamples(ValueError):
    """More samples than the stated share could not be read; the message counts them by cause and shows examples."""


class Quarantine:
    """Bad samples of one process of a run: each is listed once, and the share of bad readings is judged.

    The share is taken over readings, so it means the same in the first epoch and in the hundredth.

    Args:
        folder: where ``quarantine.jsonl`` is appended to; None writes nothing. Several processes may write one file,
            since their lines are appended whole; a resumed run goes on with what it finds there.
        limit: the largest tolerated share of bad samples among those read, 0 to 1. 0 tolerates none.
        minimum: the share is not judged before this many samples were read, unless all of the first 20 are bad or
            the limit is 0.
        processes: how many processes write the file.
    """

    def __init__(self, folder: Path | None, limit: float, minimum: int = 1000, processes: int = 1) -> None:
        if not 0 <= limit <= 1:
            raise ValueError(f"limit is a share between 0 and 1, got {limit}")
        self.path = None if folder is None else folder / FILE
        self.limit = limit
        self.minimum = minimum
        self.seen = 0
        self.causes: Counter[str] = Counter()
        self._examples: dict[str, list[Quarantined]] = {}
        self._listed: set[tuple[str, str]] = set()
        for note in [] if self.path is None else _read(self.path):
            self._list(note)
        self._ids = {id for id, _ in self._listed}
        self.bad = len(self._ids) / processes
        """Bad readings; a resumed process starts from its share of the samples listed before."""

    def add(self, bad: Iterable[Quarantined], seen: int) -> None:
        """Count the bad samples of one batch.

        Args:
            bad: the samples of the batch that could not be read.
            seen: how many samples this process has read so far in the run, good and bad, this batch included.

        Raises:
            TooManyBadSamples: the share is past the limit.
        """
        bad = list(bad)
        self.seen = max(self.seen, seen)
        self.bad += len(bad)
        fresh = {(note.id, note.field): note for note in bad if (note.id, note.field) not in self._listed}
        for note in fresh.values():
            if note.cause not in self.causes:
                logger.warning("sample %r skipped, field %r: %s", note.id, note.field, note.detail or note.cause)
            self._ids.add(note.id)
            self._list(note)
        if fresh and self.path is not None:
            _append(self.path, fresh.values())
        hopeless = self.bad >= self.seen >= _HOPELESS
        if (self.seen >= self.minimum or hopeless or self.limit == 0) and self.bad > self.limit * self.seen:
            raise TooManyBadSamples(self._words())

    def summary(self) -> str:
        """One line: how many distinct samples, by cause; empty if all could be read."""
        if not self.causes:
            return ""
        causes = ", ".join(f"{count} {cause}" for cause, count in self.causes.most_common())
        where = f"; they are listed in {self.path}" if self.path is not None else ""
        return f"{len(self._ids)} samples could not be read and were skipped ({causes}){where}"

    def _list(self, note: Quarantined) -> None:
        self._listed.add((note.id, note.field))
        self.causes[note.cause] += 1
        examples = self._examples.setdefault(note.cause, [])
        if len(examples) < _EXAMPLES:
            examples.append(note)

    def _words(self) -> str:
        share = f"{self.bad / self.seen:.1%} of the {self.seen} samples read are bad; the limit is {self.limit:.1%}"
        lines = [f"{share}. {self.summary()}"]
        for cause, examples in self._examples.items():
            lines += [f"  {cause}: sample {n.id!r}, field {n.field!r}: {n.detail or n.cause}" for n in examples]
        return "\n".join([*lines, "Repair or remove them, or raise the limit if they are to be skipped."])


def _read(path: Path) -> Iterator[Quarantined]:
    """What a quarantine file lists, once each; a half-written line is passed over."""
    seen: set[tuple[str, str]] = set()
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            note = Quarantined(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if (note.id, note.field) not in seen:
            seen.add((note.id, note.field))
            yield note


def _append(path: Path, notes: Iterable[Quarantined]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(note.as_dict()) + "\n" for note in notes).encode()
    with path.open("a+b", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read() == b"\n" else b"\n" + lines  # a kill may have left half a line behind
        file.write(lines)
