"""Pretraining without labels against the same encoder untrained, and trained from scratch on the same few labels.

    python -m tests.bench.bench_pretraining mae --seeds 3 [train.steps=600 ...]

For each seed the recipe is trained in a temporary folder and its probes are read. The supervised rival is the recipe's
own encoder and pool with a linear layer, trained by cross entropy with the recipe's views on the labels that the probe
of few labels gets, for so many steps (default 300), and judged on the same held-out samples. Its learning rate is the
better of two by test accuracy, which flatters it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from mmrep.evaluate.suites import few_labels
from mmrep.recipe import read_recipe
from mmrep.run import Run


def supervised(run: Run, field: str, known: str | None, data: str, per_class: int, steps: int, lr: float) -> float:
    """Test accuracy of the encoder trained from scratch on few labels."""
    recipe = run.recipe
    tower = run.untrained().tower(recipe.data.fields[field])
    views = [view.build() for view in recipe.data.views.get(field, [])][:1]
    sides = []
    for source in (run.train_source if known is None else run.source(known), run.source(data)):
        samples = [source[i] for i in range(len(source))]
        sides.append([s for s in samples if s.fields.get(field) is not None])
    labels = [str(s.label) for s in sides[0]]
    chosen = [sides[0][i] for i in few_labels([s.id for s in sides[0]], labels, per_class)]
    classes = sorted(set(labels))
    head = torch.nn.Linear(tower.encoder.width, len(classes))
    optimizer = torch.optim.AdamW([*tower.encoder.parameters(), *head.parameters()], lr=lr, weight_decay=0.05)
    y = torch.tensor([classes.index(str(s.label)) for s in chosen])

    def logits(samples: list, seed: int | None) -> torch.Tensor:
        view = views[0] if views and seed is not None else None
        items = [tower.encoder.prepare(s.fields[field], view=view, seed=(seed or 0) + i) for i, s in enumerate(samples)]
        inputs = tower.encoder.collate(items)
        if view is not None:
            inputs, _ = view.batch(inputs, torch.arange(len(samples)) + (seed or 0))
        return head(tower.pool(tower.encoding(inputs)))

    tower.train()
    for step in range(steps):
        rows = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(step))[:64].tolist()
        loss = F.cross_entropy(logits([chosen[i] for i in rows], seed=1 + 1000 * step), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tower.eval()
    with torch.no_grad():
        guess = [logits(sides[1][i : i + 256], None).argmax(1) for i in range(0, len(sides[1]), 256)]
    answers = [str(s.label) for s in sides[1]]
    return statistics.mean(classes[int(g)] == a for g, a in zip(torch.cat(guess), answers, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of the supervised rival")
    o = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    seconds = []
    for seed in range(o.seeds):
        recipe = read_recipe(o.recipe, [*o.overrides, f"train.seed={seed}"])
        with tempfile.TemporaryDirectory() as folder:
            run = Run(recipe, Path(folder) / "run")
            begin = time.process_time()
            results = run.train()
            seconds.append(time.process_time() - begin)
            for name, result in results.items():
                for row in result["rows"]:
                    found.setdefault(f"{name}, {row['who']}", []).append(row["accuracy"])
            for name, chosen in recipe.evaluations.items():
                config = chosen.config
                if getattr(config, "per_class", None):
                    rivals = [
                        supervised(Run(recipe), config.field, config.train, config.data, config.per_class, o.steps, lr)
                        for lr in (1e-3, 3e-4)
                    ]  # fmt: skip
                    found.setdefault(f"{name}, supervised from scratch", []).append(max(rivals))
        told = (f"{name} {100 * values[-1]:.1f}" for name, values in found.items())
        print(f"seed {seed}: {'; '.join(told)}", flush=True)
    for name, values in found.items():
        spread = f" ({100 * min(values):.1f}-{100 * max(values):.1f})" if len(values) > 1 else ""
        print(f"{o.recipe}: {name}: {100 * statistics.mean(values):.1f}{spread}")
    print(f"{o.recipe}: {statistics.mean(seconds):.0f} s of CPU a run")


if __name__ == "__main__":
    main()
