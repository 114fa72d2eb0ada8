"""Targets with statistics: two processes, of which one may lack the field, learn what one process does."""

from __future__ import annotations

import pytest
import torch

from mmrep.data.batch import Batch
from mmrep.training.collectives import world
from mmrep.world import LocalWorld
from tests.ranks import run_ranks
from tests.targets.targets_steps import batch, root, step

TARGETS = {
    "random-projection": {"codes": 16, "dim": 4, "settle": 9},
    "online-codes": {"codes": 6, "layers": 2},
    "content": {"type": "online-codes", "codes": 6, "layers": "content"},
    "residual-codes": {"codes": 6, "codebooks": 2},
    "gumbel-codes": {"groups": 2, "codes": 6, "dim": 8, "width": 5},
}
STEPS = [slice(0, 3), slice(0, 0), slice(0, 4), slice(0, 1)]  # the rows of the first process, of 4


def learn(name: str, rank: int | None) -> list[float]:
    """The loss and the norm of the gradient in each step, then the buffers."""
    fields = {"type": name, **TARGETS[name]}
    built = root(target=fields, mask={"type": "random", "ratio": 0.5})
    for p in built.teacher.parameters() if built.teacher else []:
        p.data.mul_(1.1)
    objective, out = built.objectives["masked"], []
    for number, rows in enumerate(STEPS):
        given = batch(built, seed=number)
        if rank is not None:
            given = part(given, rows if rank == 0 else slice(rows.stop, 4))
        shared = LocalWorld() if rank is None else world()
        loss = objective(step(built, given, world=shared))["loss"]
        parameters = [p for p in built.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                          for p, g in zip(parameters, gradients, strict=True)])  # fmt: skip
        out += (shared.sum(torch.cat([loss.detach()[None], flat[::7]])) / shared.size).tolist()
        objective.after_optimizer_step()
    for name_, buffer in objective.named_buffers():
        if buffer.is_floating_point() and "projection" not in name_:
            out += buffer.flatten().tolist()
    return out


def part(given: Batch, rows: slice) -> Batch:
    ids = given.ids[rows]
    inputs = {"x": [{k: v[rows] for k, v in given.inputs["x"][0].items()}]} if ids else {}
    return Batch(ids=ids, inputs=inputs, present={"x": given.present["x"][rows]}, seeds=given.seeds[rows])


def both() -> dict[str, list[float]]:
    """What a process learns with the other one."""
    return {name: learn(name, torch.distributed.get_rank()) for name in TARGETS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(both, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", TARGETS)
def test_two_processes_learn_what_one_does(ranks, name):
    alone = torch.tensor(learn(name, None))
    assert alone.abs().max() > 0
    for found in ranks:
        torch.testing.assert_close(torch.tensor(found[name]), alone, atol=2e-5, rtol=2e-4)
