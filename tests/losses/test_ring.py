"""Blocks that travel a ring of four real processes give what gathering them all does, and are never held together."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmrep.losses import info_nce, siglip
from mmrep.training.collectives import world
from mmrep.world import World
from tests.losses.twins import info_nce_twin
from tests.ranks import run_ranks

SIZE = 4
TRIALS = range(24)
SHARDS, DIM, TILE = (40, 0, 24, 36), 6, (4, 8)
N = sum(SHARDS)
SPREADS = [1.0, 50.0, 90.0, 400.0]
LARGEST = {
    "info_nce": {},
    "info_nce, groups": {"group": 3},
    "info_nce, masked": {"group": 3, "duplicates": "mask"},
    "info_nce, soft": {"soft": 4},
    "info_nce, online": {"scale": 1e4},
    "siglip": {"bias": -1.0},
    "siglip, groups": {"bias": -1.0, "group": 3},
}


def rows(n: int, seed: int, dim: int = DIM, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def trial(ranks: World, seed: int) -> dict[str, Any]:
    """A loss with options drawn for all ranks, of rows, groups and validity drawn for each."""
    common = random.Random(seed)
    own = random.Random(1000 * seed + ranks.rank)
    n = own.choice([0, 1, 2, 5, 9])
    leaves = {"a": rows(n, own.randrange(2**30)), "b": rows(n, own.randrange(2**30))}
    if common.random() < 0.5:
        leaves["negatives"] = rows(own.choice([0, 1, 4]), own.randrange(2**30))
    leaves["scale"] = torch.tensor(common.choice([1.0, 14.3, 100.0]), dtype=torch.float64)
    options: dict[str, Any] = {}
    if common.random() < 0.6:
        few = common.choice([1, 3, 30])
        options["group"] = torch.tensor([own.randint(-few, few) for _ in range(n)], dtype=torch.int64)
    if common.random() < 0.5:
        options["valid"] = torch.tensor([own.random() < 0.7 for _ in range(n)], dtype=torch.bool)
    if seed % 4 == 0:
        leaves["bias"] = torch.tensor(-3.0, dtype=torch.float64)
    else:
        options["symmetric"] = common.random() < 0.7
        options["duplicates"] = common.choice(["positive", "positive", "mask"])
        if options["duplicates"] == "positive" and common.random() < 0.7:
            options["soft"] = rows(n, own.randrange(2**30), 3) + 1
    loss = partial(siglip if "bias" in leaves else info_nce, world=ranks, tile=(2, 3), **options)
    # In some trials a rank's sum counts for more in what is differentiated, or one side is frozen everywhere.
    weight = 1.0 + ranks.rank * common.choice([0, 1])
    frozen = common.choice([None, None, "a", "b", "scale"])
    values = {exchange: gradients(partial(loss, exchange=exchange), leaves, frozen, weight) for exchange in WAYS}
    errors = [
        relative(x, y, floor=1e-6) for x, y in zip(*(values[exchange] for exchange in WAYS), strict=True)
    ]  # fmt: skip
    return {"error": max(errors), "value": float(values["ring"][0]), "options": sorted([*leaves, *options])}


WAYS = ("gather", "ring")


def gradients(loss: Any, leaves: dict[str, Tensor], frozen: str | None, weight: float) -> list[Tensor]:
    """The value, and the gradient of all that is not frozen; twice, the second time from the same graph."""
    inputs = {name: x.clone().requires_grad_(name != frozen) for name, x in leaves.items()}
    value = loss(**inputs)
    learning = [x for x in inputs.values() if x.requires_grad]
    first = torch.autograd.grad(weight * value, learning, retain_graph=True)
    again = torch.autograd.grad(weight * value, learning)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    return [value.detach(), *first]


def relative(actual: Tensor, expected: Tensor, floor: float) -> float:
    assert actual.isfinite().all()
    error = (actual - expected).abs() / expected.abs().amax().clamp_min(floor) if expected.numel() else torch.zeros(1)
    return float(error.max())


def spread(ranks: World, factor: float) -> list[float]:
    """Logits of one rank far above, of others far below: what is exact for one block is not for the sums over all."""
    a = torch.tensor([[1.0, 0.3], [0.2, 1.0], [-1.0, 0.5], [0.1, -0.2]]) * torch.tensor([[factor], [1.0], [1.0], [1.0]])
    b = torch.tensor([[1.0, 0.1], [0.7, 0.4], [0.3, -0.8], [0.9, 0.6]])
    own = slice(ranks.rank, ranks.rank + 1)
    leaves = [a[own].clone().requires_grad_(), b[own].clone().requires_grad_()]
    loss = info_nce(*leaves, scale=1.0, world=ranks, exchange="ring")
    exact = [a.double().requires_grad_(), b.double().requires_grad_()]
    twin = info_nce_twin(*exact, torch.tensor(1.0, dtype=torch.float64))
    wanted = torch.autograd.grad(twin * ranks.size, exact)
    pairs = zip(torch.autograd.grad(loss, leaves), wanted, strict=True)
    return [float((x - y[own]).abs().max() / y.abs().max()) for x, y in pairs]


def faint(ranks: World) -> list[float]:
    """Rank 0's negative has a logit of 75 in its own block and a probability of exp(75 - 100) among all keys.

    The other queries give it less still, so that its gradient shows whether such a probability keeps its digits.
    """
    a = torch.tensor([[10.0, 0.0], [-10.0, 1.0], [-10.0, 1.0], [-10.0, 1.0]])
    b = torch.tensor([[0.1, 0.2], [10.0, 0.0], [0.1, 0.2], [0.1, 0.2]])
    negatives = torch.tensor([[7.5, 0.0], [0.1, 0.0], [0.1, 0.0], [0.1, 0.0]])
    own = slice(ranks.rank, ranks.rank + 1)
    leaf = negatives[own].clone().requires_grad_()
    loss = info_nce(a[own], b[own], scale=1.0, negatives=leaf, symmetric=False, world=ranks, exchange="ring")
    exact = [x.double().requires_grad_() for x in (a, b, torch.tensor(1.0), negatives)]
    wanted = torch.autograd.grad(info_nce_twin(*exact, symmetric=False) * ranks.size, exact[-1])[0][own]
    (actual,) = torch.autograd.grad(loss, leaf)
    return [float(wanted.abs().max()), relative(actual, wanted, floor=0.0)]


class _Largest(TorchDispatchMode):
    """The largest dimension and number of elements of what any operation returns, forward or backward."""

    dim = numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.dim, self.numel = max(self.dim, *x.shape, 0), max(self.numel, x.numel())
        return result


def largest(ranks: World, options: dict[str, Any], exchange: str) -> list[int]:
    n = SHARDS[ranks.rank]
    options = {"scale": 10.0, **options}
    a, b, negatives = (rows(m, ranks.rank + 7 * i).requires_grad_() for i, m in enumerate((n, n, n // 8)))
    if "group" in options:
        options["group"] = torch.arange(n) % options["group"]
    if "soft" in options:
        options["soft"] = rows(n, ranks.rank, options["soft"])
    loss = partial(siglip if "bias" in options else info_nce, world=ranks, tile=TILE, exchange=exchange)
    with _Largest() as seen:
        loss(a, b, negatives=negatives, **options).backward()
    assert None not in (a.grad, b.grad, negatives.grad)
    return [seen.dim, seen.numel]


def report() -> dict[str, Any]:
    ranks = world()
    return {
        "trials": [trial(ranks, seed) for seed in TRIALS],
        "faint": faint(ranks),
        "spread": [spread(ranks, factor) for factor in SPREADS],
        **{f"{name}, {way}": largest(ranks, options, way) for name, options in LARGEST.items() for way in WAYS},
    }


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return run_ranks(report, SIZE, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("seed", TRIALS)
def test_any_batch_gives_what_gathering_gives(reports, seed):
    for r in reports:
        assert r["trials"][seed]["error"] < 1e-9, r["trials"][seed]


def test_the_trials_are_of_all_kinds(reports):
    trials = reports[0]["trials"]
    for option in ("negatives", "group", "valid", "bias", "soft", "symmetric"):
        assert 5 <= sum(option in t["options"] for t in trials) <= 20, option
    assert sum(t["value"] > 0.1 for t in trials) > 15


@pytest.mark.parametrize("factor", SPREADS)
def test_blocks_far_apart_lose_no_digit(reports, factor):
    for r in reports:
        assert max(r["spread"][SPREADS.index(factor)]) < 1e-5


def test_a_faint_probability_keeps_its_digits(reports):
    size, error = reports[0]["faint"]
    assert 1e-12 < size < 1e-9
    assert error < 1e-4


@pytest.mark.parametrize("name", LARGEST)
def test_no_tensor_has_the_rows_of_all_ranks(reports, name):
    """The largest block here has 40 + 5 rows, the batch 100; tiles are small beside both."""
    block = max(n + n // 8 for n in SHARDS) * DIM
    for r in reports:
        dim, numel = r[f"{name}, ring"]
        assert dim < N
        assert numel <= block < N * DIM / 2
        dim, numel = r[f"{name}, gather"]
        assert dim >= N  # the measurement sees a gathered block
        assert numel >= N * DIM
