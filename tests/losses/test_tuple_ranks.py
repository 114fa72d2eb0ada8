"""Tuple losses and the cross-correlation by themselves on two ranks, of which one holds nothing, or disagrees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.losses.centroid import centroid
from mmrep.losses.cross_correlation import cross_correlation_loss
from mmrep.losses.gram import gram
from mmrep.losses.symile import symile
from mmrep.losses.triangle import triangle
from mmrep.training.collectives import world
from tests.losses.tuple_twins import area, centroid_twin, cross_correlation_twin, measure_twin, symile_twin
from tests.ranks import run_ranks


def correlated(x, *, scale, **options):
    return {"loss": cross_correlation_loss(x[0], x[1], **options)["common"] + 0 * scale}


def correlated_twin(x, scale):
    return cross_correlation_twin(x[0], x[1], 4, 5e-3)[0] + 0 * scale


LOSSES = {
    "gram": (gram, measure_twin),
    "triangle": (triangle, lambda x, s: measure_twin(x, s, measure=area)),
    "symile": (lambda x, **o: symile(x, negatives="all", **o), symile_twin),
    "centroid": (centroid, centroid_twin),
    "centroid, ring": (lambda x, **o: centroid(x, exchange="ring", **o), centroid_twin),
    "cross-correlation": (correlated, correlated_twin),
}


def compare() -> dict[str, Any]:
    return {
        name: [constant_rank(*pair, frozen=frozen) for frozen in (False, True)] for name, pair in LOSSES.items()
    } | {"disagree": {name: disagree(LOSSES[name][0]) for name in ("gram", "symile", "centroid")}}


def constant_rank(loss, twin, *, frozen: bool) -> float:
    """All rows on the last rank; the other has constants of zero rows, and still meets it in both passes.

    If frozen, only the first tower learns.
    """
    ranks = world()
    torch.manual_seed(1)
    towers = nn.ModuleList(nn.Linear(5, 4, dtype=torch.float64) for _ in range(3))
    log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    learning = list(towers[0].parameters()) if frozen else [*towers.parameters(), log_scale]
    rows = [torch.randn(6, 5, dtype=torch.float64) for _ in towers]
    x = [F.normalize(tower(row), dim=1) for tower, row in zip(towers, rows, strict=True)]
    x = [x[0], *(y.detach() if frozen else y for y in x[1:])]
    scale = log_scale.exp().detach() if frozen else log_scale.exp()
    wanted = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(twin(x, scale), learning, **wanted)
    if ranks.rank < ranks.size - 1:
        x = [torch.zeros(0, 4, dtype=torch.float64)] * 3
    loss(x, scale=scale, world=ranks)["loss"].backward()
    errors = []
    for p, g in zip(learning, expected, strict=True):
        total = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(total)
        assert total.isfinite().all()
        errors.append(float((total / ranks.size - g).abs().max() / g.abs().max().clamp_min(1e-3)))
    return max(errors)


def disagree(loss) -> str:
    x: list[Tensor] = [torch.eye(4)[:3]] * 3
    try:
        loss(x, scale=1.0, world=world(), **({"group": torch.arange(3)} if world().rank == 0 else {}))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return run_ranks(compare, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", LOSSES)
def test_a_rank_of_constants_joins_both_passes(reports, name):
    for report in reports:
        assert max(report[name]) < 1e-8


@pytest.mark.parametrize("name", ["gram", "symile", "centroid"])
def test_ranks_that_disagree_are_told_so(reports, name):
    assert all("`group` was given on 1 of 2 ranks" in report["disagree"][name] for report in reports)
