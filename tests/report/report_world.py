"""A small made-up run: coloured squares with captions, and noisy vectors whose pairs nearly meet."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mmrep.data.sample import Sample
from mmrep.evaluate.encoded import EncodedSet
from mmrep.report import PairSet


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def make_encoded(n=30, *, noise=0.5, seed=0, captions=None, groups=None, dim=16):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, dim))
    samples = []
    for i in range(n):
        color = tuple(int(c) for c in rng.integers(0, 256, 3))
        caption = captions[i % len(captions)] if captions else f"square number {i}"
        fields = {"caption": caption, "image": Image.new("RGB", (80, 50), color), "note": f"a note on {i}"}
        samples.append(Sample(f"s{i}", fields, group=None if groups is None else groups[i]))
    return EncodedSet(
        samples=samples,
        embeddings={name: unit(base + noise * rng.normal(size=base.shape)) for name in ("caption", "image", "note")},
        present={name: np.ones(n, dtype=bool) for name in ("caption", "image", "note")},
    )


def make_pairs(n=30, *, fields=("caption", "image"), name="held out", encoded=None, **options):
    encoded = encoded or make_encoded(n, **options)
    return PairSet(name=name, encoded=encoded, fields=fields, preview=lambda field, raw: raw)


def make_metrics(steps=60):
    rng = np.random.default_rng(1)
    lines = []
    for step in range(1, steps + 1):
        loss = float(3 * np.exp(-step / 20) + 0.1 * rng.normal())
        lines.append(
            {
                "step": step,
                "loss": loss,
                "contrastive/loss": loss,
                "lr": 1e-3 * (1 - step / steps),
                "grad_norm": float(rng.random()),
                "epoch": step // 10,
                "samples_per_second": 900.0,
            }
        )
        if step % 20 == 0:
            lines.append({"step": step, "eval/new/caption→image/R@5": step / 100, "eval/new/image→caption/R@5": 0.1})
    return lines


def make_evaluations():
    rows = []
    for direction in ("caption→image", "image→caption"):
        for who, r1, r5, rank in (
            ("model", 0.2, 0.42, 8.0),
            ("untrained", 0.01, 0.03, 140.0),
            ("chance", 0.005, 0.02, 150.0),
        ):
            rows.append({"who": who, "direction": direction, "R@1": r1, "R@5": r5, "median_rank": rank, "items": 300.0})
    return {"new": {"type": "retrieval", "data": "test", "rows": rows}}
