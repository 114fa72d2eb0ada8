"""Micro-batches: the gradient of a batch in parts is that of the whole, with dropout, in the memory of one part."""

from __future__ import annotations

import copy
import os
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from mmrep.config import component, config
from mmrep.data.batch import Batch
from mmrep.model import Model, ModelConfig, TemperatureConfig, TowerConfig
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.objectives.root import Root
from mmrep.registry import objectives as registry
from mmrep.step import Step
from mmrep.training.cached import forward_backward
from mmrep.world import LocalWorld
from tests import toys
from tests.ranks import run_ranks

FIELDS = {"x": "a", "y": "b", "z": "a"}


@config
class NormConfig(ObjectiveConfig):
    field: str = "x"


@registry.register("norms")
class Norms(Objective):
    """Sample scope: the mean over the present samples of a learned function of the embedding."""

    Config = NormConfig
    scope = "sample"

    def __init__(self, config, model, fields):
        super().__init__(config, model, fields)
        self.head = nn.Linear(model.dim, 1)

    def count(self, step):
        return int(step.present(self.config.field).sum())

    def forward(self, step):
        present = step.present(self.config.field)
        count = step.world.sum(present.sum())
        total = self.head(step.embedding(self.config.field))[present].pow(2).sum()
        return {"loss": total * step.world.size / count.clamp_min(1)}


@config
class SpreadConfig(ObjectiveConfig):
    ask: str = "embedding"


@registry.register("spread")
class Spread(Objective):
    """Batch scope, with a head of its own: minus the variance of the global batch."""

    Config = SpreadConfig
    scope = "batch"

    def __init__(self, config, model, fields):
        super().__init__(config, model, fields)
        self.head = nn.Linear(model.dim, 3)

    def forward(self, step):
        if self.config.ask != "embedding":
            getattr(step, self.config.ask)("z")
        everyone = step.world.gather(self.head(step.embedding("z")))
        return {"loss": -everyone.var(0).sum()}


def build(loss="info-nce", *, more=(), dropout=0.3, dtype=torch.float32):
    torch.manual_seed(0)
    tower = TowerConfig(
        encoder=component("encoders", "toy", dropout=dropout),
        projector=component("projectors", "mlp", hidden=16, dropout=dropout),
    )
    bias = -3.0 if loss == "siglip" else None
    temperatures = {
        "default": TemperatureConfig(scale=5.0, bias=bias),
        "other": TemperatureConfig(scale=3.0, bias=bias),
    }
    model = Model(ModelConfig(dim=5, towers={"a": tower, "b": tower}, temperatures=temperatures))
    pairs = [{"between": ["x", "y"]}, {"between": ["y", "z"], "weight": 0.5, "temperature": "other"}]
    contrast = component("objectives", "contrastive", pairs=pairs, loss={"type": loss})
    return Root(model, [contrast, *more], fields=FIELDS, views={}).train().to(dtype)


def mixed(loss="info-nce", **options):
    return build(
        loss, more=[component("objectives", "norms", weight=0.3), component("objectives", "spread")], **options
    )


def rows(start, stop, missing=(), dtype=torch.float32):
    """Samples ``start`` to ``stop`` of a fixed world; their values do not depend on the batch."""
    encoder = toys.ToyEncoder(toys.ToyConfig())
    ids = list(range(start, stop))

    def raw(field, i):
        generator = torch.Generator().manual_seed(17 * i + ord(field))
        return torch.randn(1 + i % 3, generator=generator).tolist()

    present = {f: torch.tensor([(f, i) not in missing for i in ids], dtype=torch.bool) for f in FIELDS}
    have = {f: [encoder.prepare(raw(f, i)) for i in ids if (f, i) not in missing] for f in FIELDS}
    inputs = {f: [encoder.collate(items)] for f, items in have.items() if items}
    for (view,) in inputs.values():
        view["values"] = view["values"].to(dtype)
    return Batch(ids=[str(i) for i in ids], inputs=inputs, present=present, seeds=torch.tensor(ids))


def in_parts(edges, missing=(), dtype=torch.float32):
    parts = [rows(a, b, missing, dtype) for a, b in pairwise(edges)]
    whole = rows(edges[0], edges[-1], missing)
    return Batch(ids=whole.ids, present=whole.present, seeds=whole.seeds, parts=parts)


class AllAtOnce(Step):
    """The reference: the parts are computed one after the other and all their graphs are held."""

    def __init__(self, root, batch, random):
        options = {"fields": root.fields, "views": root.views, "world": LocalWorld(), "memo": root.memo}
        super().__init__(root.model, batch, **options)
        self.steps = [Step(root.model, part, **options) for part in batch.parts]
        self.random, self.held = random, {}

    def embedding(self, field, view=0):
        if field not in self.held:
            chunks = []
            for number, step in enumerate(self.steps):
                torch.set_rng_state(self.random[field, view][number])
                chunks.append(step.embedding(field, view))
            self.held[field] = torch.cat(chunks)
        return self.held[field]


def gradients(root):
    return {name: None if p.grad is None else p.grad.clone() for name, p in root.named_parameters()}


def cached(root, batch):
    """Gradients, report, and the random states that the first pass used."""
    engine = Accelerator(cpu=True)
    kept = {}
    original = Root._replay

    def spy(self, number, scale):
        kept.update({k: [s[0] for s in v] for k, v in self._cached._random.items()})
        return original(self, number, scale)

    Root._replay = spy
    try:
        report = forward_backward(root, engine, batch)
    finally:
        Root._replay = original
    return gradients(root), report, kept


@pytest.mark.parametrize("loss", ["info-nce", "siglip"])
@pytest.mark.parametrize("missing", [(), (("x", 1), ("x", 4), ("x", 5), ("x", 6), ("y", 9), ("z", 2))])
def test_the_gradient_of_the_whole_batch_with_dropout(loss, missing):
    root, batch = mixed(loss), in_parts([0, 4, 7, 12], missing)
    twin = copy.deepcopy(root)
    torch.manual_seed(1)
    found, report, random = cached(root, batch)
    step = AllAtOnce(twin, batch, random)
    losses = {n: o(step)["loss"] * o.config.weight for n, o in twin.objectives.items()}
    total = sum(losses.values())
    total.backward()
    for name, expected in gradients(twin).items():
        assert expected is not None
        assert found[name] is not None, name
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(report["loss"], total.detach())
    for name, value in losses.items():
        torch.testing.assert_close(report[f"{name}/loss"], value.detach())


def test_without_dropout_it_is_the_gradient_of_one_pass():
    root, twin = mixed(dropout=0.0, dtype=torch.float64), mixed(dropout=0.0, dtype=torch.float64)
    missing = (("x", 0), ("y", 3), ("z", 8), ("x", 9), ("x", 10))
    engine = Accelerator(cpu=True)
    report = forward_backward(root, engine, in_parts([0, 3, 8, 11], missing, torch.float64))
    whole = forward_backward(twin, engine, rows(0, 11, missing, torch.float64))
    for (name, found), expected in zip(gradients(root).items(), gradients(twin).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert set(report) == set(whole)
    for name in whole:
        torch.testing.assert_close(report[name].double(), whole[name].double(), rtol=1e-5, atol=1e-7)


def test_running_statistics_are_updated_once():
    root = build(dropout=0.0)
    for tower in root.model.towers.values():
        tower.projector = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5))
    twin = copy.deepcopy(root)
    forward_backward(root, Accelerator(cpu=True), in_parts([0, 4, 8]))
    for part in in_parts([0, 4, 8]).parts:
        step = Step(twin.model, part, fields=FIELDS, views={}, world=LocalWorld(), memo=twin.memo)
        for field in ("x", "y", "z"):
            step.embedding(field)
    for name, found in root.model.named_buffers():
        torch.testing.assert_close(found, twin.model.get_buffer(name))
    assert int(root.model.get_buffer("towers.b.projector.1.num_batches_tracked")) == 2


def test_random_numbers_go_on_after_the_step():
    """Replaying must not wind the generator back: the next step would drop the same units again."""
    root, batch = mixed(), in_parts([0, 4, 8])
    torch.manual_seed(3)
    first = cached(root, batch)[2]
    second = cached(root, batch)[2]
    states = [s.tolist() for kept in (first, second) for parts in kept.values() for s in parts]
    assert len({tuple(s) for s in states}) == len(states)


@pytest.mark.parametrize("ask", ["encoding", "inputs", "params"])
def test_what_is_not_cached_is_refused_with_the_ways_out(ask):
    root = build(more=[component("objectives", "spread", ask=ask)])
    with pytest.raises(ValueError, match=r"train\.micro_batch"):
        forward_backward(root, Accelerator(cpu=True), in_parts([0, 4, 8]))


def test_a_batch_that_fits_is_computed_once_and_one_without_parts_asks_nobody(monkeypatch):
    passes = []
    forward = Root.forward
    monkeypatch.setattr(Root, "forward", lambda self, *a, **o: passes.append(o) or forward(self, *a, **o))
    forward_backward(build(), Accelerator(cpu=True), in_parts([0, 4]))
    monkeypatch.setattr("mmrep.training.cached._passes", None)  # which waits for the device and the other processes
    forward_backward(build(), Accelerator(cpu=True), rows(0, 4))
    assert passes == [{}, {}]


def test_the_embeddings_that_are_watched_are_those_of_the_whole_batch():
    root = mixed()
    forward_backward(root, Accelerator(cpu=True), in_parts([0, 4, 8]))
    assert {field: len(seen) for field, seen in root.seen.items()} == {"x": 8, "y": 8, "z": 8}


def test_sample_scope_alone_needs_no_pass_over_the_whole():
    torch.manual_seed(0)
    model = build().model
    root = Root(model, [component("objectives", "norms")], fields=FIELDS, views={})
    twin = copy.deepcopy(root)
    found = forward_backward(root.eval(), Accelerator(cpu=True), in_parts([0, 3, 10]))
    expected = forward_backward(twin.eval(), Accelerator(cpu=True), rows(0, 10))
    torch.testing.assert_close(found["loss"], expected["loss"])
    torch.testing.assert_close(root.objectives["norms"].head.weight.grad, twin.objectives["norms"].head.weight.grad)


EDGES = {2: [[0, 4, 7], [7, 9]], 1: [[0, 4, 7, 9]]}


def _ranks_gradients(loss, missing):
    os.environ |= {
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(dist.get_rank()),
        "LOCAL_WORLD_SIZE": "2",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group exists already
    engine = Accelerator(cpu=True)
    assert engine.num_processes == 2
    root = mixed(loss, dropout=0.0, dtype=torch.float64)
    wrapped = engine.prepare(root)
    edges = EDGES[2][engine.process_index]
    missing = [tuple(m) for m in missing]
    batch = in_parts(edges, missing, torch.float64)
    forward_backward(wrapped, engine, batch)
    return {name: p.grad.flatten().tolist() for name, p in root.named_parameters()}


@pytest.mark.parametrize("missing", [(), (("x", 7), ("x", 8), ("y", 1))])
def test_two_processes_with_unequal_numbers_of_parts(tmp_path, missing):
    """The second process has one part less (empty), and lacks a field altogether in the second case."""
    loss = "siglip" if missing else "info-nce"
    found = run_ranks(_ranks_gradients, 2, tmp_path, loss, missing)
    twin = mixed(loss, dropout=0.0, dtype=torch.float64)
    forward_backward(twin, Accelerator(cpu=True), rows(0, 9, missing, torch.float64))
    for name, parameter in twin.named_parameters():
        for rank in found:
            assert parameter.grad is not None
            mine = torch.tensor(rank[name], dtype=parameter.dtype).reshape(parameter.shape)
            close = {"rtol": 1e-9, "atol": 1e-12} if parameter.dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-8}
            torch.testing.assert_close(mine, parameter.grad, **close, msg=lambda m, n=name: f"{n}: {m}")
