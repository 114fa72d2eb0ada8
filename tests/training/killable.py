"""Runs to be killed, with everything that a resume can get wrong.

That is dropout, random views, a weight average, a queue, a centre, draws from all three global generators, epochs that
end amid a metrics window, evaluations, missing and broken samples.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from mmrep.config import component, config
from mmrep.data.loader import BatchLoader
from mmrep.data.reader import Reader
from mmrep.data.records import Records
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.objectives.root import Root
from mmrep.registry import objectives
from mmrep.schedules import Schedule
from mmrep.training import checkpoint
from mmrep.training.collectives import world
from mmrep.training.contracts import Callback, TrainConfig
from mmrep.training.optim import OptimConfig
from mmrep.training.trainer import Trainer
from mmrep.views.view import View, uniform
from tests import toys  # noqa: F401

DATA = ("map", "webdataset", "hf-stream")
SAMPLES, BATCH, STEPS, SHARDS = 21, 4, 18, 3  # 5 batches an epoch; of a stream on two processes, 3


class Noise(View):
    """Random in the worker and random on the device."""

    def sample(self, decoded, seed):
        draw = random.Random(seed)
        return [value + 0.1 * draw.gauss(0, 1) for value in decoded]

    def batch(self, inputs, seeds):
        factor = 0.8 + 0.4 * uniform(seeds, 1)
        return {**inputs, "values": inputs["values"] * factor}, {"factor": factor}


@config
class RememberConfig(ObjectiveConfig):
    pass


@objectives.register("remember")
class Remember(Objective):
    """Away from a queue of earlier embeddings and towards their centre, with noise from every global generator."""

    Config = RememberConfig

    def __init__(self, config, model, fields):
        super().__init__(config, model, fields)
        self.register_buffer("queue", torch.zeros(6, model.dim))
        self.register_buffer("centre", torch.zeros(model.dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self._new = None

    def forward(self, step):
        x = step.embedding("x")
        self._new = x.detach()
        away = (x @ self.queue.T * (torch.rand(len(x), 6) < 0.7)).square().mean() * random.random()
        near = (x - self.centre).square().mean() * np.random.rand()  # noqa: NPY002
        return {"loss": away + near, "away": away}

    @torch.no_grad()
    def after_optimizer_step(self):
        self.queue.copy_(torch.cat([self._new, self.queue])[:6])
        self.centre.lerp_(self._new.mean(0), 0.1)
        self.filled.add_(1)


def records():
    draw = random.Random(1)
    rows = [
        {"id": f"s{i}", **{f: [draw.gauss(0, 1) for _ in range(1 + (i + k) % 3)] for k, f in enumerate("xy")}}
        for i in range(SAMPLES)
    ]
    rows[4]["x"] = None  # missing
    rows[9]["y"] = "broken"
    return rows


def write_data(folder):
    """The records as tar shards and as JSON lines."""
    for shard in range(SHARDS):
        rows = records()[shard::SHARDS]
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps(_columns(row)) + "\n" for row in rows))
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for row in rows:
                for field in "xy":
                    if row[field] is not None:
                        content = json.dumps(row[field]).encode()
                        info = tarfile.TarInfo(f"{row['id']}.{field}.json")
                        info.size = len(content)
                        archive.addfile(info, BytesIO(content))


def _columns(row):  # a table's column has one type
    return {**row, "y": [] if row["y"] == "broken" else row["y"]}


def source(data, folder):
    if data == "map":
        return Records.from_lists(**{name: [row[name] for row in records()] for name in ("id", "x", "y")})
    if data == "webdataset":
        columns = {"x": "x.json", "y": "y.json"}
        return component("sources", "webdataset", shards=str(folder / "*.tar"), columns=columns).build()
    files = [str(folder / f"{shard}.jsonl") for shard in range(SHARDS)]
    return component("sources", "hf-dataset", path="json", data_files=files, streaming=True, id="id").build()


class Watch(Callback):
    """Writes each step's ids to a file, and the number of each step that is over to the one who may kill."""

    def __init__(self, path):
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def before(self, trainer, batch):
        rank = trainer.accelerator.process_index
        os.write(self.file, json.dumps([trainer.step + 1, rank, batch.ids]).encode() + b"\n")

    def on_step_end(self, trainer, step):
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        if trainer.is_main:
            os.write(1, b"step %d\n" % step)

    def on_eval(self, trainer, step):
        torch.rand(step)
        with trainer.root.averaged():
            return {"eval/weights": sum(p.double().sum().item() for p in trainer.root.model.parameters())}


def build(out, data, folder, *, workers=0, seed=0, epochs=None):
    towers = {
        "a": TowerConfig(encoder=component("encoders", "toy", dropout=0.2)),
        "b": TowerConfig(encoder=component("encoders", "toy", dropout=0.1)),
    }
    torch.manual_seed(seed)
    model = Model(ModelConfig(dim=5, towers=towers))
    fields = {"x": "a", "y": "b"}
    chosen = [component("objectives", "contrastive", pairs=[{"between": ["x", "y"]}]),
              component("objectives", "remember", weight=0.5)]  # fmt: skip
    views = {"x": [Noise(None)]}
    reader = Reader({f: model.tower(t).encoder for f, t in fields.items()}, views=views, seed=5)
    here = world()
    loader = BatchLoader(
        source(data, folder), reader, batch_size=BATCH, workers=workers, seed=2, buffer=8, rank=here.rank,
        world_size=here.size,
    )  # fmt: skip
    watch = Watch(out.with_suffix(".ids"))
    length = {"steps": STEPS} if epochs is None else {"epochs": epochs}
    shape = "cosine" if epochs is None else "constant"
    trainer = Trainer(
        Root(model, chosen, fields=fields, views=views, average=0.9), loader,
        train=TrainConfig(precision="fp32", log_every=3, save_every=4, eval_every=5, keep=2, **length),
        optim=OptimConfig(lr=0.01, schedule=Schedule(shape=shape, warmup=2)), folder=out, callbacks=[watch],
    )  # fmt: skip
    trainer.root.register_forward_pre_hook(lambda module, inputs: watch.before(trainer, inputs[0]))
    return trainer


class DieAfter(Callback):
    def __init__(self, step, rank):
        self.step, self.rank = step, rank

    def on_step_end(self, trainer, step):
        if (step, trainer.accelerator.process_index) == (self.step, self.rank):
            os.kill(os.getpid(), signal.SIGKILL)


def run(out, data, folder, *, workers, seed=0, die_at=None, die_after=None, epochs=None):
    """Train to the end.

    Or to that many file operations of the checkpoints that are written (``die_at``), or, in the process of that rank,
    to that step (``die_after``).
    """
    if die_at is not None:
        die_in_a_save(die_at)
    trainer = build(Path(out), data, Path(folder), workers=workers, seed=seed, epochs=epochs)
    if die_after is not None:
        trainer.callbacks = [*trainer.callbacks, DieAfter(*die_after)]
    trainer.fit(resume=True)


def die_in_a_save(operations):
    """Let this process kill itself in the n-th file operation of saving, counted over saves."""
    left, saving = [operations], [False]
    watched = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir", "os.listdir"}

    def hook(event, arguments):
        if saving[0] and event in watched:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    original = checkpoint.save

    def save(*arguments, **options):
        saving[0] = True
        path = original(*arguments, **options)
        saving[0] = False
        return path

    checkpoint.save = save
    sys.addaudithook(hook)
