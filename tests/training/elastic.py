"""Runs that can be compared over any number of processes: fp64, SGD, no dropout, InfoNCE over the global batch."""

from __future__ import annotations

import json
import os
import random
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from mmrep.config import component
from mmrep.data.loader import BatchLoader
from mmrep.data.reader import Reader
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.schedules import Schedule
from mmrep.training import checkpoint, rng
from mmrep.training.collectives import world
from mmrep.training.contracts import Callback, TrainConfig
from mmrep.training.optim import OptimConfig
from mmrep.training.trainer import Trainer
from tests.training.killable import Noise, source

BATCH, STEPS = 6, 20  # 3 batches an epoch; on 4 processes 1 or 2 samples each


class Double(BatchLoader):
    def __iter__(self):
        for batch in super().__iter__():
            for inputs in chain(*batch.inputs.values()):
                inputs["values"] = inputs["values"].double()
            yield batch


class Watch(Callback):
    """Notes by step: ids, bad ids, what the generators would draw at its start, the samples counted at its end."""

    def __init__(self, path, stop):
        self.path, self.stop = path, stop

    def before(self, trainer, batch):
        with rng.isolated():
            drawn = [torch.rand(1, dtype=torch.float64).item(), random.random(), np.random.rand()]  # noqa: NPY002
        self.line = [batch.ids, [note.id for note in batch.quarantined], drawn]

    def on_step_end(self, trainer, step):
        line = [step, *self.line, trainer.counters.samples]
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if step == self.stop:
            os._exit(9)


def run(out, data, folder, *, stop=None, dropout=0.0, seed=0, blind=None):
    """Train to the end, or to the step ``stop``, at which all processes die; rank ``blind`` cannot read checkpoints."""
    here = world()
    if here.rank == blind:
        checkpoint.load_packet = lambda path, name: (path / "nowhere").read_bytes()
    towers = {name: TowerConfig(encoder=component("encoders", "toy", dropout=dropout)) for name in "ab"}
    torch.manual_seed(seed)
    model = Model(ModelConfig(dim=5, towers=towers))
    for temperature in model.temperatures.values():  # fp32 always, so it stays where it is
        temperature.requires_grad_(False)
    fields = {"x": "a", "y": "b"}
    chosen = [component("objectives", "contrastive", pairs=[{"between": ["x", "y"]}])]
    views = {"x": [Noise(None)]}
    reader = Reader({f: model.tower(t).encoder for f, t in fields.items()}, views=views, seed=5)
    loader = Double(
        source(data, Path(folder)), reader, batch_size=BATCH, seed=2, rank=here.rank, world_size=here.size, buffer=8
    )
    watch = Watch(Path(f"{out}-{here.size}-{here.rank}.jsonl"), stop)
    trainer = Trainer(
        Root(model, chosen, fields=fields, views=views).double(), loader,
        train=TrainConfig(precision="fp32", log_every=3, save_every=5, steps=STEPS),
        optim=OptimConfig(optimizer="sgd", lr=0.05, clip_norm=0.5, schedule=Schedule(shape="cosine", warmup=2)),
        folder=Path(out), callbacks=[watch],
    )  # fmt: skip
    trainer.root.register_forward_pre_hook(lambda module, inputs: watch.before(trainer, inputs[0]))
    trainer.fit(resume=True)
