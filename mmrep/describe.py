"""Words for people: the dry run, the result table, the environment."""

from __future__ import annotations

import io
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
import yaml
from rich.console import Console
from rich.table import Table

from mmrep.config import dump
from mmrep.sizes import sizes
from mmrep.training.optim import parameter_groups

if TYPE_CHECKING:
    from mmrep.results import Results
    from mmrep.run import Run

_PACKAGES = (
    "mmrep", "torch", "torchvision", "torchaudio", "transformers", "open_clip_torch", "timm", "datasets", "accelerate",
    "sentencepiece", "huggingface_hub", "numpy", "pydantic", "faiss-cpu",
)  # fmt: skip
_COUNTS = ("ties", "queries", "excluded", "items", "classes")


def describe(run: Run) -> str:
    """The resolved recipe, the shapes that flow, what each tower has and how fast it moves; nothing is kept."""
    recipe = run.recipe
    model = run.untrained()
    root = run.root(model)
    groups = parameter_groups(
        root, recipe.optim.weight_decay, recipe.optim.no_decay, layer_decay=recipe.optim.layer_decay,
        groups=recipe.optim.groups,
    )  # fmt: skip
    model.eval()
    lines = [yaml.safe_dump(dump(recipe), sort_keys=False, allow_unicode=True).rstrip(), ""]
    source = run.train_source
    size = "a stream" if source.streaming else f"{len(source)} samples"
    lines.append(f"data.train: {size}, fields {', '.join(recipe.data.fields)}")
    for name in model.towers:
        tower = model.tower(name)
        items = [tower.encoder.prepare(raw) for raw in tower.encoder.examples(2, seed=0)]
        inputs = tower.encoder.collate(items)
        with torch.no_grad():
            encoding = tower.encoding(inputs)
            out = tower.project(tower.pool(encoding))
        shapes = ", ".join(f"{k} {_shape(v)}" for k, v in inputs.items())
        lines.append(f"tower {name}: {shapes} → tokens {_shape(encoding.tokens.values)} → embedding {_shape(out)}")
    return "\n".join([*lines, *sizes(model, groups, recipe.optim.lr)])


def results_table(results: Results) -> str:
    """The results as one terminal table per evaluation."""
    out = io.StringIO()
    console = Console(file=out, width=110)
    for name, result in results.items():
        keys = [k for k in result["rows"][0] if k not in ("who", "direction", *_COUNTS)]
        first = result["rows"][0]
        counted = ", ".join(f"{first[k]:g} {k}" for k in _COUNTS if k in first and k not in ("ties", "excluded"))
        table = Table(title=f"{name}: {counted}", title_justify="left", title_style="bold")
        directed = "direction" in first
        for head in (*(("direction",) if directed else ()), "who"):
            table.add_column(head)
        for key in keys:
            table.add_column(key, justify="right")
        previous = None
        for row in result["rows"]:
            if directed and previous not in (None, row["direction"]):
                table.add_section()
            cells = [_figure(row.get(k), k) for k in keys]
            lead = [row["direction"] if row["direction"] != previous else ""] if directed else []
            table.add_row(*lead, row["who"], *cells, style="bold" if row["who"] == "model" else None)
            previous = row.get("direction")
        console.print(table)
    return out.getvalue().rstrip()


def environment() -> dict[str, str]:
    """Versions and machine."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cpu"] = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    found["gpu"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"
    return found


def _shape(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)}"


def _figure(value: float | None, key: str) -> str:
    if value is None:
        return ""
    if key.startswith(("R@", "true_recall", "top", "accuracy", "mean_per_class")):
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
