"""What ``mmrep merge`` and ``mmrep sweep`` do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmrep.config import ConfigError
from mmrep.finetune.delta import fuse_by_delta
from mmrep.finetune.merge import add_task_vectors, interpolate, soup
from mmrep.finetune.position import learn_coefficients_on
from mmrep.finetune.sweep import sweep as measure
from mmrep.finetune.sweep import write_sweep
from mmrep.hub.load import load
from mmrep.hub.start import model_folder
from mmrep.model import Model
from mmrep.recipe import read_recipe
from mmrep.results import results_markdown
from mmrep.run import Run, open_run
from mmrep.temperature import Temperature


def merge(
    models: Sequence[str], out: Path, *, alpha: float | None, base: str | None, scale: Sequence[float],
    by_delta: bool = False, learn: str | None = None, steps: int | None = None,
) -> str:  # fmt: skip
    """Merge saved models into a folder; returns what was done.

    Raises:
        ConfigError: options that do not go together, a folder that is there, or models that cannot be merged.
    """
    problems = []
    if out.exists():
        problems.append(f"--out: {out} exists already; it is not overwritten")
    if alpha is not None and base is not None:
        problems.append("--alpha interpolates two models and --base adds task vectors: give one of them")
    elif alpha is not None and len(models) != 2:
        problems.append(f"--alpha: interpolates two models, got {len(models)}; leave it out for the mean of all")
    elif base is None and len(models) < 2:
        problems.append("merge: name two models at least, or --base")
    if by_delta and (base is None or scale):
        problems.append("--by-delta: goes with --base, from which the models moved, and finds the scales itself")
    if learn is not None and (base is None or scale or by_delta):
        problems.append("--learn: goes with --base, from which the models moved, and finds the scales itself")
    if steps is not None and (learn is None or steps < 1):
        problems.append(f"--steps: 1 or more, with --learn; got {steps}")
    if base is None and scale:
        problems.append("--scale: goes with --base")
    if base is not None and scale and len(scale) != len(models):
        problems.append(f"--scale: {len(scale)} for {len(models)} models; give one for each, in their order")
    if problems:
        raise ConfigError(problems)
    named = " ".join(models)
    loaded = [_load(name) for name in models]
    if alpha is not None:
        merged, how = interpolate(loaded[0], loaded[1], alpha), f"{named} --alpha {alpha:g}"
    elif base is not None and by_delta:
        merged, how = fuse_by_delta(_base(base, loaded[0]), loaded), f"{named} --base {base} --by-delta"
    elif base is not None and learn is not None:
        run, start = Run(read_recipe(learn, [f"start={base}"])), _base(base, loaded[0])
        found = learn_coefficients_on(run, start, loaded, steps=steps or 100)
        merged = add_task_vectors(start, loaded, found)
        how = f"{named} --base {base} " + " ".join(f"--scale {value:.4g}" for value in found)
    elif base is not None:
        scales = list(scale) or [1 / len(models)] * len(models)
        merged = add_task_vectors(_base(base, loaded[0]), loaded, scales)
        how = f"{named} --base {base} " + " ".join(f"--scale {value:g}" for value in scales)
    else:
        merged, how = soup(loaded), named
    merged.save_pretrained(out, model_card_kwargs={"recipe": f"mmrep merge {how}"})
    return f"{how} → {out}"


def sweep(start: str, run: Path, names: list[str] | None, steps: int, out: Path) -> str:
    """Measure the points between two models; returns the results as text.

    Raises:
        ConfigError: no such model, run or evaluation, or fewer than one step.
    """
    if steps < 1:
        raise ConfigError([f"--steps: 1 or more, got {steps}"])
    opened = open_run(run)
    points = measure(opened, _load(start), alphas=[i / steps for i in range(steps + 1)], evaluations=names)
    page = write_sweep(points, out, about=f"{start} (alpha 0) and {run} (alpha 1).")
    text = [f"## alpha {point.alpha:g}\n\n{results_markdown(point.results)}" for point in points]
    return "\n\n".join([*text, str(page)])


def _base(name: str, tuned: Model) -> Model:
    """What a model was tuned from. Another library's encoder has no temperature: it is that of the run's beginning."""
    base = _load(name)
    new = {key: value for key, value in tuned.config.temperatures.items() if key not in base.temperatures}
    for key, config in new.items():
        base.temperatures[key] = Temperature(config).to(base.device)
    base.config = replace(base.config, temperatures={**base.config.temperatures, **new})
    return base


def _load(name: str) -> Model:
    return load(model_folder(name))
