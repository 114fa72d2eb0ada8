"""Which objective captures what: a world with known shared, pairwise, unique and synergistic bits.

    python tests/bench/bench_synthetic.py [--steps 400] [--seeds 3]

Three fields hold 4 bits that all have, 2 bits for each pair, 2 bits of their own, and 2 bits each of which the third's
are the parity (XOR) of the first two's: no pair tells anything of them, all three together do. Each objective trains
the same small towers; then a linear probe reads each kind of bit from the embeddings of held-out samples. 50 % is
chance. Printed as a Markdown table: mean accuracy of a bit over fields and seeds, with the lowest and highest seed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from mmrep.data.synthetic import Synthetic
from mmrep.evaluate.encoded import encode_source
from mmrep.recipe import read_recipe
from mmrep.run import Run

FIELDS = ["m0", "m1", "m2"]
DIMS = {"all kinds": 12, "parity alone": 6}  # few, so that an objective must choose what it keeps
WORLD = {"type": "synthetic", "fields": 3, "width": 32}
WORLDS = {
    "all kinds": {**WORLD, "shared": 4, "pairwise": 2, "unique": 2, "synergy": 2},
    "parity alone": {**WORLD, "shared": 0, "pairwise": 0, "unique": 2, "synergy": 3, "label": None},
}
PAIRS = {"type": "contrastive", "edges": {"of": FIELDS}}


def tuples(loss: Any, scale: str, **options: Any) -> dict[str, Any]:
    return {"type": "tuples", "tuples": [{"of": FIELDS, "temperature": scale, **options}], "loss": loss}


OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "all pairs (InfoNCE)": [PAIRS],
    "star from m0 (InfoNCE)": [{"type": "contrastive", "edges": {"of": FIELDS, "shape": "star"}}],
    "GRAM (anchor m2)": [tuples("gram", "tuple", anchor="m2")],
    "TRIANGLE (anchor m2)": [tuples("triangle", "tuple", anchor="m2")],
    "centroid of the others": [tuples("centroid", "default")],
    "Symile": [tuples("symile", "symile")],
    "Symile + all pairs": [tuples("symile", "symile"), PAIRS],
    "fusion of two against the third": [
        {"type": "contrastive", "name": f"without-{name}", "pairs": [{"between": [f"without_{name}", name]}]}
        for name in FIELDS
    ],
}


def recipe(title: str, objectives: list[dict[str, Any]], seed: int, steps: int) -> dict[str, Any]:
    world = WORLDS[title]
    encoder = {"type": "features", "inputs": WORLD["width"], "width": 64, "hidden": 128}
    others = {name: {other: other for other in FIELDS if other != name} for name in FIELDS}
    fusion = {"type": "transformer", "heads": 2}
    return {
        "data": {"train": {**world, "seed": seed}, "fields": {name: name for name in FIELDS}},
        "model": {
            "dim": DIMS[title],
            "towers": {name: {"encoder": encoder} for name in FIELDS},
            "temperatures": {
                "default": {"scale": 10.0},
                "tuple": {"scale": 10.0},
                "symile": {"scale": 40.0, "max_scale": 1000.0},
            },
            "fusions": {f"without_{name}": {"of": of, "by": fusion} for name, of in others.items()},
        },
        "objectives": objectives,
        "train": {"steps": steps, "batch_size": 256, "workers": 0, "seed": seed, "precision": "fp32",
                  "save_every": None, "log_every": steps},
        "optim": {"lr": 3e-3, "weight_decay": 0.01},
        "collapse": None,
    }  # fmt: skip


def probe(train: np.ndarray, test: np.ndarray, labels: np.ndarray, answers: np.ndarray, bits: int) -> float:
    """Mean accuracy, over the bits of a label, of a logistic regression on embeddings."""
    hits = []
    for bit in range(bits):
        x, y = labels >> bit & 1, answers >> bit & 1
        hits.append(LogisticRegression(max_iter=500).fit(train, x).score(test, y))
    return float(np.mean(hits))


def measure(title: str, objectives: list[dict[str, Any]] | None, seed: int, steps: int) -> dict[str, float | None]:
    """Probe accuracies by kind of information; None measures the untrained towers."""
    world = WORLDS[title]
    with tempfile.TemporaryDirectory() as folder:
        run = Run(read_recipe(recipe(title, objectives or [PAIRS], seed, steps)), Path(folder) / "run")
        if objectives is not None:
            run.train()
        model = run.untrained() if objectives is None else run.model
        fields = {key: value for key, value in world.items() if key != "type"} | {"seed": seed, "size": 2048}
        worlds = [Synthetic(Synthetic.Config(**fields, split=split)) for split in ("validation", "test")]
        train, test = (encode_source(model, source, {name: name for name in FIELDS}) for source in worlds)

    def read(field: str, label: str, bits: int) -> float:
        labels, answers = (np.array(source.column(label)) for source in worlds)
        return probe(train.embeddings[field], test.embeddings[field], labels, answers, bits)

    pairs = [(f"m{f}", f"pair_{i}_{j}") for i, j in combinations(range(3), 2) for f in (i, j)]
    where = {
        "shared": [(name, "shared") for name in FIELDS],
        "pairwise": pairs,
        "unique": [(f"m{i}", f"unique_{i}") for i in range(3)],
        "synergy": [("m2", "synergy")],
    }
    return {
        kind: float(np.mean([read(*place, world[kind]) for place in places])) if world[kind] else None
        for kind, places in where.items()
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=400)
    arguments.add_argument("--seeds", type=int, default=3)
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    kinds = ["shared", "pairwise", "unique", "synergy"]
    for title, world in WORLDS.items():
        print(f"\n{title}: {', '.join(f'{kind} {world[kind]}' for kind in kinds)} bits\n")
        print(
            "| objective | shared by all | by two | unique | synergy (XOR) | seconds a run |\n|---|---|---|---|---|---|"
        )
        for name, objectives in {"untrained": None, **OBJECTIVES}.items():
            start = time.perf_counter()
            found = [measure(title, objectives, seed, chosen.steps) for seed in range(chosen.seeds)]
            seconds = (time.perf_counter() - start) / chosen.seeds
            print(f"| {name} | {' | '.join(cell([f[k] for f in found]) for k in kinds)} | {seconds:.1f} |", flush=True)


def cell(values: list[float | None]) -> str:
    """Mean (lowest to highest), in percent."""
    known = [100 * value for value in values if value is not None]
    return f"{np.mean(known):.0f} ({min(known):.0f}-{max(known):.0f}) %" if known else "none"


if __name__ == "__main__":
    main()
