"""The training loop. It reads ``["loss"]`` of one root module, and knows no objective, loss or model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from mmrep.config import dump
from mmrep.data.batch import Batch
from mmrep.data.sample import Quarantined
from mmrep.schedules import Clock
from mmrep.training import rng
from mmrep.training.cached import forward_backward
from mmrep.training.contracts import Callback, Loader, TrainConfig
from mmrep.training.engine import accelerator, prepare, share_buffers
from mmrep.training.errors import Halt
from mmrep.training.guard import Interrupts, Statistics, Watch
from mmrep.training.metrics import MetricsLog, temperatures
from mmrep.training.optim import OptimConfig, build_optimizer, gradient_norm, rest, set_lr
from mmrep.training.progress import Progress
from mmrep.training.run_state import Counters, RunState

__all__ = ["Callback", "Loader", "TrainConfig", "Trainer"]


class Trainer:
    """Trains one root module.

    Args:
        root: ``root(batch) -> {"loss": scalar, named parts}``, with a method ``after_optimizer_step()``. It is given
            the ``clock`` of each step. If it has ``before_save()``, that is called on every process before a checkpoint
            is written; if it has ``outside()``, its digests are written, and a run resumed with others is refused.
        loader: batches of this process.
        train: length, precision, intervals.
        optim: optimizer and schedule.
        folder: gets ``metrics.jsonl`` and ``checkpoints/``. None = nothing is written.
        callbacks: called in this order.
        on_quarantined: called with a batch's unreadable samples, if any, and the number of samples that this process
            has read so far in the run, those included; stops the run by raising.

    Attributes:
        counters: how far the run is.
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
        self.counters = Counters()
        self.total_steps = train.steps
        if train.epochs is not None and loader.steps_per_epoch is not None:
            self.total_steps = math.ceil(train.epochs * loader.steps_per_epoch)
        optim.schedule.value(optim.lr, 0, self.total_steps)  # refuse here what it would refuse in the first step
        if self.total_steps is None and any(group.begin for group in optim.groups):
            raise ValueError(
                "optim.groups: `begin` needs the length of the run, which a stream has not: give train.steps"
            )
        if train.channels_last:
            cast(Any, root).to(memory_format=torch.channels_last)
        root.to(self.device)
        if train.checkpointing:
            cast(Any, root).checkpoint_encoders()
        if train.compile:
            cast(Any, root).compile_encoders()
        self._parallel, self._prepared = prepare(self.accelerator, root, build_optimizer(root, optim))
        self.optimizer: torch.optim.Optimizer = self._prepared.optimizer
        if folder is not None and self.is_main:
            folder.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsLog(folder and folder / "metrics.jsonl", main=self.is_main)
        self.last_checkpoint: Path | None = None
        self._watch = Watch()
        self._statistics = Statistics(root)
        # Looking at a number waits for the device: free on a CPU, dear on a GPU.
        fused = all(group.get("fused") for group in self.optimizer.param_groups)  # others cannot skip a step unseen
        self._look_every = 1 if self.device.type == "cpu" or not fused else train.log_every
        self._clock = self._window = 0.0
        self._stop = False
        self._state = RunState(
            self.checkpoints, self.accelerator, root, self.optimizer, loader, self.metrics,
            settings={"train": dump(train), "optim": dump(optim)}, keep=train.keep,
            before_save=getattr(root, "before_save", lambda: None), outside=getattr(root, "outside", dict),
        )  # fmt: skip

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.counters.step

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
            ``steps, epochs, seconds, skipped, metrics`` (the last line), ``checkpoint, precision, processes, device``.

        Raises:
            NonFiniteLoss: a loss or a gradient was not finite, once more often than ``max_skipped`` allows.
            CheckpointError: a checkpoint could not be written.
            ResumeError: there is a run in the folder and ``resume`` is False, or it does not fit this recipe.
            Halt: a callback has ended the run; a checkpoint was saved before.
            KeyboardInterrupt: Ctrl-C; a checkpoint was saved before. SIGTERM does the same with SystemExit(143).
        """
        self._begin(resume)
        self._evaluate_before()
        progress = Progress(self.total_steps, done=self.step, main=self.is_main)
        batches = self._batches()
        self.root.train()
        try:
            with Interrupts() as interrupts:
                for batch in batches:
                    self._train_step(batch, interrupted=interrupts.requested)
                    progress.advance()
                    self._tell()
                    if self._after_step(final=self.step == self.total_steps):
                        interrupts.leave()
                    if self.counters.done.get("log") == self.step:
                        progress.show(self.metrics.last)
                self._after_step(final=True)
                if interrupts.requested:
                    interrupts.leave()
        finally:
            batches.close()
            self.loader.close()
            progress.close()
            self.root.eval()
        summary = {
            "steps": self.step, "epochs": self.epoch, "seconds": self.counters.seconds, "metrics": self.metrics.last,
            "checkpoint": self.last_checkpoint and str(self.last_checkpoint), "device": str(self.device),
            "precision": self.accelerator.mixed_precision, "processes": self.accelerator.num_processes,
            "skipped": self.counters.skipped,
        }  # fmt: skip
        for callback in self.callbacks:
            callback.on_fit_end(self, summary)
        return summary

    def _train_step(self, batch: Batch, *, interrupted: bool) -> None:
        self.counters.samples += len(batch) + len(batch.quarantined)
        if batch.quarantined and self.on_quarantined is not None:
            self.on_quarantined(batch.quarantined, self.counters.samples)
        set_lr(self.optimizer, self._lr(self.step))
        cast(Any, self.root).clock = clock = Clock(self.step, self.total_steps)
        if self._look_every == 1:
            self._statistics.keep()
        report = forward_backward(self._parallel, self.accelerator, batch.to(self.device))
        loss = report["loss"]
        self.accelerator.unscale_gradients()
        rest(self.optimizer, clock.progress)
        norm = gradient_norm(self._parallel.parameters())
        scaled = self.accelerator.scaler is not None  # fp16: overflowing gradients are the scaler's daily bread
        finite = loss.isfinite() if scaled else loss.isfinite() & norm.isfinite()
        signals = torch.stack([(~finite).float().reshape(()), torch.full_like(norm, interrupted).float().reshape(())])
        signals = cast(Tensor, self.accelerator.reduce(signals, "sum"))
        self._watch.add(self.step + 1, batch.ids, report, signals)
        if self._look_every > 1 and not scaled:
            cast(Any, self.optimizer).found_inf = signals[0].clamp(max=1)  # fused kernels skip the step at 1
        if self._look_every == 1 and self._look():
            self._statistics.put_back()
            self.metrics.add({}, len(batch))
        else:
            self._move(norm)
            self.metrics.add({**report, "grad_norm": norm}, len(batch))
        self._prepared.zero_grad()
        self.counters.step += 1

    def _move(self, norm: Tensor) -> None:
        """The optimizer's step, and what follows it."""
        if self.optim.clip_norm is not None:  # after the look, which wants to see who spoiled the gradient
            nn.utils.clip_grads_with_norm_(self._parallel.parameters(), self.optim.clip_norm, norm)
        self._prepared.step()
        if not self._prepared.step_was_skipped:
            cast(Any, self.root).after_optimizer_step()

    def _after_step(self, *, final: bool) -> bool:
        """Do what is due, each thing once a step. Returns whether some process was asked to stop."""
        self.counters.seconds = time.perf_counter() - self._clock
        intervals = {
            "look": self._look_every,
            "log": self.train.log_every,
            "eval": self.train.eval_every,
            "save": self.train.save_every,
        }
        due = {name for name, every in intervals.items() if final or (every is not None and self.step % every == 0)}
        due -= {name for name, step in self.counters.done.items() if step == self.step}
        self.counters.done.update(dict.fromkeys(due, self.step))  # before saving: a checkpoint tells what was done
        if due:
            self._look()  # nothing is logged or saved of a step that has not been looked at
        if "log" in due:
            self._log()
        paused = time.perf_counter()
        if "eval" in due and self.train.eval_every is not None:
            try:
                self._evaluate()
            except Halt as halt:
                self._save(last=True)
                halt.checkpoint = self.last_checkpoint
                raise
        if "save" in due or self._stop:
            self._save(last=final or self._stop)
        self._window += time.perf_counter() - paused
        return self._stop

    def _tell(self) -> None:
        if listening := [c for c in self.callbacks if type(c).on_step_end is not Callback.on_step_end]:
            with rng.isolated():
                for callback in listening:
                    callback.on_step_end(self, self.step)

    def _look(self) -> bool:
        """Whether a step since the last look was not finite, and had no effect."""
        allowed = self.train.max_skipped - self.counters.skipped
        stop, skipped = self._watch.look(self.root, self.last_checkpoint, allowed=allowed)
        self._stop |= stop
        self.counters.skipped += skipped
        return skipped > 0

    def _log(self) -> None:
        now = {"epoch": self.epoch, "lr": self._lr(self.step - 1), "seconds": self.counters.seconds}
        if self.counters.skipped:
            now["skipped"] = self.counters.skipped
        self.metrics.flush(self.step, {**now, **temperatures(self.root)}, time.perf_counter() - self._window)
        self._window = time.perf_counter()

    def _evaluate_before(self) -> None:
        if listening := [c for c in self.callbacks if type(c).on_fit_begin is not Callback.on_fit_begin]:
            self.root.eval()
            share_buffers(self.root)
            with rng.isolated():
                for callback in listening:
                    callback.on_fit_begin(self)

    def _evaluate(self) -> None:
        self.root.eval()
        share_buffers(self.root)
        with rng.isolated():
            for callback in self.callbacks:
                found = callback.on_eval(self, self.step)
                if found:
                    self.metrics.write({"step": self.step, "epoch": self.epoch, **found})
        self.root.train()

    def _lr(self, step: int) -> float:
        return self.optim.schedule.value(self.optim.lr, step, self.total_steps)

    def _batches(self) -> Generator[Batch, None, None]:
        """Batches, epoch after epoch, until the run's length is reached. All processes get equally many."""
        empty = 0
        while self._more():
            before = self.step
            with rng.isolated():  # a loader draws seeds for its workers when it starts, after a resume once more
                iterator = iter(self.loader)
                batch = self._next(iterator)
            while batch is not None:
                yield batch
                if not self._more():
                    return
                batch = self._next(iterator)
            empty = empty + 1 if self.step == before else 0
            if empty > 1:  # one is fine: a run resumed at the end of an epoch
                raise ValueError("the training data gives no batch: is the split empty, or smaller than one batch?")

    def _more(self) -> bool:
        if self.total_steps is not None:
            return self.step < self.total_steps
        assert self.train.epochs is not None
        return self.loader.epoch < self.train.epochs

    def _next(self, iterator: Iterator[Batch]) -> Batch | None:
        batch = next(iterator, None)
        if self.loader.steps_per_epoch is None and self.accelerator.num_processes > 1:
            here = torch.tensor([float(batch is not None)], device=self.device)
            if cast(Tensor, self.accelerator.reduce(here, "sum")).item() < self.accelerator.num_processes:
                if batch is not None:  # streams end unevenly: the epoch ends for all when it ends for one
                    self.loader.end_epoch()
                return None
        return batch

    def _save(self, *, last: bool) -> None:
        path = self._state.save(self.counters, last=last)
        if path is None:
            return
        self.last_checkpoint = path
        with rng.isolated():
            for callback in self.callbacks:
                callback.on_save(self, path)

    def _begin(self, resume: bool) -> None:
        """Start anew, or go on from the newest whole checkpoint."""
        set_seed(self.train.seed, device_specific=True)
        self._stop = False
        path = self._state.find(resume)
        if path is not None:
            self.counters = self._state.load(path)
            self.last_checkpoint = path
        self.metrics.rewind(self.step if path is not None else -1)
        self._clock = time.perf_counter() - self.counters.seconds
        self._window = time.perf_counter()
