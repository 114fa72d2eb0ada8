"""What cleans a poisoned model: attack success and clean accuracy before, after plain fine-tuning and after CleanCLIP.

    python -m tests.bench.bench_backdoor --seeds 3 [train.steps=100 ...]

Each seed poisons a model by the recipe ``backdoor`` and fine-tunes it twice on the same clean part of the data by the
recipe ``cleanclip``: with its image-text contrast alone (what CLIP would do), and with all of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

PLAIN = "objectives=[{type: contrastive, pairs: [{between: [image, caption]}]}]"
WAYS = {"poisoned": None, "CLIP on clean pairs": [PLAIN], "CleanCLIP": []}


def run(seed: int, folder: Path, overrides: list[str]) -> dict[str, dict[str, float]]:
    """The model's row of ``attack`` by way; overrides are of the fine-tuning."""
    import torch

    from mmrep.recipe import read_recipe
    from mmrep.run import Run

    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for way, changes in WAYS.items():
        out, given = folder / way.replace(" ", "-"), [f"train.seed={seed}"]
        if changes is not None:
            given += [f"start={folder / 'poisoned'}", *changes, *overrides]
        recipe = read_recipe("backdoor" if changes is None else "cleanclip", given)
        rows = Run(recipe, out).train()["attack"]["rows"]
        found[way] = next(row for row in rows if row["who"] == "model")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    o = parser.parse_args()
    found: list[dict[str, dict[str, float]]] = []
    for seed in range(o.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(seed, Path(folder), o.overrides))
        print(f"seed {seed}: {found[-1]}", file=sys.stderr, flush=True)
    for way in WAYS:
        cells: list[str] = []
        for figure in ("attack_success", "clean_accuracy"):
            values = [100 * seed[way][figure] for seed in found]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})")
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
