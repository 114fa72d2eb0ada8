"""What may end a run before its last step: a loss that is not finite, Ctrl-C, a polite kill."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mmrep.training.errors import NonFiniteLoss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Watched:
    step: int
    ids: Sequence[str]
    report: Mapping[str, Tensor]
    signals: Tensor


class Watch:
    """The steps since the last look. Looking waits for the device, so on a GPU it is done once in many steps.

    Each step leaves two numbers, summed over processes so that all of them decide the same: how many saw something
    that is not finite, and how many were asked to stop.
    """

    def __init__(self) -> None:
        self._steps: list[_Watched] = []

    def add(self, step: int, ids: Sequence[str], report: Mapping[str, Tensor], signals: Tensor) -> None:
        """Remember a step: its parts of the loss (detached) and its ``signals`` [2]: (not finite, asked to stop)."""
        self._steps.append(_Watched(step, ids, report, signals))

    def look(self, module: nn.Module, checkpoint: Path | None, *, allowed: int = 0) -> tuple[bool, int]:
        """Judge the remembered steps and forget them.

        Args:
            module: whose gradients are searched if every part of the loss was finite.
            checkpoint: the last whole checkpoint, for the message.
            allowed: how many steps that were not finite may still be skipped.

        Returns:
            Whether some process was asked to stop, and how many steps were not finite.

        Raises:
            NonFiniteLoss: for the first step that was not finite and is one too many.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return False, 0
        signals = torch.stack([s.signals for s in steps]).tolist()
        skipped = 0
        for seen, (bad, _) in zip(steps, signals, strict=True):
            if not bad:
                continue
            stop = NonFiniteLoss(seen.step, seen.ids, _culprits(seen, module, is_last=seen is steps[-1]), checkpoint)
            if skipped == allowed:
                raise stop
            skipped += 1
            if stop.culprits:  # else another process tells
                logger.warning(
                    "step %d skipped, not finite: %s; batch: %s; %d more may be skipped",
                    seen.step, ", ".join(stop.culprits), ", ".join(stop.ids[:8]), allowed - skipped,
                )  # fmt: skip
        return any(stop for _, stop in signals), skipped


class Statistics:
    """The running statistics of a module's normalisation layers, to be put back when a step is skipped.

    A NaN in the forward pass would stay in them for good, and show only when the model is evaluated.
    """

    def __init__(self, module: nn.Module) -> None:
        layers = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
        self._layers = [layer for layer in layers if layer.track_running_stats]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Remember them, before the forward pass."""
        live = self._live()
        if len(self._kept) != len(live) or any(a.device != b.device for a, b in zip(self._kept, live, strict=True)):
            self._kept = [value.clone() for value in live]
        elif live:
            torch._foreach_copy_(self._kept, live)

    def put_back(self) -> None:
        """Set them to what `keep` saw."""
        if self._kept:
            torch._foreach_copy_(self._live(), self._kept)

    def _live(self) -> list[Tensor]:
        return [buffer for layer in self._layers for buffer in layer.buffers(recurse=False)]


def _culprits(seen: _Watched, module: nn.Module, *, is_last: bool) -> list[str]:
    names = [n for n, v in seen.report.items() if not bool(torch.isfinite(v).all())]
    parts = [n for n in names if n != "loss"]
    if parts or names:
        return [f"{name} = {float(seen.report[name]):g}" for name in parts or names]
    if not is_last:  # later steps have overwritten the gradients
        return ["the gradient"]
    bad = [n for n, p in module.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    return [f"gradient of {name}" for name in bad[:8]]


class Interrupts:
    """Turns the first SIGINT or SIGTERM into a request that the loop honours between steps.

    The second one acts as it always did. Outside the main thread, where python allows no handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._owner = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def leave(self) -> NoReturn:
        """End the run as the signal would have: KeyboardInterrupt, or exit status 143 for SIGTERM."""
        if self.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked loader worker: Ctrl-C reaches it too, but its parent will end it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        self.signal = number
        self.__exit__()
        name = signal.Signals(number).name
        logger.warning("%s: finishing this step, saving, then stopping; once more stops at once", name)
