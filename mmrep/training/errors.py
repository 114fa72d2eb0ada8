"""What can stop a training run, said to the person who started it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not whole."""


class ResumeError(ValueError):
    """A run cannot be continued from this folder."""


class Halt(RuntimeError):  # noqa: N818: named after what it asks for
    """A callback ends the run at an evaluation. The trainer saves a checkpoint first.

    Attributes:
        checkpoint: that checkpoint, or None if nothing is ever written.
    """

    checkpoint: Path | None = None

    def __str__(self) -> str:
        saved = "" if self.checkpoint is None else f". The work is saved: {self.checkpoint}"
        return super().__str__() + saved


class GuardError(Halt):
    """A figure that was to be kept has fallen."""


class CollapseError(ArithmeticError):
    """A tower gives nearly the same embedding for everything."""


class NonFiniteLoss(ArithmeticError):  # noqa: N818: named after what was seen
    """The loss or the gradient became infinite or NaN; the weights were not moved by that step.

    Attributes:
        step: the step, counted from 1, as in metrics.jsonl.
        ids: sample ids of this process's batch in that step.
        culprits: what was not finite: parts of the loss by name, or parameters with a bad gradient.
        checkpoint: the last whole checkpoint, or None.
    """

    def __init__(self, step: int, ids: Sequence[str], culprits: Sequence[str], checkpoint: Path | None) -> None:
        self.step = step
        self.ids = list(ids)
        self.culprits = list(culprits)
        self.checkpoint = checkpoint
        shown = ", ".join(self.ids[:16]) + (f", … ({len(self.ids)} in all)" if len(self.ids) > 16 else "")
        where = f"last whole checkpoint: {checkpoint}" if checkpoint else "no checkpoint was written before it"
        super().__init__(
            f"step {step}: not finite: {', '.join(self.culprits) or 'on another process'}\n"
            f"  batch: {shown or 'empty'}\n  {where}\n"
            "  The weights were not moved by this step. Usual causes: a learning rate that is too high, a division by "
            "zero or log of zero in a loss, a broken sample, fp16 overflow (use bf16)."
        )


class LostProcess(RuntimeError):  # noqa: N818: named after what happened
    """The processes of a run cannot reach each other any more.

    Attributes:
        where: what this process was doing.
        gone: by rank, who that was and why it is gone; empty if all are alive and wait for each other.
    """

    def __init__(self, where: str, rank: int, gone: Mapping[int, str]) -> None:
        self.where = where
        self.gone = dict(gone)
        lines = [f"  process {number}{why}" for number, why in sorted(self.gone.items())]
        if not lines:
            lines = ["  every process is alive: one of them hangs, or they disagree about what comes next"]
        super().__init__(
            f"{where}: process {rank} can go on no more without the others:\n" + "\n".join(lines) + "\n"
            "  Repair the cause and start all processes again with --resume: the last whole checkpoint stands."
        )
