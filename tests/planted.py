"""Losses, towers and an objective with the mistakes that `mmrep check gradients` is there to find."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from mmrep.config import config, parse
from mmrep.gradients import Subject, report
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.recipe import Recipe
from mmrep.registry import encoders, losses, objectives
from mmrep.run import Run
from mmrep.training.collectives import world
from mmrep.training.engine import accelerator, barrier, end_processes
from tests.toys import ToyEncoder


class Planted(nn.Module):
    """InfoNCE from a to b, written out; correct where a subclass does not spoil it."""

    needs_bias = takes_soft = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        pass

    def __init__(self, config):
        super().__init__()

    def forward(self, a, b, *, scale, world, bias=None, group=None, valid=None, negatives=None):
        keys = self.gather(b, world)
        logits = self.scaled(scale, world) * a @ keys.T
        first = world.offset(len(a))
        target = torch.arange(first, first + len(a))
        return {"loss": self.mean(F.cross_entropy(logits, target, reduction="none"), world)}

    def gather(self, x, world) -> Tensor:
        return world.gather(x)

    def scaled(self, scale, world) -> Tensor:
        return scale

    def mean(self, each, world) -> Tensor:
        return world.size * each.sum() / world.sum(torch.tensor(float(len(each))))


@losses.register("planted-none")
class Correct(Planted):
    pass


@losses.register("planted-detached-gather")
class DetachedGather(Planted):
    """As open_clip's default: every process computes the whole loss, from rows of which only its own have a graph."""

    def forward(self, a, b, *, scale, world, **rest):
        a, b = self.gather(a, world), self.gather(b, world)
        return {"loss": F.cross_entropy(scale * a @ b.T, torch.arange(len(a)))}

    def gather(self, x, world):
        first, whole = world.offset(len(x)), world.gather(x.detach()).detach()
        return torch.cat([whole[:first], x, whole[first + len(x) :]])


@losses.register("planted-detached-keys")
class DetachedKeys(Planted):
    """As open_clip's local_loss without gather_with_grad."""

    gather = DetachedGather.gather


@losses.register("planted-twice")
class Twice(Planted):
    """The temperature is live in both hops of an exchange between two processes."""

    def scaled(self, scale, world):
        return scale if world.size == 1 else 2 * scale - scale.detach()


@losses.register("planted-local-count")
class LocalCount(Planted):
    def mean(self, each, world):
        return each.mean()


@losses.register("planted-local-statistics")
class LocalStatistics(Planted):
    """Barlow Twins that standardises by the local batch, and only then sums the correlation over processes."""

    def forward(self, a, b, *, scale, world, **rest):
        n = world.sum(torch.tensor(float(len(a))))
        a, b = ((x - x.mean(0)) / x.std(0, correction=0) for x in (a, b))
        correlation = world.sum(a.T @ b) / n
        gap = (correlation - torch.eye(len(correlation))).square()
        # The scale takes part in a correct way, or DDP would wait for its gradient.
        return {"loss": gap.sum() * scale.square().mean()}


@objectives.register("planted-regression")
class Regression(Objective):
    """An objective with parameters of its own: predicts y from x; right, or with its gradient taken by one process."""

    @config
    class Config(ObjectiveConfig):
        alone: bool = False
        spare: bool = False

    Config = Config

    def __init__(self, config, model, fields):
        super().__init__(config, model, fields)
        self.predictor = nn.Linear(model.dim, model.dim)
        self.spare = nn.Linear(model.dim, 1) if config.spare else None  # which nothing uses

    def forward(self, step):
        error = (self.predictor(step.embedding("x")) - step.embedding("y")).square().sum()
        count = step.world.sum(torch.tensor(float(len(step.ids))))
        size = 1 if self.config.alone else step.world.size
        return {"loss": size * error / count}


class _Normed(ToyEncoder):
    def __init__(self, config, files=None):
        super().__init__(config, files)
        self.norm = nn.BatchNorm1d(config.width)

    def tokenize(self, inputs):
        tokens = super().tokenize(inputs)
        return type(tokens)(self.norm(tokens.values.transpose(1, 2)).transpose(1, 2), tokens.grid)


@encoders.register("toy-batch-norm")
class Normed(_Normed):
    """Standardises by the batch."""


@encoders.register("toy-functional-dropout")
class Functional(ToyEncoder):
    """Drops without a layer that could be found and switched off."""

    def tokenize(self, inputs):
        tokens = super().tokenize(inputs)
        return type(tokens)(F.dropout(tokens.values, 0.5, self.training), tokens.grid)


@encoders.register("toy-single")
class Single(ToyEncoder):
    """As a compiled kernel would: refuses float64."""

    def encode(self, tokens, keep=None, layers=()):
        if tokens.values.dtype == torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return super().encode(tokens, keep, layers)


def recipe(loss: Any = "info-nce", *, encoder: Any = "toy", **changes: Any) -> Recipe:
    """Rows of numbers of one length, x beside y; 1 in 8 has no y where ``holes``."""
    holes, bad = changes.pop("holes", False), changes.pop("bad", 0)
    generator = torch.Generator().manual_seed(3)
    rows: list[dict[str, Any]] = [
        {"x": torch.randn(4, generator=generator).tolist(), "y": torch.randn(4, generator=generator).tolist()}
        for _ in range(40)
    ]
    for row in rows[::8] if holes else ():
        row["y"] = None
    rows[:bad] = [{"x": "no numbers", "y": [1.0]}] * bad
    data: dict[str, Any] = {
        "data": {"train": {"type": "list", "records": rows}, "fields": {"x": "a", "y": "b"}},
        "model": {"dim": 6, "towers": {"a": {"encoder": encoder}, "b": {"encoder": "toy", "projector": "mlp"}}},
        "objectives": [{"type": "contrastive", "pairs": [{"between": ["x", "y"]}], "loss": loss}],
        "train": {"steps": 1, "batch_size": 20},
    }
    return parse(Recipe, {**data, **changes})


def recipes() -> dict[str, Recipe]:
    """Everything that the one start of two processes looks at."""
    two = {"default": {"scale": 5.0, "bias": -3.0}, "other": {"scale": 3.0}}
    towers = {"a": {"encoder": "toy"}, "b": {"encoder": "toy"}}
    found = {loss: recipe(loss) for loss in losses.names("planted-*")}
    regression = {"type": "planted-regression", "weight": 0.5}
    return found | {
        "clean": recipe(holes=True, bad=4),
        "dropout": recipe(encoder={"type": "toy", "dropout": 0.5}),
        "functional dropout": recipe(encoder="toy-functional-dropout"),
        "batch norm": recipe(encoder="toy-batch-norm"),
        "batch norm and a bug": recipe("planted-local-count", encoder="toy-batch-norm"),
        "single precision": recipe(encoder="toy-single"),
        "single precision and a bug": recipe("planted-twice", encoder="toy-single"),
        "unused parameter": recipe(objectives=[{**regression, "spare": True}],
                                   model={"dim": 6, "towers": towers, "temperatures": {}}),
        "unused temperature": recipe("siglip", model={"dim": 6, "towers": towers, "temperatures": two}),
        "objective": recipe(objectives=[regression, {**regression, "name": "alone", "alone": True}],
                            model={"dim": 6, "towers": towers, "temperatures": {}}),
        "micro-batches": recipe(train={"steps": 1, "batch_size": 20, "micro_batch": 3}),
    }  # fmt: skip


class Sharding:
    """Accelerate shards with FSDP2 on GPUs alone; this does what it does there."""

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def prepare(self, root, optimizer):
        for part in [*root.model.towers.values(), root]:
            fully_shard(part, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return root, optimizer


def compare(folder: str) -> dict[str, Any]:
    """On every rank: all recipes on the processes that there are, then on the first alone. Its reports, as JSON."""
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    engine = accelerator("fp32")
    chosen = recipes()
    chosen["sharded"], chosen["sharded and a bug"] = chosen["clean"], chosen["planted-twice"]
    subjects = {
        name: Subject(Run(r, Path(folder)), processes=size, samples=r.train.batch_size) for name, r in chosen.items()
    }
    engines = {name: Sharding(engine) if "sharded" in name else engine for name in chosen}
    many = {name: subject.many(engines[name]) for name, subject in subjects.items()}
    assert world().size == size
    barrier()
    end_processes()
    found = {} if rank else {name: report(subject, many[name]) for name, subject in subjects.items()}
    dist.init_process_group("gloo", f"file://{folder}/again", rank=rank, world_size=size)  # for who called us
    return {name: {**asdict(r), "agree": r.agree, "text": r.text()} for name, r in found.items()}
