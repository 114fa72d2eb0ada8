"""Peak memory at a size that matters, each contestant in a process of its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from mmrep.losses import info_nce, siglip
from mmrep.training.collectives import world
from tests.bench.bench_losses import kibibytes, peak_in_subprocess
from tests.ranks import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"), [("mmrep info_nce", "open_clip ClipLoss"), ("mmrep siglip", "open_clip SigLipLoss")]
)
def test_peak_is_a_tenth_of_open_clips(ours, theirs):
    pytest.importorskip("open_clip")
    n, dim, matrix = 8192, 512, 8192 * 8192 * 4 / 2**20
    our_peak, their_peak = (peak_in_subprocess(name, n, dim, threads=1) for name in (ours, theirs))
    assert their_peak > 3 * matrix  # the measurement sees what open_clip holds
    assert our_peak <= their_peak / 10


def peak_blocks(name: str, exchange: str, n: int, dim: int) -> float:
    """Growth of this rank's peak resident set over one step, inputs in place, in blocks of its own [n, dim]."""
    ranks = world()
    scale, bias = torch.tensor(20.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    loss = partial(siglip, bias=bias) if name == "siglip" else info_nce

    def step(a: Tensor, b: Tensor) -> None:
        loss(a, b, scale=scale, world=ranks, exchange=exchange).backward()

    def inputs(rows: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(ranks.rank)
        return [(torch.randn(rows, dim, generator=generator) / dim**0.5).requires_grad_() for _ in range(2)]

    step(*inputs(16))  # loads kernels and opens connections
    arguments = inputs(n)
    ranks.sum(torch.zeros(()))
    before = kibibytes("VmRSS")
    step(*arguments)
    return (kibibytes("VmHWM") - before) * 1024 / (4 * n * dim)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["info_nce", "siglip"])
def test_peak_of_a_ring_does_not_grow_with_the_ranks(name, tmp_path):
    """Gathered, every rank holds the keys of all and their gradients; in a ring a guest, the one to come and theirs."""
    peaks: dict[tuple[str, int], float] = {}
    for exchange, size in (("gather", 2), ("gather", 6), ("ring", 2), ("ring", 6)):
        folder = tmp_path / f"{exchange}{size}"
        folder.mkdir()
        peaks[exchange, size] = max(run_ranks(peak_blocks, size, folder, name, exchange, 256, 4096))
    assert peaks["gather", 6] > peaks["gather", 2] + 8  # the measurement sees four more blocks, several times
    assert peaks["ring", 6] < peaks["ring", 2] + 4  # a transfer or two, as the ranks happen to wait for each other
    assert peaks["ring", 6] < peaks["gather", 6] / 2
