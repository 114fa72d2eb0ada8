"""On 1, 2 and 4 real processes with different, uneven shards, DDP's gradient is that of one process with all rows.

The reference is the slow twin in float64, so value, gradient, exchange and reduction are checked at once.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mmrep.losses import info_nce, siglip
from mmrep.training.collectives import world
from tests.losses.twins import info_nce_twin, siglip_twin
from tests.ranks import run_ranks

SHARDS = {1: (11,), 2: (7, 4), 4: (5, 0, 4, 2)}
NEGATIVES = {1: (5,), 2: (5, 0), 4: (2, 0, 3, 0)}
GROUP = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])  # on 2 and 4 ranks, groups 3 and 5 span ranks
SOME = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
LATE_ONLY = torch.arange(11) >= 9  # all rows of a rank are invalid: ranks 0 and 2 of 4, and 0 of 2
NONE = torch.zeros(11, dtype=torch.bool)

SOFT = torch.randn(11, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 2  # a narrow cone

CASES: dict[str, dict[str, Any]] = {
    "pairs": {},
    "one direction": {"symmetric": False},
    "groups": {"group": GROUP},
    "groups, one direction": {"group": GROUP, "symmetric": False},
    "groups masked": {"group": GROUP, "duplicates": "mask"},
    "hard negatives (trap 3.3b)": {"negatives": True},
    "missing rows": {"valid": SOME},
    "a rank without a valid row (trap 3.8b)": {"valid": LATE_ONLY},
    "no valid row anywhere": {"valid": NONE},
    "everything": {"negatives": True, "group": GROUP, "valid": SOME},
    "everything masked": {"negatives": True, "group": GROUP, "valid": SOME, "duplicates": "mask"},
    "soft targets": {"soft": SOFT, "soft_weight": 0.4, "soft_temperature": 0.3},
    "soft targets, one direction": {"soft": SOFT, "symmetric": False},
    "everything soft": {"soft": SOFT, "negatives": True, "group": GROUP, "valid": SOME},
    "soft, a rank without a valid row": {"soft": SOFT, "valid": LATE_ONLY},
}
SIGLIP_CASES = {
    f"siglip: {name}": case for name, case in CASES.items() if not {"symmetric", "duplicates", "soft"} & set(case)
}


# How the keys are exchanged, in what dtype, and how far the result may be from the twin in float64.
WAYS: dict[str, tuple[str, torch.dtype, float]] = {
    "gather": ("gather", torch.float64, 1e-9),
    "ring": ("ring", torch.float64, 1e-9),
    "gather, float32": ("gather", torch.float32, 1e-5),
    "ring, float32": ("ring", torch.float32, 1e-5),
}


def cases(way: str) -> list[str]:
    """All of them in float64; in float32 those that have everything."""
    return [name for name in CASES | SIGLIP_CASES if "everything" in name or "float32" not in way]


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b, negatives = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (11, 11, 5))
    return a, b, negatives


class Towers(nn.Module):
    def __init__(self, with_bias: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.left, self.right = nn.Linear(5, 4, dtype=torch.float64), nn.Linear(5, 4, dtype=torch.float64)
        self.log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64)) if with_bias else None

    def forward(self, loss, a, b, negatives=None, **options) -> Tensor:
        embedded = None if negatives is None else F.normalize(self.right(negatives), dim=1)
        left, right = F.normalize(self.left(a), dim=1), F.normalize(self.right(b), dim=1)
        options |= {} if self.bias is None else {"bias": self.bias}
        return loss(left, right, scale=self.log_scale.exp(), negatives=embedded, **options)


@cache
def single(name: str) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one process, by the twin."""
    a, b, negatives = data()
    towers = Towers(with_bias=name in SIGLIP_CASES)
    options = dict((CASES | SIGLIP_CASES)[name])
    options["negatives"] = negatives if options.pop("negatives", False) else None
    loss = towers(siglip_twin if name in SIGLIP_CASES else info_nce_twin, a, b, **options)
    return loss, list(torch.autograd.grad(loss, list(towers.parameters())))


def compare() -> dict[str, Any]:
    """On each rank: the mean loss and DDP's gradients, by way and case."""
    ranks = world()
    rows = slice(sum(SHARDS[ranks.size][: ranks.rank]), sum(SHARDS[ranks.size][: ranks.rank + 1]))
    hard = slice(sum(NEGATIVES[ranks.size][: ranks.rank]), sum(NEGATIVES[ranks.size][: ranks.rank + 1]))
    a, b, negatives = data()
    out: dict[str, Any] = {"world": ranks.size, "rows": rows.stop - rows.start}
    for way, (exchange, dtype, _) in WAYS.items():
        for name in cases(way):
            case = (CASES | SIGLIP_CASES)[name]
            loss = partial(siglip if name in SIGLIP_CASES else info_nce, world=ranks, tile=(2, 3), exchange=exchange)
            towers = DistributedDataParallel(Towers(with_bias=name in SIGLIP_CASES).to(dtype))
            options = {k: v[rows] if isinstance(v, Tensor) else v for k, v in case.items()}
            options["negatives"] = negatives[hard].to(dtype) if options.pop("negatives", False) else None
            value = towers(loss, a[rows].to(dtype), b[rows].to(dtype), **options)
            value.backward()
            mean = ranks.sum(value.detach()) / ranks.size
            out[f"{way}: {name}"] = [x.tolist() for x in (mean, *(p.grad for p in towers.parameters()))]
    for exchange in ("gather", "ring"):
        contrast = partial(info_nce, world=ranks, exchange=exchange)
        out[f"absent, {exchange}"] = [absent_modality(ranks, contrast, a, b, frozen) for frozen in (False, True)]
        out[f"disagree, {exchange}"] = disagree(ranks, contrast, a[rows], b[rows])
    return out


def relative(actual: Tensor | None, expected: Tensor) -> float:
    assert actual is not None
    assert actual.isfinite().all()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def absent_modality(ranks, contrast, a: Tensor, b: Tensor, frozen: bool) -> float:
    """All rows on the last rank; the others have constants of zero rows, and still meet it in both passes.

    If frozen, only the left tower learns: nothing that the constant ranks hold, nor what they gather, has a gradient.
    """
    towers = Towers(with_bias=False)
    learning = list(towers.left.parameters() if frozen else towers.parameters())
    scale = 7.0 if frozen else towers.log_scale.exp()
    left, right = F.normalize(towers.left(a), dim=1), F.normalize(towers.right(b), dim=1)
    right = right.detach() if frozen else right
    expected = torch.autograd.grad(info_nce_twin(left, right, torch.as_tensor(scale)), learning, retain_graph=True)
    if ranks.rank < ranks.size - 1:
        left = right = torch.zeros(0, 4, dtype=torch.float64)
    contrast(left, right, scale=scale).backward()
    errors = []
    for p, g in zip(learning, expected, strict=True):
        total = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(total)
        errors.append(relative(total / ranks.size, g))
    return max(errors)


def disagree(ranks, contrast, a: Tensor, b: Tensor) -> list[str]:
    messages = []
    for options in ({"negatives": b}, {"group": torch.arange(len(a))}, {"exchange": "ring"}, {"exchange": "gather"}):
        try:
            contrast(a, b, scale=1.0, **(options if ranks.rank == 0 else {}))
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module", params=sorted(SHARDS))
def reports(request, tmp_path_factory):
    reports = run_ranks(compare, request.param, tmp_path_factory.mktemp("ranks"))
    assert [(r["world"], r["rows"]) for r in reports] == [(request.param, n) for n in SHARDS[request.param]]
    return reports


@pytest.mark.parametrize(("way", "name"), [(way, name) for way in WAYS for name in cases(way)])
def test_trap_3_1_averaged_gradient_is_the_single_process_gradient(reports, way, name):
    loss, grads = single(name)
    for r in reports:
        for actual, expected in zip(r[f"{way}: {name}"], (loss.detach(), *grads), strict=True):
            assert relative(torch.tensor(actual, dtype=torch.float64), expected) < WAYS[way][2]


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_a_rank_without_the_modality_joins_both_passes(reports, exchange):
    for r in reports:
        assert max(r[f"absent, {exchange}"]) < 1e-9


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_ranks_that_disagree_are_told_so(reports, exchange):
    if len(reports) == 1:
        return
    size = len(reports)
    for r in reports:
        negatives, group, *exchanges = r[f"disagree, {exchange}"]
        assert f"`negatives` was given on 1 of {size} ranks" in negatives
        assert f"`group` was given on 1 of {size} ranks" in group
        rings = 1 if exchange == "gather" else size - 1
        assert sorted(exchanges) == [f"exchange was 'ring' on {rings} of {size} ranks; choose one for all", "no error"]


def test_the_cases_would_notice_a_shard():
    """The comparison has power: the first shard alone gives another gradient, in every case but the empty one."""
    a, b, negatives = data()
    for name in CASES:
        options = {k: v[:7] if isinstance(v, Tensor) else v for k, v in CASES[name].items()}
        options["negatives"] = negatives[:2] if options.pop("negatives", False) else None
        towers = Towers(with_bias=False)
        loss = towers(info_nce_twin, a[:7], b[:7], **options)
        grads = torch.autograd.grad(loss, list(towers.parameters()))
        expected = single(name)[1]
        different = max(relative(x, y) for x, y in zip(grads, expected, strict=True)) > 1e-3
        assert different == (name != "no valid row anywhere")
