"""On 1, 2 and 4 real processes with different, uneven shards, DDP's gradient is that of one process with all rows.

The reference is the slow twin, so value, gradient, gathering and reduction are checked at once, in float64.
"""

from __future__ import annotations

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


def single(name: str) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one process, by the twin."""
    a, b, negatives = data()
    towers = Towers(with_bias=name in SIGLIP_CASES)
    options = dict((CASES | SIGLIP_CASES)[name])
    options["negatives"] = negatives if options.pop("negatives", False) else None
    loss = towers(siglip_twin if name in SIGLIP_CASES else info_nce_twin, a, b, **options)
    return loss, list(torch.autograd.grad(loss, list(towers.parameters())))


def compare() -> dict[str, Any]:
    """On each rank: relative errors of the mean loss and of DDP's gradients, by case."""
    ranks = world()
    rows = slice(sum(SHARDS[ranks.size][: ranks.rank]), sum(SHARDS[ranks.size][: ranks.rank + 1]))
    hard = slice(sum(NEGATIVES[ranks.size][: ranks.rank]), sum(NEGATIVES[ranks.size][: ranks.rank + 1]))
    a, b, negatives = data()
    out: dict[str, Any] = {"world": ranks.size, "rows": rows.stop - rows.start}
    for name, case in (CASES | SIGLIP_CASES).items():
        towers = DistributedDataParallel(Towers(with_bias=name in SIGLIP_CASES))
        options = {k: v[rows] if isinstance(v, Tensor) else v for k, v in case.items()}
        options["negatives"] = negatives[hard] if options.pop("negatives", False) else None
        loss = towers(
            siglip if name in SIGLIP_CASES else info_nce, a[rows], b[rows], **options, world=ranks, tile=(2, 3)
        )
        loss.backward()
        expected, grads = single(name)
        mean = ranks.sum(loss.detach()) / ranks.size
        out[name] = {
            "loss": relative(mean, expected.detach()),
            "gradients": [relative(p.grad, g) for p, g in zip(towers.parameters(), grads, strict=True)],
        }
    out["absent"] = [absent_modality(ranks, a, b, frozen) for frozen in (False, True)]
    out["disagree"] = disagree(ranks, a[rows], b[rows])
    return out


def relative(actual: Tensor | None, expected: Tensor) -> float:
    assert actual is not None
    assert actual.isfinite().all()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def absent_modality(ranks, a: Tensor, b: Tensor, frozen: bool) -> float:
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
    info_nce(left, right, scale=scale, world=ranks).backward()
    errors = []
    for p, g in zip(learning, expected, strict=True):
        total = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(total)
        errors.append(relative(total / ranks.size, g))
    return max(errors)


def disagree(ranks, a: Tensor, b: Tensor) -> list[str]:
    messages = []
    for options in ({"negatives": b}, {"group": torch.arange(len(a))}):
        try:
            info_nce(a, b, scale=1.0, world=ranks, **(options if ranks.rank == 0 else {}))
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module", params=sorted(SHARDS))
def reports(request, tmp_path_factory):
    reports = run_ranks(compare, request.param, tmp_path_factory.mktemp("ranks"))
    assert [(r["world"], r["rows"]) for r in reports] == [(request.param, n) for n in SHARDS[request.param]]
    return reports


@pytest.mark.parametrize("name", [*CASES, *SIGLIP_CASES])
def test_trap_3_1_averaged_gradient_is_the_single_process_gradient(reports, name):
    for r in reports:
        assert r[name]["loss"] < 1e-9
        assert max(r[name]["gradients"]) < 1e-9


def test_a_rank_without_the_modality_joins_both_passes(reports):
    for r in reports:
        assert max(r["absent"]) < 1e-9


def test_ranks_that_disagree_are_told_so(reports):
    if len(reports) == 1:
        return
    for r in reports:
        negatives, group = r["disagree"]
        assert f"`negatives` was given on 1 of {len(reports)} ranks" in negatives
        assert f"`group` was given on 1 of {len(reports)} ranks" in group


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
