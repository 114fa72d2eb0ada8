"""What test_distributed starts on every process: ``torchrun --nproc-per-node 2 -m tests.training.distributed_run OUT``.

Each scenario's findings go to ``OUT/<scenario>-<rank>.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mmrep.schedules import Schedule
from mmrep.training import checkpoint
from mmrep.training.contracts import Callback
from mmrep.training.engine import end_processes
from tests.training.toys import ToyLoader, ToyRoot, toy_trainer

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Exact(ToyRoot):
    """Without dropout and batch statistics: two processes are one process on the whole batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norm, self.dropout = torch.nn.Identity(), torch.nn.Identity()


def loader(**options):
    return ToyLoader(rank=RANK, world=WORLD, **options)


def weights(trainer):
    return {name: value.tolist() for name, value in trainer.root.state_dict().items()}


def plain(out):
    trainer = toy_trainer(out / "plain", root=Exact(), loader=loader())
    summary = trainer.fit()
    return {"backend": dist.get_backend(), "summary": summary, "weights": weights(trainer), "main": trainer.is_main}


def dropout(out):
    """Each process draws its own random numbers; straight = stopped and resumed."""
    masks = []
    statistics = []

    class Evaluate(Callback):
        def on_eval(self, trainer, step):
            statistics.append(trainer.root.norm.running_mean.tolist())

    straight = toy_trainer(out / "straight", loader=loader(), callbacks=[Evaluate()], eval_every=10)
    straight.root.dropout.register_forward_hook(lambda m, a, y: masks.append((y == 0).sum(1).tolist()))
    straight.fit()

    class Kill(Callback):
        def on_step_end(self, trainer, step):
            if step == 10:
                raise InterruptedError

    try:
        toy_trainer(out / "cut", loader=loader(), callbacks=[Kill()], eval_every=10).fit()
    except InterruptedError:
        pass
    resumed = toy_trainer(out / "cut", root=ToyRoot(seed=5), loader=loader(), eval_every=10)
    resumed.fit(resume=True)
    return {"straight": weights(straight), "resumed": weights(resumed), "masks": masks[0], "statistics": statistics}


def nan_on_one(out):
    def poison(root, batch, fit, other):
        return fit, other * torch.nan if root.calls == 5 and RANK == 1 else other

    return raised(lambda: toy_trainer(out / "nan", root=ToyRoot(poison=poison), loader=loader()).fit())


def disk_full(out):
    if RANK == 0:
        original = checkpoint._write

        def full(path, content):
            if "step-00000004" not in str(path):
                raise OSError(28, "No space left on device")
            return original(path, content)

        checkpoint._write = full
    found = raised(lambda: toy_trainer(out / "full", loader=loader()).fit())
    if RANK == 0:
        checkpoint._write = original
    return found


def uneven_streams(out):
    """Rank 1 has two batches less in each epoch: every epoch ends after its four."""
    stream = loader(stream=True, n=48 if RANK == 0 else 32)
    trainer = toy_trainer(None, root=Exact(), loader=stream, epochs=2, optim={"schedule": Schedule(shape="constant")})
    trainer.fit()
    return {"steps": trainer.step, "epoch": stream.epoch, "position": stream.position}


def one_is_interrupted(out):
    class Signal(Callback):
        def on_step_end(self, trainer, step):
            if step == 5 and RANK == 1:
                os.kill(os.getpid(), signal.SIGINT)

    return raised(lambda: toy_trainer(out / "stop", loader=loader(), callbacks=[Signal()]).fit())


def existing(out):
    return raised(lambda: toy_trainer(out / "plain", loader=loader()).fit())


def raised(action):
    try:
        action()
    except BaseException as error:
        return {"error": type(error).__name__, "message": str(error), **{k: str(v) for k, v in vars(error).items()}}
    return {"error": None}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for scenario in (plain, dropout, nan_on_one, disk_full, uneven_streams, one_is_interrupted, existing):
        found = scenario(folder)
        (folder / f"{scenario.__name__}-{RANK}.json").write_text(json.dumps(found))
        dist.barrier()
    end_processes()
