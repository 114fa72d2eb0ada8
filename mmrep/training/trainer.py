"""The training loop. It reads ``["loss"]`` of one root module, and knows no objective, loss or model."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn

from mmrep.config import dump
from mmrep.data.batch import Batch
from mmrep.data.sample import Quarantined
from mmrep.training import checkpoint, rng
from mmrep.training.checkpoint import Packet
from mmrep.training.contracts import Callback, Loader, TrainConfig
from mmrep.training.engine import accelerator
from mmrep.training.errors import CheckpointError, ResumeError
from mmrep.training.guard import Interrupts, Watch
from mmrep.training.metrics import MetricsLog, temperatures
from mmrep.training.optim import OptimConfig, build_optimizer, set_lr
from mmrep.training.progress import Progress
from mmrep.training.state import load_module, load_optimizer, module_packet, optimizer_packet

__all__ = ["Callback", "Loader", "TrainConfig", "Trainer"]

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one root module, on one process or on many.

    Args:
        root: ``root(batch) -> {"loss": scalar, named parts}``, with a method ``after_optimizer_step()``.
        loader: batches of this process.
        train: length, precision, intervals.
        optim: optimizer and schedule.
        folder: of the run; gets ``metrics.jsonl`` and ``checkpoints/``. None = nothing is written.
        callbacks: called in this order.
        on_quarantined: called with a batch's unreadable samples, if any, and the number of samples that this process
            has asked for so far, those included; stops the run by raising.

    Attributes:
        step: optimizer steps taken.
        total_steps: of the run; None if it is a stream, measured in epochs.
        optimizer: the torch optimizer.
        accelerator: the engine.
        last_checkpoint: the newest whole checkpoint that this run wrote or resumed from.
    """

    def __init__(
        self,
        root: nn.Module,
        loader: Loader,
        *,
        train: TrainConfig,
        optim: OptimConfig,
        folder: Path | None = None,
        callbacks: Sequence[Callback] = (),
        on_quarantined: Callable[[Sequence[Quarantined], int], None] | None = None,
    ) -> None:
        self.root = root
        self.loader = loader
        self.train = train
        self.optim = optim
        self.folder = folder
        self.callbacks = callbacks
        self.on_quarantined = on_quarantined
        self.accelerator = accelerator(train.precision, deterministic=train.deterministic)
        self.step = 0
        self.total_steps = train.steps
        if train.epochs is not None and loader.steps_per_epoch is not None:
            self.total_steps = math.ceil(train.epochs * loader.steps_per_epoch)
        optim.schedule.value(optim.lr, 0, self.total_steps)  # refuse here what it would refuse in the first step
        if train.channels_last:
            cast(Any, root).to(memory_format=torch.channels_last)
        root.to(self.device)
        self._parallel, self._prepared = self.accelerator.prepare(root, build_optimizer(root, optim))
        self.optimizer: torch.optim.Optimizer = self._prepared.optimizer
        self.metrics = MetricsLog(folder and folder / "metrics.jsonl", main=self.is_main)
        self.last_checkpoint: Path | None = None
        self._watch = Watch()
        # Looking at a number waits for the device: free on a CPU, dear on a GPU.
        self._look_every = 1 if self.device.type == "cpu" else train.log_every
        self._done: dict[str, int] = {}
        self._seen = 0
        self._seconds = 0.0
        self._clock = self._window = 0.0

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.accelerator.is_main_process

    @property
    def checkpoints(self) -> Path | None:
        """The folder of checkpoints."""
        return self.folder and self.folder / "checkpoints"

    @property
    def epoch(self) -> float:
        """Passes over the data so far; a fraction where the length of one is known."""
        length = self.loader.steps_per_epoch
        return self.step / length if length else float(self.loader.epoch)

    def fit(self, resume: bool = False) -> dict[str, Any]:
        """Train to the end.

        Args:
            resume: go on from the newest whole checkpoint in the folder; without any, start from the beginning.

        Returns:
            ``steps, epochs, seconds, metrics`` (the last line), ``checkpoint, precision, processes, device``.

        Raises:
            NonFiniteLoss: a loss or a gradient was not finite.
            CheckpointError: a checkpoint could not be written.
            ResumeError: there is a run in the folder and ``resume`` is False, or it does not fit this recipe.
            KeyboardInterrupt: Ctrl-C; a checkpoint was saved before. SIGTERM does the same with SystemExit(143).
        """
        set_seed(self.train.seed, device_specific=True)
        self._begin(resume)
        self._clock = time.perf_counter() - self._seconds
        self._window = time.perf_counter()
        progress = Progress(self.total_steps, done=self.step, main=self.is_main)
        batches = self._batches()
        self.root.train()
        try:
            with Interrupts() as interrupts:
                for batch in batches:
                    self._train_step(batch, interrupted=interrupts.requested)
                    progress.advance()
                    with rng.isolated():
                        for callback in self.callbacks:
                            callback.on_step_end(self, self.step)
                    if self._after_step(final=self.step == self.total_steps):
                        interrupts.leave()
                    if self._done.get("log") == self.step:
                        progress.show(self.metrics.last)
                self._after_step(final=True)
                if interrupts.requested:
                    interrupts.leave()
        finally:
            batches.close()
            progress.close()
            self.root.eval()
        summary = {
            "steps": self.step, "epochs": self.epoch, "seconds": self._seconds, "metrics": self.metrics.last,
            "checkpoint": self.last_checkpoint and str(self.last_checkpoint), "device": str(self.device),
            "precision": self.accelerator.mixed_precision, "processes": self.accelerator.num_processes,
        }  # fmt: skip
        for callback in self.callbacks:
            callback.on_fit_end(self, summary)
        return summary

    def _train_step(self, batch: Batch, *, interrupted: bool) -> None:
        self._seen += len(batch) + len(batch.quarantined)
        if batch.quarantined and self.on_quarantined is not None:
            self.on_quarantined(batch.quarantined, self._seen)
        set_lr(self.optimizer, self._lr(self.step))
        report: dict[str, Tensor] = self._parallel(batch.to(self.device))
        loss = report["loss"]
        self.accelerator.backward(loss)
        bound = math.inf if self.optim.clip_norm is None else self.optim.clip_norm
        norm = cast(Tensor, self.accelerator.clip_grad_norm_(self._parallel.parameters(), bound))
        report = {name: value.detach() for name, value in report.items()}
        scaled = self.accelerator.scaler is not None  # fp16: overflowing gradients are the scaler's daily bread
        finite = loss.isfinite() if scaled else loss.isfinite() & norm.isfinite()
        signals = torch.stack([(~finite).float().reshape(()), torch.full_like(norm, interrupted).float().reshape(())])
        signals = cast(Tensor, self.accelerator.reduce(signals, "sum"))
        self._watch.add(self.step + 1, batch.ids, report, signals)
        if self._look_every == 1:
            self._look()
        elif not scaled:
            cast(Any, self.optimizer).found_inf = signals[0].clone()  # the fused kernels then skip this step
        self._prepared.step()
        if not self._prepared.step_was_skipped:
            cast(Any, self.root).after_optimizer_step()
        self._prepared.zero_grad()
        self.metrics.add({**report, "grad_norm": norm}, len(batch))
        self.step += 1

    def _after_step(self, *, final: bool) -> bool:
        """Do what is due, each thing once a step. Returns whether some process was asked to stop."""
        self._seconds = time.perf_counter() - self._clock
        intervals = {
            "look": self._look_every,
            "log": self.train.log_every,
            "eval": self.train.eval_every,
            "save": self.train.save_every,
        }
        due = {name for name, every in intervals.items() if final or (every is not None and self.step % every == 0)}
        due -= {name for name, step in self._done.items() if step == self.step}
        if due:
            self._look()  # nothing is logged or saved of a step that has not been looked at
        if "log" in due:
            self._log()
        paused = time.perf_counter()
        if "eval" in due and self.train.eval_every is not None:
            self._evaluate()
        if "save" in due or self._stop:
            self._save()
        self._window += time.perf_counter() - paused
        self._done.update(dict.fromkeys(due, self.step))
        return self._stop

    def _look(self) -> None:
        self._stop |= self._watch.look(self.root, self.last_checkpoint)

    def _log(self) -> None:
        now = {"epoch": self.epoch, "lr": self._lr(self.step - 1), "seconds": self._seconds, **temperatures(self.root)}
        self.metrics.flush(self.step, now, time.perf_counter() - self._window)
        self._window = time.perf_counter()

    def _evaluate(self) -> None:
        self.root.eval()
        with rng.isolated():
            for callback in self.callbacks:
                found = callback.on_eval(self, self.step)
                if found:
                    self.metrics.write({"step": self.step, "epoch": self.epoch, **found})
        self.root.train()

    def _lr(self, step: int) -> float:
        return self.optim.schedule.value(self.optim.lr, step, self.total_steps)

    def _batches(self) -> Iterator[Batch]:
        """Batches, epoch after epoch, until the run's length is reached. All processes get equally many."""
        empty = 0
        while self._more():
            before = self.step
            iterator = iter(self.loader)
            while (batch := self._next(iterator)) is not None:
                yield batch
                if not self._more():
                    return
            empty = empty + 1 if self.step == before else 0
            if empty > 1:  # one is fine: a run resumed at the end of an epoch
                raise ValueError("the training data gives no batch: is the split empty, or smaller than one batch?")

    def _more(self) -> bool:
        if self.total_steps is not None:
            return self.step < self.total_steps
        assert self.train.epochs is not None
        return self.loader.epoch < self.train.epochs

    def _next(self, iterator: Iterator[Batch]) -> Batch | None:
        with rng.isolated():  # a loader draws seeds for its workers when it starts; that must not depend on a resume
            batch = next(iterator, None)
        if self.loader.steps_per_epoch is None and self.accelerator.num_processes > 1:
            here = torch.tensor([float(batch is not None)], device=self.device)
            if cast(Tensor, self.accelerator.reduce(here, "sum")).item() < self.accelerator.num_processes:
                for _ in iterator:  # streams end unevenly: the epoch ends for all when it ends for one
                    pass
                return None
        return batch

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        window, generators = self.metrics.state(), rng.capture()
        data = {"rng": generators.data, "metrics": window.data, "loader": self.loader.state_dict(), "seen": self._seen}
        tensors = {f"rng/{name}": value for name, value in generators.tensors.items()}
        tensors.update({f"metrics/{name}": value for name, value in window.tensors.items()})
        ranks = gather_object([Packet(tensors, data).to_bytes()])
        packets: dict[str, Packet | bytes] = {f"rank-{rank:05d}": content for rank, content in enumerate(ranks)}
        packets["module"] = module_packet(self.root)
        packets["optimizer"] = optimizer_packet(self.optimizer, self.root)
        scaler = self.accelerator.scaler
        state = {
            "seconds": self._seconds, "processes": self.accelerator.num_processes, "scaler": scaler and scaler.state_dict(),
            "train": dump(self.train), "optim": dump(self.optim),
        }  # fmt: skip
        failure = None
        if self.is_main:
            try:
                checkpoint.save(self.checkpoints, self.step, packets, state, keep=self.train.keep)
            except CheckpointError as error:
                failure = error
        self._agree(failure)
        self.last_checkpoint = checkpoint.path_of(self.checkpoints, self.step)
        with rng.isolated():
            for callback in self.callbacks:
                callback.on_save(self, self.last_checkpoint)

    def _begin(self, resume: bool) -> None:
        """Start anew, or load the newest whole checkpoint."""
        self._stop = False
        found: Path | None = None
        failure = None
        if self.is_main and self.checkpoints is not None and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if resume:
                found = checkpoint.latest(self.checkpoints)
            elif checkpoint.steps(self.checkpoints):
                failure = ResumeError(f"{self.folder} already holds a run up to step "
                                      f"{checkpoint.steps(self.checkpoints)[-1]}: resume it, or choose another folder")  # fmt: skip
        self._agree(failure)
        found = broadcast_object_list([found])[0]
        if found is not None:
            self._load(found)
        elif resume:
            logger.warning("nothing to resume in %s: starting from the beginning", self.folder)
        self.metrics.rewind(self.step if found is not None else -1)

    def _load(self, path: Path) -> None:
        state = checkpoint.load_state(path)
        if state["processes"] != self.accelerator.num_processes:
            raise ResumeError(f"{path} was written by {state['processes']} processes and this run has "
                              f"{self.accelerator.num_processes}: each process has random numbers and a place in the "
                              "data of its own, so start as many as before")  # fmt: skip
        for name, now in (("train", dump(self.train)), ("optim", dump(self.optim))):
            for key in now:
                if state[name].get(key) != json.loads(json.dumps(now[key])):
                    logger.warning("resuming with another %s.%s: %s, was %s", name, key, now[key], state[name].get(key))
        load_module(self.root, checkpoint.load_packet(path, "module"))
        load_optimizer(self.optimizer, self.root, checkpoint.load_packet(path, "optimizer"))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        own = checkpoint.load_packet(path, f"rank-{self.accelerator.process_index:05d}")
        self.loader.load_state_dict(own.data["loader"])
        self.metrics.load_state(own.part("metrics"), self.device)
        rng.restore(own.part("rng"))
        self.step, self._seen, self._seconds = state["step"], own.data["seen"], state["seconds"]
        self._done = dict.fromkeys(("look", "log", "eval", "save"), self.step)
        self.last_checkpoint = path

    def _agree(self, failure: Exception | None) -> None:
        """Raise on every process what went wrong on the first one."""
        message = broadcast_object_list([failure and str(failure)])[0]
        if failure is not None:
            raise failure
        if message is not None:
            raise CheckpointError(message)
