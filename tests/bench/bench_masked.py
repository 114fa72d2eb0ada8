"""What it costs to encode a quarter of the tokens, forward and backward, beside all of them and beside the ideal.

    python -m tests.bench.bench_masked

The ideal is the count of multiply-adds: the products of a block grow with the number of tokens, attention with its
square. Rounds are interleaved; the ratio is that of CPU time, median over rounds, with the lowest and highest.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from mmrep.config import component


def ideal(kept: int, total: int, width: int, depth: int, patch: int) -> float:
    """Share of the multiply-adds: patches of all tokens are embedded, blocks see the kept ones."""

    def blocks(n: int) -> float:
        return depth * (12 * n * width**2 + 2 * n**2 * width)

    embed = total * width * 3 * patch**2
    return (embed + blocks(kept)) / (embed + blocks(total))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("width", 384), ("depth", 6), ("heads", 6), ("batch", 16), ("rounds", 7), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    size, patch = 224, 16
    encoder = component(
        "encoders", "image-vit", size=size, patch=patch, width=o.width, depth=o.depth, heads=o.heads, class_token=False
    ).build()
    inputs = {"pixels": torch.randint(0, 256, (o.batch, 3, size, size), dtype=torch.uint8)}
    total = (size // patch) ** 2
    mask = component("masks", "random", ratio=0.75).build()

    def step(masked: bool) -> float:
        encoder.zero_grad(set_to_none=True)
        begin = time.process_time()
        tokens = encoder.tokenize(inputs)
        keep = mask(tokens.grid, torch.arange(o.batch)).visible[:, 0] if masked else None
        encoder.encode(tokens, keep).tokens.values.sum().backward()
        return time.process_time() - begin

    for masked in (True, False):
        step(masked)
    ratios: list[float] = []
    for _ in range(o.rounds):
        part, whole = step(True), step(False)
        ratios.append(part / whole)
    best = ideal(total // 4, total, o.width, o.depth, patch)
    middle = statistics.median(ratios)
    print(f"75 % masked: {middle:.3f} of the whole ({min(ratios):.3f}-{max(ratios):.3f}); ideal {best:.3f}; "
          f"{middle / best:.2f} times the ideal")  # fmt: skip


if __name__ == "__main__":
    main()
