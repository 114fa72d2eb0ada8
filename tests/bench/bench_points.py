"""Time of farthest point sampling and patches of nearest points against plain Python loops.

Run:  python tests/bench/bench_points.py [--rounds 9] [--batch 32] [--points 1024] [--groups 64] [--neighbors 32]

One loop takes cloud after cloud, centre after centre and point after point, in Python alone; the other takes clouds and
centres so, and the points of a cloud by operations of torch. Times are process CPU time of paired runs, interleaved in
one process; the shares of indices that agree are printed too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mmrep.modalities.point_cloud.grouping import farthest_points, gather, nearest


def ours(points: Tensor, groups: int, k: int) -> tuple[Tensor, Tensor]:
    valid = torch.ones(points.shape[:2], dtype=torch.bool)
    centres = farthest_points(points, valid, groups)
    return centres, nearest(gather(points, centres), points, valid, k)


def loop_over_clouds(points: Tensor, groups: int, k: int) -> tuple[Tensor, Tensor]:
    chosen, members = [], []
    for cloud in points:
        gap = ((cloud - cloud.mean(0)) ** 2).sum(1)
        centres = [int(gap.argmax())]
        gap = ((cloud - cloud[centres[0]]) ** 2).sum(1)
        while len(centres) < groups:
            centres.append(int(gap.argmax()))
            gap = torch.minimum(gap, ((cloud - cloud[centres[-1]]) ** 2).sum(1))
        chosen.append(torch.tensor(centres))
        near = [((cloud - cloud[c]) ** 2).sum(1).topk(k, largest=False).indices for c in centres]
        members.append(torch.stack(near))
    return torch.stack(chosen), torch.stack(members)


def loop_over_points(points: Tensor, groups: int, k: int) -> tuple[Tensor, Tensor]:
    chosen, members = [], []
    for cloud in points.tolist():
        centroid = [sum(axis) / len(cloud) for axis in zip(*cloud, strict=True)]
        gaps = [math.dist(p, centroid) for p in cloud]
        centres = [max(range(len(cloud)), key=gaps.__getitem__)]
        gaps = [math.dist(p, cloud[centres[0]]) for p in cloud]
        while len(centres) < groups:
            centres.append(max(range(len(cloud)), key=gaps.__getitem__))
            gaps = [min(gap, math.dist(p, cloud[centres[-1]])) for gap, p in zip(gaps, cloud, strict=True)]
        chosen.append(centres)
        members.append([sorted(range(len(cloud)), key=[math.dist(p, cloud[c]) for p in cloud].__getitem__)[:k]
                        for c in centres])  # fmt: skip
    return torch.tensor(chosen), torch.tensor(members)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--neighbors", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    print(f"torch {torch.__version__}, {o.threads} thread(s), {o.points} points, {o.groups} groups of {o.neighbors}")
    for loop, batch in (
        (loop_over_points, o.batch),
        (loop_over_points, 1),
        (loop_over_clouds, o.batch),
        (loop_over_clouds, 1),
    ):
        points = torch.randn(batch, o.points, 3, generator=torch.Generator().manual_seed(0))
        first, second = ours(points, o.groups, o.neighbors), loop(points, o.groups, o.neighbors)
        agree = [
            (a.sort(-1).values == b.sort(-1).values).float().mean().item() for a, b in zip(first, second, strict=True)
        ]
        times = [
            [seconds(lambda f=f, p=points: f(p, o.groups, o.neighbors)) for f in (ours, loop)] for _ in range(o.rounds)
        ]
        ratios = sorted(slow / fast for fast, slow in times)
        fast, slow = (statistics.median(t) for t in zip(*times, strict=True))
        print(f"{loop.__name__}, {batch} cloud(s): {statistics.median(ratios):.1f} times as long as mmrep "
              f"({ratios[0]:.1f} to {ratios[-1]:.1f}; {1000 * slow:.1f} ms / {1000 * fast:.1f} ms); "
              f"same centres {agree[0]:.4f}, neighbours {agree[1]:.4f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
