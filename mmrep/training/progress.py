"""The progress of a run, where somebody is looking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrep.progress import progress


class Progress:
    """A bar of steps with the last loss and speed; silent where `mmrep.progress.progress` is.

    Args:
        total: steps of the run, None if unknown.
        done: steps already taken, after a resume.
        main: whether this process may draw.
    """

    def __init__(self, total: int | None, *, done: int = 0, main: bool = True) -> None:
        self._bar = progress(total, desc="train", unit="step", show=main, done=done)

    def advance(self) -> None:
        """One more step."""
        self._bar.update()

    def show(self, line: Mapping[str, Any]) -> None:
        """Show the loss and the speed of the last metrics line."""
        names = {"loss": "loss", "samples_per_second": "samples/s"}
        self._bar.set_postfix({label: f"{line[key]:.4g}" for key, label in names.items() if key in line})

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        self._bar.close()
