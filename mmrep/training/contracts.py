"""What a run is told (`TrainConfig`), what it reads (`Loader`), and who may watch it (`Callback`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import Field

from mmrep.config import config
from mmrep.data.batch import Batch
from mmrep.training.engine import Precision

if TYPE_CHECKING:
    from mmrep.training.trainer import Trainer


@config
class TrainConfig:
    """How long and how a run goes. Exactly one of ``steps`` and ``epochs`` is given.

    steps: optimizer steps. epochs: passes over the data; may be a fraction. batch_size: samples a step, over all
    processes. micro_batch: samples that one process computes at a time; a larger batch is computed in parts, in the
    memory of one, with the gradient of the whole (see `mmrep.cached`). precision: ``auto`` is bf16 where the hardware
    multiplies it, else fp32; weights stay fp32. seed: of everything random. log_every, save_every, eval_every: in
    steps; null = only at the end (eval: never). keep: how many checkpoints stay. workers: loader processes.
    channels_last: memory format of convolutions. checkpointing: keep of each block of an encoder its input alone and
    compute the rest again in the backward pass, for much less memory and about a third more time. compile: compile the
    encoders' forward passes with torch.compile (the first steps then take minutes). deterministic: refuse kernels that
    are not reproducible. max_skipped: so many steps of a run may have a loss or gradient that is not finite; they are
    skipped and counted, and one more stops the run.
    """

    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 256
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    precision: Precision = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: Annotated[int, Field(ge=1)] = 10
    save_every: Annotated[int, Field(ge=1)] | None = 500
    eval_every: Annotated[int, Field(ge=1)] | None = None
    keep: Annotated[int, Field(ge=1)] = 3
    workers: Annotated[int, Field(ge=0)] = 2
    channels_last: bool = False
    checkpointing: bool = False
    compile: bool = False
    deterministic: bool = False
    max_skipped: Annotated[int, Field(ge=0)] = 5

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"give exactly one of steps and epochs and set the other to null; "
                f"got steps={self.steps}, epochs={self.epochs}"
            )


class Loader(Protocol):
    """The batches of this process. After the first of a pass, drawing them leaves the global random numbers alone.

    Attributes:
        epoch: full passes done.
        steps_per_epoch: batches of one pass, the same number on all processes; None for a stream.
    """

    @property
    def epoch(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int | None: ...
    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; at its end ``epoch`` grows by one."""
        ...

    def end_epoch(self) -> None:
        """Go to the next epoch although batches are left, because another process has none."""
        ...

    def close(self) -> None:
        """Stop reading ahead; the run is over, or stops."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON data that says what was yielded so far (not what was read ahead)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was."""
        ...


class Callback:
    """What happens beside training. Every process calls it; it cannot disturb the run's random numbers."""

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Before the first step that is taken here, in eval mode; of a resumed run after its checkpoint was read."""

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        """After each step."""

    def on_eval(self, trainer: Trainer, step: int) -> Mapping[str, float] | None:
        """Every ``eval_every`` steps and after the last, in eval mode; what it returns goes to metrics.jsonl.

        Raises:
            Halt: on every process; the run ends, with a checkpoint.
        """

    def on_save(self, trainer: Trainer, folder: Path) -> None:
        """After each checkpoint, with the checkpoint's folder."""

    def on_fit_end(self, trainer: Trainer, summary: Mapping[str, Any]) -> None:
        """After the last step and the last checkpoint."""
