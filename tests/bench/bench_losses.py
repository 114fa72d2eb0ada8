"""Time and peak memory of the tiled losses against open_clip's, at N = 8192, D = 512, float32.

Run:  python tests/bench/bench_losses.py [--rounds 7] [--n 8192] [--dim 512] [--threads 1]

Times are process CPU time of forward and backward, the contestants interleaved in one process. Memory is what the peak
resident set of a process of its own grows by over its state with inputs in place, after a warm-up at a smaller size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Contestant = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def contestants() -> dict[str, Contestant]:
    from open_clip.loss import ClipLoss, SigLipLoss

    from mmrep.losses import info_nce, siglip

    clip_loss, siglip_loss = ClipLoss(), SigLipLoss()
    return {
        "open_clip ClipLoss": lambda a, b, scale, bias: clip_loss(a, b, scale),
        "mmrep info_nce": lambda a, b, scale, bias: info_nce(a, b, scale=scale),
        "open_clip SigLipLoss": lambda a, b, scale, bias: siglip_loss(a, b, scale, bias),
        "mmrep siglip": lambda a, b, scale, bias: siglip(a, b, scale=scale, bias=bias),
    }


def inputs(n: int, dim: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = F.normalize(torch.randn(n, dim, generator=generator), dim=1)
    b = F.normalize(a + torch.randn(n, dim, generator=generator) / dim**0.5, dim=1)  # pairs are alike, as in training
    return (
        a.requires_grad_(),
        b.requires_grad_(),
        torch.tensor(scale).requires_grad_(),
        torch.tensor(-10.0).requires_grad_(),
    )


def step(loss: Contestant, arguments: tuple[Tensor, ...]) -> float:
    for x in arguments:
        x.grad = None
    start = time.process_time()
    loss(*arguments).backward()
    return time.process_time() - start


def peak_mebibytes(name: str, n: int, dim: int, threads: int) -> float:
    """Growth of the peak resident set of this process over one step; to be called in a fresh process."""
    torch.set_num_threads(threads)
    loss = contestants()[name]
    step(loss, inputs(min(n // 16, 512), dim, 20.0))  # loads kernels and thread pools; its pages are small
    arguments = inputs(n, dim, 20.0)
    before = kibibytes("VmRSS")
    step(loss, arguments)
    return (kibibytes("VmHWM") - before) / 1024


def kibibytes(field: str) -> int:
    """A line of this process's status. (getrusage's maximum is inherited from the parent over fork and exec.)"""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def peak_in_subprocess(name: str, n: int, dim: int, threads: int) -> float:
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        name,
        "--n",
        str(n),
        "--dim",
        str(dim),
        "--threads",
        str(threads),
    ]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(peak_mebibytes(options.memory_of, options.n, options.dim, options.threads)))
        return
    torch.set_num_threads(options.threads)
    losses, arguments = contestants(), inputs(options.n, options.dim, options.scale)
    for loss in losses.values():
        step(loss, inputs(512, options.dim, options.scale))
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(options.rounds):
        for name, loss in losses.items():
            seconds[name].append(step(loss, arguments))
    print(
        f"torch {torch.__version__}, {options.threads} thread(s), "
        f"N={options.n}, D={options.dim}, scale {options.scale:g}"
    )
    pairs = (("mmrep info_nce", "open_clip ClipLoss"), ("mmrep siglip", "open_clip SigLipLoss"))
    for ours, theirs in pairs:
        ratios = sorted(x / y for x, y in zip(seconds[ours], seconds[theirs], strict=True))
        medians = statistics.median(seconds[ours]), statistics.median(seconds[theirs])
        print(
            f"{ours} / {theirs}: time {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}; "
            f"{medians[0]:.2f} s / {medians[1]:.2f} s)",
            flush=True,
        )
    for ours, theirs in pairs:
        peaks = [peak_in_subprocess(name, options.n, options.dim, options.threads) for name in (ours, theirs)]
        print(
            f"{ours} / {theirs}: peak {peaks[0] / peaks[1]:.3f} ({peaks[0]:.0f} MiB / {peaks[1]:.0f} MiB)", flush=True
        )


if __name__ == "__main__":
    main()
