"""The count of samples that could not be read, and the limit at which a run stops for them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmrep.data.sample import Quarantined

logger = logging.getLogger(__name__)

FILE = "quarantine.jsonl"
_EXAMPLES = 3


class TooManyBadSamples(ValueError):
    """More samples than the stated share could not be read; the message counts them by cause and shows examples."""


class Quarantine:
    """Bad samples of one run, each counted and written once.

    Several processes may write one file: every line is appended in a single write. Each process judges the share of
    its own samples.

    Args:
        folder: where ``quarantine.jsonl`` is appended to; None writes nothing. A resumed run goes on with its file.
        limit: the largest tolerated share of bad samples among those seen, 0 to 1. 0 tolerates none.
        minimum: the share is not judged before this many samples, or the first epoch, were seen.
    """

    def __init__(self, folder: Path | None, limit: float, minimum: int = 1000) -> None:
        if not 0 <= limit <= 1:
            raise ValueError(f"limit is a share between 0 and 1, got {limit}")
        self.path = None if folder is None else folder / FILE
        self.limit = limit
        self.minimum = minimum
        self.seen = 0
        self.bad = 0
        self.causes: Counter[str] = Counter()
        self._counting = True
        self._examples: dict[str, list[Quarantined]] = {}
        self._entries: set[tuple[str, str]] = set()
        self._ids: set[str] = set()
        self._written = set() if self.path is None else set(_entries(self.path))

    def add(self, bad: Iterable[Quarantined], seen: int) -> None:
        """Count one batch.

        Args:
            bad: the samples of the batch that could not be read.
            seen: how many samples the batch was made of, good and bad.

        Raises:
            TooManyBadSamples: the share is past the limit.
        """
        if self._counting:
            self.seen += seen
        fresh = {(note.id, note.field): note for note in bad if (note.id, note.field) not in self._entries}
        if fresh:
            for key, note in fresh.items():
                self._count(key, note)
            self._append([note for key, note in fresh.items() if key not in self._written])
        if self.seen >= self.minimum or self.limit == 0:
            self._judge()

    def end_epoch(self) -> None:
        """Say that every sample was seen once: from here on only bad samples that are new are counted.

        Raises:
            TooManyBadSamples: the share is past the limit.
        """
        self._counting = False
        self._judge()

    def summary(self) -> str:
        """One line: how many of how many, by cause."""
        if not self.causes:
            return f"all {self.seen} samples could be read"
        causes = ", ".join(f"{count} {cause}" for cause, count in self.causes.most_common())
        share = f" ({self.bad / self.seen:.2%})" if self.seen else ""
        return f"{self.bad} of {self.seen} samples{share} could not be read: {causes}"

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return {"seen": self.seen, "bad": self.bad, "causes": dict(self.causes), "counting": self._counting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the counts of a checkpoint; what the file lists already is counted in them."""
        self.seen, self.bad, self._counting = state["seen"], state["bad"], state["counting"]
        self.causes = Counter(state["causes"])
        self._entries |= self._written
        self._ids |= {id for id, _ in self._written}

    def _count(self, key: tuple[str, str], note: Quarantined) -> None:
        self._entries.add(key)
        if note.id not in self._ids:
            self._ids.add(note.id)
            self.bad += 1
        self.causes[note.cause] += 1
        examples = self._examples.setdefault(note.cause, [])
        if not examples:
            logger.warning("sample %r skipped, field %r: %s", note.id, note.field, note.detail or note.cause)
        if len(examples) < _EXAMPLES:
            examples.append(note)

    def _append(self, notes: list[Quarantined]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A kill may have left half a line behind.
        torn = self.path.exists() and not self.path.read_bytes()[-1:] in (b"", b"\n")
        lines = "".join(json.dumps(note.as_dict(), ensure_ascii=True) + "\n" for note in notes)
        with self.path.open("ab", buffering=0) as file:
            file.write((("\n" if torn else "") + lines).encode())
        self._written |= {(note.id, note.field) for note in notes}

    def _judge(self) -> None:
        if self.bad <= self.limit * self.seen:
            return
        lines = [f"{self.summary()}. The limit is {self.limit:.2%}."]
        for cause, examples in self._examples.items():
            lines += [f"  {cause}: sample {n.id!r}, field {n.field!r}: {n.detail or n.cause}" for n in examples]
        if self.path is not None:
            lines.append(f"All are listed in {self.path}. Repair or remove them, or raise the limit if they are to be skipped.")
        raise TooManyBadSamples("\n".join(lines))


def _entries(path: Path) -> Iterable[tuple[str, str]]:
    """What a quarantine file lists; a half-written line is passed over."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            note = json.loads(line)
            yield note["id"], note["field"]
        except (ValueError, KeyError, TypeError):
            continue
