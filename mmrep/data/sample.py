"""One record, and the note that is kept of one that could not be read."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One record of a data source.

    Attributes:
        id: unique in its source; the same in every epoch and on every machine.
        fields: raw value by column; None (or an absent key) = missing, and missing is normal.
        label: class index or name, for zero-shot classification and probes.
        group: samples of one group are positives of each other (the same concept, class or duplicate).
        times: how often the epoch has read this sample before (a small part of a mixture); views differ each time.
    """

    id: str
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    label: int | str | None = None
    group: str | int | None = None
    times: int = 0


@dataclass(frozen=True)
class Quarantined:
    """A sample that could not be read: skipped, counted by cause, written to ``quarantine.jsonl``.

    Attributes:
        id: the sample's id.
        field: the field that failed, or "" if the record itself did.
        cause: short stable label to count by.
        detail: the error's words.
    """

    id: str
    field: str
    cause: str
    detail: str

    def as_dict(self) -> dict[str, str]:
        """The JSON line."""
        return asdict(self)


def stable_hash(*parts: object) -> int:
    """A 63-bit integer of the parts' text, the same on every machine and run (unlike ``hash``)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
