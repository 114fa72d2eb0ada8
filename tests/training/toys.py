"""A root and a loader small enough to train hundreds of times, with everything that a resume can get wrong."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmrep.data.batch import Batch
from mmrep.data.sample import Quarantined
from mmrep.schedules import Schedule
from mmrep.training.contracts import Callback
from mmrep.training.optim import OptimConfig
from mmrep.training.trainer import TrainConfig, Trainer


class ToyLoader:
    """Batches of random vectors; order by (seed, epoch). Like torch's loader it draws from the global generator when a
    pass starts, which a resumed run does once more than a straight one."""

    def __init__(self, n=50, batch_size=8, dim=6, seed=0, rank=0, world=1, stream=False, bad=()):
        self.data = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
        self.n, self.batch_size, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self.stream, self.bad = stream, set(bad)
        self.epoch = self.position = 0
        self.served: list[list[str]] = []

    @property
    def steps_per_epoch(self):
        return None if self.stream else self.n // self.batch_size

    def __iter__(self):
        torch.empty((), dtype=torch.int64).random_()
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(1000 * self.seed + self.epoch)).tolist()
        while self.position < self.n // self.batch_size:
            rows = order[self.position * self.batch_size : (self.position + 1) * self.batch_size]
            rows = rows[self.rank :: self.world]
            self.position += 1
            self.served.append([str(r) for r in rows])
            yield Batch(
                ids=[str(r) for r in rows if r not in self.bad],
                inputs={"x": [{"values": self.data[[r for r in rows if r not in self.bad]]}]},
                quarantined=[Quarantined(str(r), "x", "broken", "") for r in rows if r in self.bad],
            )
        self.end_epoch()

    def end_epoch(self):
        self.epoch += 1
        self.position = 0

    def close(self):
        self.closed = True

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([1.0]))


class ToyRoot(nn.Module):
    """Reconstruction through dropout and batch norm, a temperature, and a queue that is a buffer."""

    def __init__(self, dim=6, seed=0, poison=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encode = nn.Linear(dim, 12)
            self.norm = nn.BatchNorm1d(12)
            self.dropout = nn.Dropout(0.3)
            self.decode = nn.Linear(12, dim)
        self.temperature = Temperature()
        self.register_buffer("queue", torch.zeros(3))
        self.poison = poison
        self.calls = 0
        self.seen_scales: list[float] = []

    def forward(self, batch):
        self.calls += 1
        x = batch.inputs["x"][0]["values"]
        scale = self.temperature.log_scale.exp()
        self.seen_scales.append(scale.item())
        hidden = self.norm(self.encode(x))
        fit = (self.decode(self.dropout(hidden)) - x).square().mean()
        other = (scale - 1.5).square().mean() * 0.01
        if self.poison is not None:
            fit, other = self.poison(self, batch, fit, other)
        return {"loss": fit + other, "fit": fit.detach(), "other": other.detach()}

    @torch.no_grad()
    def after_optimizer_step(self):
        self.temperature.log_scale.clamp_(0.0, 1.1)
        self.queue.copy_(torch.cat([self.queue[1:], self.decode.weight.sum()[None].cpu()]))


def toy_trainer(folder=None, *, root=None, loader=None, callbacks=(), on_quarantined=None, optim=None, **train):
    train = {"precision": "fp32", "log_every": 3, "save_every": 4, "seed": 3, "max_skipped": 0, **train}
    if "epochs" not in train:
        train.setdefault("steps", 20)
    optim = OptimConfig(**{"lr": 0.02, "schedule": Schedule(warmup=3), "weight_decay": 0.1, **(optim or {})})
    return Trainer(
        root or ToyRoot(), loader or ToyLoader(), train=TrainConfig(**train), optim=optim, folder=folder,
        callbacks=callbacks, on_quarantined=on_quarantined,
    )  # fmt: skip


def tensors(trainer):
    """Everything of a finished run that must be bitwise equal."""
    found = {f"module/{k}": v.clone() for k, v in trainer.root.state_dict().items()}
    for name, p in trainer.root.named_parameters():
        found |= {f"optim/{name}/{k}": v.clone() for k, v in trainer.optimizer.state[p].items()}
    return found


def lines(folder):
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in {"seconds", "samples_per_second"}} for row in rows]


class Recorder(Callback):
    def __init__(self):
        self.events = []

    def on_step_end(self, trainer, step):
        self.events.append(("step", step))
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002

    def on_eval(self, trainer, step):
        self.events.append(("eval", step, trainer.root.training))
        torch.rand(step)
        return {"eval/metric": float(step)}

    def on_save(self, trainer, folder):
        self.events.append(("save", folder.name))
        torch.rand(5)

    def on_fit_end(self, trainer, summary):
        self.events.append(("end", summary["steps"]))


def same(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


if __name__ == "__main__":  # python -m tests.training.toys FOLDER STEPS: a run to be killed
    toy_trainer(Path(sys.argv[1]), steps=int(sys.argv[2]), save_every=2, keep=2).fit(resume=True)
