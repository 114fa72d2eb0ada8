"""One process evaluates, the others run its errands: so evaluations need not know that there are several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from mmrep.training.collectives import world

_DONE = "done"


class Errands:
    """Work that all processes must do together, when the first one asks for it.

    The first process calls `ask` and, at the end, `done`; all others call `follow`, which returns then. Where the first
    one fails, the others are freed by its end (see `mmrep.training.roll_call`).

    Args:
        errands: by name; called with the same arguments on every process.
    """

    def __init__(self, errands: Mapping[str, Callable[..., Any]]) -> None:
        self._errands = errands
        self._together = world().size > 1

    def ask(self, name: str, *arguments: Any) -> Any:
        """Run an errand on every process; returns what it gives here."""
        if self._together:
            dist.broadcast_object_list([(name, arguments)], 0)
        return self._errands[name](*arguments)

    def done(self) -> None:
        """Let the others go."""
        if self._together:
            dist.broadcast_object_list([(_DONE, ())], 0)

    def follow(self) -> None:
        """Run what the first process asks for, until it is done."""
        while True:
            asked: list[Any] = [None]
            dist.broadcast_object_list(asked, 0)
            name, arguments = asked[0]
            if name == _DONE:
                return
            self._errands[name](*arguments)
