"""Everything that a run must find again to go on as if it had never stopped, in one checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn

from mmrep.training import checkpoint, rng
from mmrep.training.checkpoint import Packet
from mmrep.training.contracts import Loader
from mmrep.training.errors import CheckpointError, ResumeError
from mmrep.training.metrics import MetricsLog
from mmrep.training.state import load_module, load_optimizer, module_packet, optimizer_packet

logger = logging.getLogger(__name__)

_PATIENCE = 3  # failed saves in a row


@dataclass
class Counters:
    """How far a run is.

    step: optimizer steps. samples: read by this process. seconds: spent, over all resumes. skipped: steps that moved
    nothing since they were not finite. done: the step at which each thing that is due now and then was last done.
    """

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    skipped: int = 0
    done: dict[str, int] = field(default_factory=dict)


@dataclass
class RunState:
    """The parts of a run that have a state. Every process holds one; all must call its methods together.

    Weights and optimizer are written once; the random numbers, the place in the data and the open metrics window of
    each process are written by rank.

    Attributes:
        folder: of checkpoints; None = nothing is ever written.
        engine: the processes.
        root: the bare module.
        optimizer: its torch optimizer.
        loader: batches of this process.
        metrics: its log.
        settings: config by section, to tell what a resume changed; ``train.seed`` is read.
        keep: how many checkpoints stay.
        before_save: writes, on every process, what the root keeps beside its state and a resumed run must find.
        outside: digests by name of what the root reads and no checkpoint holds (the teachers of a distillation).
        failed: saves in a row that failed.
    """

    folder: Path | None
    engine: Accelerator
    root: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    metrics: MetricsLog
    settings: Mapping[str, Mapping[str, Any]]
    keep: int
    before_save: Callable[[], None] = lambda: None
    outside: Callable[[], Mapping[str, str]] = dict
    failed: int = field(default=0, init=False)

    def save(self, counters: Counters, *, last: bool = True) -> Path | None:
        """Write the checkpoint of this step.

        Stopping a run whose disk is full would lose the steps since the last checkpoint for certain. So where another
        save will follow, the run goes on, says what happened, and stops only when a few saves in a row have failed.

        Args:
            counters: of this process.
            last: the run stops after it.

        Returns:
            The checkpoint; None if nothing is ever written, or if this save failed and the run goes on.

        Raises:
            CheckpointError: on every process, if the first one could not write it, and the run must not go on.
        """
        if self.folder is None:
            return None
        packets: dict[str, Packet | bytes] = {
            f"rank-{rank:05d}": content for rank, content in enumerate(gather_object([self._own(counters).to_bytes()]))
        }
        packets["module"] = module_packet(self.root)
        packets["optimizer"] = optimizer_packet(self.optimizer, self.root)
        scaler = self.engine.scaler
        state = {
            "processes": self.engine.num_processes,
            "scaler": None if scaler is None else scaler.state_dict(),
            "settings": self.settings,
            "outside": dict(self.outside()),
        }
        try:
            _agree(self._tried(self.before_save, counters.step))
            _agree(self._tried(lambda: self._write(counters.step, packets, state), counters.step))
        except CheckpointError as error:
            self.failed += 1
            if last or self.failed == _PATIENCE:
                raise CheckpointError(f"{error}; make room and go on with --resume") from error
            if self.engine.is_main_process:
                logger.error("%s; the run goes on and tries again at the next save", error)
            return None
        self.failed = 0
        return checkpoint.path_of(self.folder, counters.step)

    def _write(self, step: int, packets: Mapping[str, Packet | bytes], state: Mapping[str, Any]) -> None:
        if self.engine.is_main_process:
            self.metrics.sync()
            checkpoint.save(cast(Path, self.folder), step, packets, state, keep=self.keep)

    def _tried(self, write: Callable[[], None], step: int) -> CheckpointError | None:
        try:
            write()
        except CheckpointError as error:
            return error
        except (OSError, SafetensorError) as error:
            return checkpoint.failure(cast(Path, self.folder), step, error)
        return None

    def find(self, resume: bool) -> Path | None:
        """The newest whole checkpoint, or None to start anew.

        Raises:
            ResumeError: there are checkpoints and ``resume`` is False.
        """
        found: Path | None = None
        failure = None
        if self.engine.is_main_process and self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                steps = checkpoint.steps(self.folder)
                if resume:
                    found = checkpoint.latest(self.folder)
                elif steps:
                    failure = ResumeError(f"{self.folder} already holds a run up to step {steps[-1]}: "
                                          "resume it (--resume), or choose another folder")  # fmt: skip
            except OSError as error:
                failure = error
        _agree(failure)
        found = broadcast_object_list([found])[0]
        if resume and found is None:
            logger.warning("nothing to resume in %s: starting from the beginning", self.folder)
        return found

    def load(self, path: Path) -> Counters:
        """Set every part to what the checkpoint holds.

        With another number of processes than it was written by, the global order of samples goes on. What each process
        had of its own is made anew: the open metrics window and the count of samples are divided, and the random
        numbers start from seed, step and rank.

        Raises:
            ResumeError: on every process, if it was written for other weights or other data or beside other teachers,
                or holds a stream and was written by another number of processes.
        """
        failure = counters = None
        try:
            counters = self._load(path, checkpoint.load_state(path))
        except (ResumeError, OSError) as error:
            failure = error
        _agree(failure)
        assert counters is not None
        return counters

    def _load(self, path: Path, state: Mapping[str, Any]) -> Counters:
        before, now, rank = state["processes"], self.engine.num_processes, self.engine.process_index
        if before != now and self.loader.steps_per_epoch is None:
            raise ResumeError(
                f"{path} was written by {before} processes and this run has {now}: each reads a part of the stream of "
                f"its own, and other parts would hold some samples twice and others never; start {before} processes"
            )
        self._compare_outside(path, state.get("outside", {}))
        self._tell_changes(path, state)
        load_module(self.root, checkpoint.load_packet(path, "module"))
        load_optimizer(self.optimizer, self.root, checkpoint.load_packet(path, "optimizer"))
        if self.engine.scaler is not None and state["scaler"] is not None:
            self.engine.scaler.load_state_dict(state["scaler"])
        ranks = range(before) if before != now else [rank]
        packets = [checkpoint.load_packet(path, f"rank-{r:05d}") for r in ranks]
        try:
            self.loader.load_state_dict(packets[0].data["loader"])  # the same on every process
        except ValueError as error:
            raise ResumeError(f"{path}: {error}") from error
        if before == now:
            self.metrics.load_state(packets[0].part("metrics"), self.engine.device)
            rng.restore(packets[0].part("rng"))
            return Counters(**packets[0].data["counters"])
        old = [Counters(**packet.data["counters"]) for packet in packets]
        windows = [packet.part("metrics") for packet in packets]
        open_samples = _share(sum(window.data["samples"] for window in windows), rank, now)
        self.metrics.load_merged(windows, open_samples, self.engine.device)
        rng.reseed(self.settings["train"]["seed"], old[0].step, rank)
        return replace(old[0], samples=_share(sum(c.samples for c in old), rank, now))

    def _compare_outside(self, path: Path, before: Mapping[str, str]) -> None:
        if not before:
            return
        now = self.outside()
        if changed := [name for name, digest in before.items() if now.get(name) != digest]:
            raise ResumeError(
                f"{path} was written beside another {' and another '.join(map(repr, changed))}: its weights or its "
                "config have changed since. Put the model back that the run began with, or begin a new run"
            )

    def _tell_changes(self, path: Path, state: Mapping[str, Any]) -> None:
        if not self.engine.is_main_process:
            return
        if state["processes"] != self.engine.num_processes:
            logger.warning(
                "%s was written by %d processes and this run has %d: samples go on in the same global order, and the "
                "run stays deterministic; it is not bitwise what it would have been, since sums are added in another "
                "order and the random numbers of each process (dropout masks) start anew from seed, step and rank",
                path, state["processes"], self.engine.num_processes,
            )  # fmt: skip
        for name, section in self.settings.items():
            before = state["settings"].get(name, {})
            for key, value in json.loads(json.dumps(section)).items():
                if before.get(key) != value:
                    logger.warning("resuming with another %s.%s: %s, was %s", name, key, value, before.get(key))

    def _own(self, counters: Counters) -> Packet:
        """What differs between processes."""
        parts = {"rng": rng.capture(), "metrics": self.metrics.state()}
        tensors = {f"{name}/{key}": value for name, part in parts.items() for key, value in part.tensors.items()}
        data = {name: part.data for name, part in parts.items()}
        return Packet(tensors, {**data, "loader": self.loader.state_dict(), "counters": asdict(counters)})


def _share(n: int, rank: int, processes: int) -> int:
    """This process's part of ``n`` things; the parts add up to ``n``."""
    return (rank + 1) * n // processes - rank * n // processes


def _agree(failure: Exception | None) -> None:
    """Raise on every process what went wrong on any of them."""
    found = gather_object([None if failure is None else (type(failure).__name__, str(failure))])
    kind, message = next((one for one in found if one is not None), (None, None))
    if message is None:
        return
    if isinstance(failure, (CheckpointError, ResumeError)):
        raise failure
    raise (CheckpointError if kind == CheckpointError.__name__ else ResumeError)(message) from failure
