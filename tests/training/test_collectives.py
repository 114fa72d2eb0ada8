"""Collectives on three real processes; every rank reports, the parent compares."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from mmrep.training.collectives import DistributedWorld, world
from mmrep.world import LocalWorld, World
from tests.ranks import run_ranks

SIZE = 3
ROWS = (2, 0, 3)


def rows_of(rank: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    start = sum(ROWS[:rank])
    return (torch.arange(start, start + ROWS[rank]).reshape(-1, 1, 1) * 10 + torch.arange(2)).to(dtype)


def partial(rank: int) -> torch.Tensor:
    """Columns: ordinary; mass on one rank only; no mass anywhere; far apart; too large to exponentiate."""
    inf = math.inf
    table = [[0.1, -inf, -inf, -800.0, 1000.0], [0.7, 3.0, -inf, 0.0, 1001.0], [-2.0, -inf, -inf, 800.0, 999.0]]
    return torch.tensor(table[rank], dtype=torch.float64)


def around(ranks: World, x: torch.Tensor) -> list[object]:
    """What arrives in each of as many shifts as there are ranks."""
    sizes, seen = ranks.sizes(x), []
    for step in range(ranks.size):
        x = ranks.shift(x, sizes[(ranks.rank - step - 1) % ranks.size])
        seen.append(x.to(torch.float64).tolist())
    return [sizes, *seen]


def report() -> dict[str, object]:
    ranks = world()
    out: dict[str, object] = {"size": ranks.size, "rank": ranks.rank, "offset": ranks.offset(ROWS[ranks.rank])}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool):
        out[f"gather {dtype}"] = ranks.gather(rows_of(ranks.rank, dtype)).to(torch.float64).tolist()
    out["gather nothing"] = list(ranks.gather(torch.zeros(0, 4)).shape)
    for dtype in (torch.float32, torch.float64, torch.int64):
        out[f"shift {dtype}"] = around(ranks, rows_of(ranks.rank, dtype))
    strided = torch.arange(6.0).reshape(2, 3).T + 10 * ranks.rank
    out["shift strided"] = ranks.shift(strided, 3).tolist()
    out["strided"] = strided.tolist()
    equal = torch.full((2,), float(ranks.rank))
    out["gather equal"] = ranks.gather(equal).tolist()
    out["gather strided"] = ranks.gather(torch.arange(6.0).reshape(2, 3).T).tolist()

    x = rows_of(ranks.rank).requires_grad_()
    everything = ranks.gather(x)
    weights = torch.arange(1.0, 1 + everything.numel(), dtype=x.dtype).reshape(everything.shape)
    ((ranks.rank + 1) * weights * everything).sum().backward()
    out["gather gradient"] = x.grad.tolist()

    # Only rank 0 has anything to differentiate; the others must meet it in the backward pass all the same.
    x = rows_of(ranks.rank).requires_grad_(ranks.rank == 0)
    ranks.gather(x).sum().backward()
    out["gather constant"] = None if x.grad is None else x.grad.tolist()

    x = partial(ranks.rank).requires_grad_()
    y = ranks.logsumexp(x)
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=x.dtype) * (ranks.rank + 1))
    out["logsumexp"], out["logsumexp gradient"] = y.tolist(), x.grad.tolist()

    x = torch.tensor([1.0, 10.0]) * (ranks.rank + 1)
    y = ranks.sum(x.requires_grad_())
    (y * torch.tensor([1.0, 2.0]) * (ranks.rank + 1)).sum().backward()
    out["sum"], out["sum gradient"], out["argument"] = y.tolist(), x.grad.tolist(), x.tolist()

    wrong = {
        "width": torch.zeros(2, 4 + (ranks.rank == 1)),
        "dtype": torch.zeros(2, 4, dtype=torch.float64 if ranks.rank == 2 else torch.float32),
        "dimensions": torch.zeros(2, 4) if ranks.rank else torch.zeros(2, 4, 1),
        "0-D": torch.zeros(()),
        "unsupported": torch.zeros(2, 4, dtype=torch.complex64),
    }
    for name, tensor in wrong.items():
        try:
            ranks.gather(tensor)
            out[name] = "no error"
        except ValueError as error:
            out[name] = str(error)
    try:
        ranks.sizes(wrong["width"])
    except ValueError as error:
        out["sizes"] = str(error)

    pair = dist.new_group([0, 2])
    if ranks.rank != 1:
        some = DistributedWorld(pair)
        out["subgroup"] = some.gather(torch.tensor([ranks.rank])).tolist()
        out["shift in a subgroup"] = some.shift(torch.tensor([ranks.rank]), 1).tolist()
    return out


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return run_ranks(report, SIZE, tmp_path_factory.mktemp("ranks"))


def test_size_rank_and_offset(reports):
    assert [(r["size"], r["rank"], r["offset"]) for r in reports] == [(3, 0, 0), (3, 1, 2), (3, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_gather_of_uneven_rows(reports, dtype):
    expected = torch.cat([rows_of(rank, dtype) for rank in range(SIZE)]).to(torch.float64).tolist()
    assert len(expected) == 5
    for r in reports:
        assert r[f"gather {dtype}"] == expected


def test_gather_of_even_no_and_strided_rows(reports):
    for r in reports:
        assert r["gather equal"] == [0, 0, 1, 1, 2, 2]
        assert r["gather nothing"] == [0, 4]
        assert r["gather strided"] == [[0, 3], [1, 4], [2, 5]] * SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_shift_of_uneven_rows_goes_round_until_all_are_home(reports, dtype):
    for rank, r in enumerate(reports):
        sizes, *seen = r[f"shift {dtype}"]
        assert sizes == list(ROWS)
        assert seen == [rows_of((rank - step) % SIZE).tolist() for step in (1, 2, 3)]


def test_shift_of_strided_rows_leaves_them_as_they_were(reports):
    rows = torch.arange(6.0).reshape(2, 3).T
    for rank, r in enumerate(reports):
        assert r["strided"] == (rows + 10 * rank).tolist()
        assert r["shift strided"] == (rows + 10 * ((rank - 1) % SIZE)).tolist()


def test_trap_3_1_gather_sums_the_gradients_of_all_ranks_into_the_owner(reports):
    weights = (1 + 2 + 3) * torch.arange(1.0, 11.0, dtype=torch.float64).reshape(5, 1, 2)
    for r, expected in zip(reports, weights.split(ROWS), strict=True):
        assert r["gather gradient"] == expected.tolist()


def test_a_rank_of_constants_joins_the_backward_pass(reports):
    assert reports[0]["gather constant"] == torch.full((2, 1, 2), 3.0).tolist()
    assert reports[1]["gather constant"] is None


def test_logsumexp_and_its_gradient(reports):
    x = torch.stack([partial(rank) for rank in range(SIZE)])
    shares = torch.softmax(x, 0).nan_to_num(0)  # the column without any mass is NaN there and has no gradient here
    grads = 6 * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=x.dtype) * shares
    for rank, r in enumerate(reports):
        assert r["logsumexp"] == pytest.approx(torch.logsumexp(x, 0).tolist(), rel=1e-14)
        assert r["logsumexp gradient"] == pytest.approx(grads[rank].tolist(), rel=1e-12, abs=0)


def test_sum_and_its_gradient(reports):
    for rank, r in enumerate(reports):
        assert r["sum"] == [6.0, 60.0]
        assert r["sum gradient"] == [6.0, 12.0]
        assert r["argument"] == [rank + 1.0, 10.0 * (rank + 1)]  # left as it was


def test_trap_3_3d_a_mismatch_is_an_error_with_a_table_on_every_rank(reports):
    for r in reports:
        assert "rank 0: [2, 4] torch.float32" in r["width"]
        assert "rank 1: [2, 5] torch.float32" in r["width"]
        assert "rank 2: [2, 4] torch.float64" in r["dtype"]
        assert "rank 0: [2, 4, 1]" in r["dimensions"]
        assert "rank 1: [2, 4] " in r["dimensions"]
        assert "1 to 8 dimensions" in r["0-D"]
        assert "unsupported dtype" in r["unsupported"]
        assert r["sizes"] == r["width"]


def test_a_group_of_some_ranks(reports):
    assert [r.get("subgroup") for r in reports] == [[0, 2], None, [0, 2]]
    assert [r.get("shift in a subgroup") for r in reports] == [[2], None, [0]]


def test_one_process_needs_no_group():
    alone: World = world()
    assert alone == LocalWorld()
    x = torch.randn(3, 2)
    assert alone.gather(x) is x
    assert alone.logsumexp(x) is x
    assert alone.sum(x) is x
    assert alone.offset(3) == 0
    assert alone.sizes(x) == [3]
    assert alone.shift(x, 3) is x
