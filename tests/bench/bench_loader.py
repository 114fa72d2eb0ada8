"""What the loader costs, and what batches of similar length save, on ragged captions and small pictures.

Run:  python tests/bench/bench_loader.py [--rounds 5] [--captions 2048] [--pictures 1024] [--batch-size 64]

Three tables. (1) Padding, and unpadded tokens a second through forward and backward of our text transformer: plain
batches, buckets, and a token budget equal to the padded tokens of a mean plain batch and to half of that. (2) Reading
and collating pictures with captions, beside torch's own DataLoader over the same decoding and collation; workers are
started and stopped in each round. (3) Drawing the order of an epoch of a million samples. All figures are CPU time of
this process and of its ended children, contestants interleaved in one process, medians with the range over rounds.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmrep.config import component
from mmrep.data.batching import Batching
from mmrep.data.loader import BatchLoader
from mmrep.data.reader import Reader
from mmrep.data.records import Records
from mmrep.encoder import Encoder

WORDS = "a the of red small dog cat runs over mountain river yesterday photograph window beautiful between".split()


def captions(n: int, seed: int = 0) -> list[str]:
    """Texts of lognormal length, median about 60 bytes, as web captions have."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=1 + int(generator.lognormvariate(2.3, 0.7)))) for _ in range(n)]


def picture(seed: int, size: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def cpu_seconds() -> float:
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def compare(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Figures per contestant and round, interleaved after one warm-up each."""
    for run in contestants.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            found[name].append(run())
    return found


def against(ours: list[float], theirs: list[float]) -> str:
    """Median of the paired ratios, and their range."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def ragged(options: argparse.Namespace) -> None:
    """Table 1."""
    encoder: Encoder = component(
        "encoders", "text-transformer", max_length=256, width=options.width, depth=options.depth, heads=4
    ).build()
    source = Records.from_lists(caption=captions(options.captions))

    def loader(**more: Any) -> BatchLoader:
        return BatchLoader(source, Reader({"caption": encoder}), batch_size=options.batch_size, **more)

    plain = loader()
    budget = int(statistics.mean(batch.inputs["caption"][0]["valid"].numel() for batch in plain))
    most = {"batch_size": options.batch_size * 8, "bucket_by": "caption"}
    loaders = {
        "plain": loader(),
        "bucket_by": loader(bucket_by="caption"),
        "max_tokens, whole": BatchLoader(source, Reader({"caption": encoder}), max_tokens=budget, **most),
        "max_tokens, half": BatchLoader(source, Reader({"caption": encoder}), max_tokens=budget // 2, **most),
    }
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in loaders}

    def epoch(name: str) -> float:
        seconds, tokens = 0.0, 0
        for batch in loaders[name]:
            inputs = batch.inputs["caption"][0]
            start = cpu_seconds()
            encoder(inputs).tokens.values.square().mean().backward()
            seconds += cpu_seconds() - start
            tokens += int(inputs["valid"].sum())
            seen[name].append(inputs["valid"])
        return tokens / seconds

    rates = compare({name: lambda name=name: epoch(name) for name in loaders}, options.rounds)
    print(f"\n(1) text transformer, width {options.width}, depth {options.depth}; {options.captions} captions")
    print("| batches | samples a batch | padding | unpadded tokens/s over plain |\n|---|---|---|---|")
    for name, valid in seen.items():
        padding = 1 - sum(int(v.sum()) for v in valid) / sum(v.numel() for v in valid)
        sizes = [len(v) for v in valid]
        shown = f"{min(sizes)} to {max(sizes)}"
        print(f"| {name} | {shown} | {padding:.1%} | {against(rates[name], rates['plain'])} |", flush=True)


class Decoded(torch.utils.data.Dataset[Any]):
    """The same decoding as the loader's, without anything around it."""

    def __init__(self, source: Records, encoders: dict[str, Encoder]) -> None:
        self.source, self.encoders = source, encoders

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        fields = self.source[index].fields
        return {field: encoder.prepare(fields[field]) for field, encoder in self.encoders.items()}


def overhead(options: argparse.Namespace) -> None:
    """Table 2."""
    n = options.pictures
    source = Records.from_lists(image=[picture(i) for i in range(n)], caption=captions(n))
    encoders: dict[str, Encoder] = {
        "image": component("encoders", "image-cnn", size=64).build(),
        "caption": component("encoders", "text-transformer").build(),
    }

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        return {field: encoder.collate([item[field] for item in items]) for field, encoder in encoders.items()}

    def measured(batches: Iterator[Any]) -> float:
        start = cpu_seconds()
        for _ in batches:
            pass
        return cpu_seconds() - start

    def ours(workers: int, **more: Any) -> Iterator[Any]:
        loader = BatchLoader(source, Reader(encoders), batch_size=options.batch_size, workers=workers, **more)
        yield from loader
        loader.close()

    def theirs(workers: int) -> Iterator[Any]:
        yield from torch.utils.data.DataLoader(
            Decoded(source, encoders), options.batch_size, shuffle=True, drop_last=True, num_workers=workers,
            collate_fn=collate,
        )  # fmt: skip

    print(f"\n(2) {n} pictures of 64 x 64 with captions, batches of {options.batch_size}")
    print("| workers | CPU time of an epoch over torch's DataLoader | same, with bucket_by (measuring included) |")
    print("|---|---|---|")
    for workers in (0, 2):
        found = compare(
            {
                "ours": lambda w=workers: measured(ours(w)),
                "theirs": lambda w=workers: measured(theirs(w)),
                "buckets": lambda w=workers: measured(ours(w, bucket_by="caption")),
            },
            options.rounds,
        )
        ratios = [against(found[name], found["theirs"]) for name in ("ours", "buckets")]
        print(f"| {workers} | {ratios[0]} | {ratios[1]} |", flush=True)


def orders(options: argparse.Namespace) -> None:
    """Table 3."""
    n, batch_size = options.order, 256
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(n, generator=generator) * 0.6 + 2.5).exp().clamp(3, 77).long()
    groups = torch.randint(0, n // 5, (n,), generator=generator)
    ways = {
        "plain": {}, "distinct_groups": {"groups": groups}, "bucket_by": {"lengths": lengths},
        "max_tokens": {"lengths": lengths, "max_tokens": 20 * batch_size},
    }  # fmt: skip
    batchings = {name: Batching(n, batch_size, drop_last=True, **more) for name, more in ways.items()}

    def draw(name: str) -> float:
        start = time.process_time()
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        for batch in batchings[name].batches(order, 1):
            order[batch].tolist()
        return time.process_time() - start

    found = compare({name: lambda name=name: draw(name) for name in ways}, options.rounds)
    print(f"\n(3) the order of an epoch of {n} samples, batches of {batch_size}")
    print("| batches | steps | CPU seconds an epoch | microseconds a sample |\n|---|---|---|---|")
    for name, seconds in found.items():
        median = statistics.median(seconds)
        print(f"| {name} | {batchings[name].steps} | {median:.2f} | {1e6 * median / n:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=2048)
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--order", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.rounds} rounds")
    ragged(options)
    overhead(options)
    orders(options)


if __name__ == "__main__":
    main()
