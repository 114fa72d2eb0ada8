"""What can stop a training run, said to the person who started it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not whole."""


class ResumeError(ValueError):
    """A run cannot be continued from this folder."""


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
