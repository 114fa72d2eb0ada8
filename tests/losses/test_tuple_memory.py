"""No tuple loss ever holds an N x N matrix: the largest tensor of both passes, and peak memory at a real size."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrep.losses.centroid import centroid
from mmrep.losses.gram import gram
from mmrep.losses.symile import symile
from mmrep.losses.triangle import triangle
from tests.bench.bench_losses import kibibytes
from tests.losses.test_infonce import number, unit


class Largest(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if torch.is_tensor(x)]
        self.numbers = max([self.numbers, *storages])
        return out


def largest(loss, n, dim=4, **options):
    x, s = [unit(n, dim, seed=k) for k in range(3)], number(20.0)
    with Largest() as seen:
        loss(x, scale=s, **options)["loss"].backward()
    return seen.numbers


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (gram, {}), (symile, {}), pytest.param(triangle, {}, marks=pytest.mark.slow),
        pytest.param(triangle, {"squared": True}, marks=pytest.mark.slow),
        pytest.param(centroid, {}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_nothing_is_larger_than_the_batch_and_a_tile(loss, options):
    n, dim = 1200, 4
    assert largest(loss, n, dim, tile=(64, 128), **options) <= max(4 * n * dim, 64 * 128)


def test_symile_with_all_combinations_holds_a_share_of_them():
    n, dim = 120, 4
    with mock.patch.object(sys.modules["mmrep.losses.symile"], "_PRODUCTS", 2000):
        assert largest(symile, n, dim, tile=(64, 128), negatives="all") <= max(2000, 64 * 128, 4 * n * dim)


def test_the_measure_sees_a_matrix():
    def dense(x, scale):
        return {"loss": (scale * x[0] @ x[1].T).logsumexp(1).sum()}

    assert largest(dense, 300) == 300 * 300


def peak(name: str, n: int, dim: int) -> float:
    """Growth of the peak resident set over a step of GRAM of three fields, in MiB; for a fresh process."""
    torch.set_num_threads(1)

    def published(x, scale):
        """As the authors' code: a Gram matrix for each pair."""
        a, rest = x[0], x[1:]
        cross = [a @ y.T for y in rest]
        one = (a * a).sum(1, keepdim=True).expand_as(cross[0])
        own = [[(y * z).sum(1).expand_as(one) for z in rest] for y in rest]
        grams = torch.stack([torch.stack([one, *cross], -1)] + [
            torch.stack([cross[k], *own[k]], -1) for k in range(len(rest))
        ], -2)  # fmt: skip
        logits = -scale * (torch.linalg.det(grams).abs() + 1e-12).sqrt()
        return ((logits.logsumexp(1) + logits.logsumexp(0)) / 2 - logits.diagonal()).mean()

    def step(rows):
        x, s = [unit(rows, dim, seed=k, dtype=torch.float32).detach().requires_grad_() for k in range(3)], number(20.0)
        before = kibibytes("VmRSS")
        loss = gram(x, scale=s, anchor=0)["loss"] if name == "ours" else published(x, s.float())
        loss.backward()
        return (kibibytes("VmHWM") - before) / 1024

    step(256)
    return step(n)


@pytest.mark.slow
def test_peak_of_gram_is_a_fiftieth_of_the_published_code():
    found = {}
    for name in ("ours", "published"):
        code = f"from tests.losses.test_tuple_memory import peak; print(peak({name!r}, 4096, 128))"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        found[name] = float(done.stdout)
    matrix = 4096 * 4096 * 4 / 2**20
    assert found["published"] > 9 * matrix  # the measurement sees the nine entries of each pair
    assert found["ours"] < matrix
    assert found["ours"] < found["published"] / 50
