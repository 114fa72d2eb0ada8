"""Everything that a run must find again to go on as if it had never stopped, in one checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from mmrep.training import checkpoint, rng
from mmrep.training.checkpoint import Packet
from mmrep.training.contracts import Loader
from mmrep.training.errors import CheckpointError, ResumeError
from mmrep.training.metrics import MetricsLog
from mmrep.training.state import load_module, load_optimizer, module_packet, optimizer_packet

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """How far a run is. step: optimizer steps. samples: read by this process. seconds: spent, over all resumes."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0


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
        settings: config by section, to tell what a resume changed.
        keep: how many checkpoints stay.
    """

    folder: Path | None
    engine: Accelerator
    root: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    metrics: MetricsLog
    settings: Mapping[str, Mapping[str, Any]]
    keep: int

    def save(self, counters: Counters) -> Path | None:
        """Write the checkpoint of this step.

        Raises:
            CheckpointError: on every process, if the first one could not write it.
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
        }
        failure = None
        if self.engine.is_main_process:
            try:
                checkpoint.save(self.folder, counters.step, packets, state, keep=self.keep)
            except CheckpointError as error:
                failure = error
        _agree(failure)
        return checkpoint.path_of(self.folder, counters.step)

    def find(self, resume: bool) -> Path | None:
        """The newest whole checkpoint, or None to start anew.

        Raises:
            ResumeError: there are checkpoints and ``resume`` is False.
        """
        found: Path | None = None
        failure = None
        if self.engine.is_main_process and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            steps = checkpoint.steps(self.folder)
            if resume:
                found = checkpoint.latest(self.folder)
            elif steps:
                failure = ResumeError(f"{self.folder} already holds a run up to step {steps[-1]}: "
                                      "resume it (--resume), or choose another folder")  # fmt: skip
        _agree(failure)
        found = broadcast_object_list([found])[0]
        if resume and found is None:
            logger.warning("nothing to resume in %s: starting from the beginning", self.folder)
        return found

    def load(self, path: Path) -> Counters:
        """Set every part to what the checkpoint holds.

        Raises:
            ResumeError: it was written by another number of processes, or for other weights.
        """
        state = checkpoint.load_state(path)
        if state["processes"] != self.engine.num_processes:
            raise ResumeError(
                f"{path} was written by {state['processes']} processes and this run has {self.engine.num_processes}: "
                "each process has random numbers and a place in the data of its own, so start as many as before"
            )
        for name, section in self.settings.items():
            before = state["settings"].get(name, {})
            for key, value in json.loads(json.dumps(section)).items():
                if before.get(key) != value:
                    logger.warning("resuming with another %s.%s: %s, was %s", name, key, value, before.get(key))
        load_module(self.root, checkpoint.load_packet(path, "module"))
        load_optimizer(self.optimizer, self.root, checkpoint.load_packet(path, "optimizer"))
        if self.engine.scaler is not None and state["scaler"] is not None:
            self.engine.scaler.load_state_dict(state["scaler"])
        own = checkpoint.load_packet(path, f"rank-{self.engine.process_index:05d}")
        self.loader.load_state_dict(own.data["loader"])
        self.metrics.load_state(own.part("metrics"), self.engine.device)
        rng.restore(own.part("rng"))
        return Counters(**own.data["counters"])

    def _own(self, counters: Counters) -> Packet:
        """What differs between processes."""
        parts = {"rng": rng.capture(), "metrics": self.metrics.state()}
        tensors = {f"{name}/{key}": value for name, part in parts.items() for key, value in part.tensors.items()}
        data = {name: part.data for name, part in parts.items()}
        return Packet(tensors, {**data, "loader": self.loader.state_dict(), "counters": asdict(counters)})


def _agree(failure: Exception | None) -> None:
    """Raise on every process what went wrong on the first one."""
    kind, message = broadcast_object_list([type(failure).__name__, failure and str(failure)])
    if failure is not None:
        raise failure
    if message is not None:
        raise (ResumeError if kind == ResumeError.__name__ else CheckpointError)(message)
