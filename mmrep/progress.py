"""A progress bar where somebody is looking: on the first process, on a terminal, and nowhere else."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm


def progress(total: int | None, *, desc: str, unit: str, show: bool = True, done: int = 0) -> tqdm[Any]:
    """A bar to update by hand, usable as a context manager; silent in log files, pipes and other processes.

    Args:
        total: how many units there are, None if unknown.
        desc: what is being done.
        unit: what is counted.
        show: False for silence even on a terminal.
        done: units done already, after a resume.
    """
    silent = not show or int(os.environ.get("RANK", "0")) != 0 or not sys.stderr.isatty()
    return tqdm(total=total, desc=desc, unit=unit, initial=done, disable=silent, dynamic_ncols=True)
