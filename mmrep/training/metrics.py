"""``metrics.jsonl``: one line every few steps, without stopping the device in between."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from mmrep.training.checkpoint import Packet

logger = logging.getLogger(__name__)


class MetricsLog:
    """Means over the steps since the last line, summed on the device and read once a line.

    All processes add; the first one writes. The sums are part of the state, so that a run resumed between two lines
    writes the same lines as one that was never stopped.

    Args:
        path: the file, appended to; None = nothing is written.
        main: whether this process writes.

    Attributes:
        last: the last line that `flush` made.
    """

    def __init__(self, path: Path | None, *, main: bool = True) -> None:
        self.path = path if main else None
        self.last: dict[str, Any] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        self._samples = 0
        self._unwritten = b""

    def add(self, values: Mapping[str, Tensor], samples: int) -> None:
        """Add one step's scalars (0-D or one element, any device) and the number of samples it saw here."""
        self._samples += samples
        for name, value in values.items():
            value = value.detach().reshape(()).float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def flush(self, step: int, now: Mapping[str, Any], elapsed: float) -> dict[str, Any]:
        """Write the line of ``step`` and start the next window. All processes must call it.

        Args:
            step: steps taken.
            now: values of this moment (epoch, learning rate), of the first process.
            elapsed: seconds since the last line, for the speed.

        Returns:
            The line: ``step``, ``now``, the means over steps and processes, ``samples`` of all processes since the
            last line, and ``samples_per_second``.
        """
        names = list(self._sums)
        sums = torch.stack([self._sums[n] for n in names]).tolist() if names else []
        parts = gather_object([{"samples": self._samples, "sums": dict(zip(names, sums, strict=True)),
                                "counts": self._counts}])  # fmt: skip
        means: dict[str, float] = {}
        for name in dict.fromkeys(n for part in parts for n in part["sums"]):
            count = sum(part["counts"].get(name, 0) for part in parts)
            means[name] = sum(part["sums"].get(name, 0.0) for part in parts) / count
        self._sums, self._counts, self._samples = {}, {}, 0
        samples = sum(part["samples"] for part in parts)
        speed = samples / max(elapsed, 1e-9)
        self.last = {"step": step, **now, **means, "samples": samples, "samples_per_second": speed}
        self.write(self.last)
        return self.last

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line as it is, such as an evaluation's; it must have a ``step``.

        A line that the disk has no room for is kept, and written before the next one or by `sync`.
        """
        if self.path is None:
            return
        waited = bool(self._unwritten)
        self._unwritten += json.dumps(_finite(line)).encode() + b"\n"
        try:
            self._append()
        except OSError as error:
            if not waited:
                logger.error("could not write to %s: %s; its lines wait in memory", self.path, error.strerror)

    def sync(self) -> None:
        """Bring every line to the disk, before a checkpoint says that they are there.

        Raises:
            OSError: it has no room for them.
        """
        if self.path is not None and (self._unwritten or self.path.exists()):
            self._append(flush=True)

    def _append(self, *, flush: bool = False) -> None:
        assert self.path is not None
        with self.path.open("ab", buffering=0) as file:
            while self._unwritten:  # a full disk takes a part, then refuses
                self._unwritten = self._unwritten[file.write(self._unwritten) :]
            if flush:
                os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, and one that a kill left incomplete. Takes no room on the disk."""
        self._unwritten = b""
        if self.path is None or not self.path.exists():
            return
        kept = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or _step_of(line) > step:
                break
            kept += len(line)
        os.truncate(self.path, kept)

    def state(self) -> Packet:
        """The open window of this process."""
        return Packet(self._sums, {"counts": self._counts, "samples": self._samples})

    def load_state(self, packet: Packet, device: torch.device) -> None:
        """Go on in the window that `state` saw."""
        self._sums = {name: value.to(device) for name, value in packet.tensors.items()}
        self._counts, self._samples = dict(packet.data["counts"]), packet.data["samples"]

    def load_merged(self, packets: Sequence[Packet], samples: int, device: torch.device) -> None:
        """Go on in the window that other processes had open, whose number is not that of now.

        Each process of now takes the mean of theirs, so that the steps before the change weigh as much in the next
        line as those after it.

        Args:
            packets: what `state` gave on each of them.
            samples: this process's share of the samples that they had counted together.
            device: where values will be added.
        """
        names = dict.fromkeys(name for packet in packets for name in packet.tensors)
        counts = {n: sum(packet.data["counts"].get(n, 0) for packet in packets) / len(packets) for n in names}
        found = {n: torch.stack([p.tensors[n] for p in packets if n in p.tensors]).double().sum() for n in names}
        self._sums = {n: (total / len(packets)).float().to(device) for n, total in found.items()}
        self._counts, self._samples = counts, samples


def temperatures(module: nn.Module) -> dict[str, float]:
    """``exp(log_scale)`` of every part that has a parameter ``log_scale``, as ``scale/<name of the part>``."""
    found: dict[str, float] = {}
    for name, part in module.named_modules():
        log_scale = part._parameters.get("log_scale")
        if log_scale is not None:
            full: Any = getattr(log_scale, "full_tensor", None)
            whole = log_scale if full is None else full()
            own = [part for part in name.split(".") if part != "_orig_mod"]  # which torch.compile puts there
            found[f"scale/{own[-1]}"] = whole.detach().float().exp().mean().item()
    return found


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
