"""A run folder as the data of a report."""

from __future__ import annotations

import json
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmrep.report.data import PairSet, ReportData
from mmrep.report.page import write_report

if TYPE_CHECKING:
    from mmrep.run import Run

_PACKAGES = ("mmrep", "torch", "torchvision", "accelerate", "transformers", "open_clip_torch", "timm", "datasets",
             "safetensors", "numpy", "pillow", "scikit-learn", "faiss-cpu")  # fmt: skip


def report_run(folder: Path | str, out: Path | None = None) -> Path:
    """Write the page of a run folder.

    Args:
        folder: the run folder.
        out: the file; ``report.html`` in the run folder if it is not given.

    Raises:
        ConfigError: the folder holds no run.
    """
    from mmrep.run import open_run

    run = open_run(folder)
    return write_report(read_run(run), out or Path(folder) / "report.html")


def read_run(run: Run) -> ReportData:
    """Read what a run wrote, and embed the held-out sources that its evaluations compare two fields of.

    Files that the run has not written (yet) are left out.

    Raises:
        ValueError: a line of a file is not JSON; the message names the file and the line.
    """
    assert run.folder is not None, "a dry run has nothing to report"
    folder = run.folder
    evaluation = folder / "evaluation.json"
    return ReportData(
        title=folder.resolve().name,
        about=run.recipe.about,
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        versions=versions(),
        metrics=_lines(folder / "metrics.jsonl"),
        evaluations=json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else {},
        quarantined=_causes(folder / "quarantine.jsonl"),
        temperatures=_temperatures(run),
        sets=_sets(run),
    )


def versions() -> dict[str, str]:
    """Python, the platform and the packages that a result depends on, as installed here."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _sets(run: Run) -> list[PairSet]:
    def preview(field: str, raw: Any) -> Any:
        return run.model.tower(run.recipe.data.fields[field]).encoder.preview(raw)

    fields = list(run.recipe.data.fields)
    wanted: dict[tuple[str, frozenset[str]], tuple[str, str]] = {}
    for chosen in run.recipe.evaluations.values():
        source, between = getattr(chosen.config, "data", None), getattr(chosen.config, "between", None)
        # A fusion has no raw value of its own to show; its figures stand in the tables.
        if source is not None and between is not None and set(between) <= set(fields):
            wanted.setdefault((source, frozenset(between)), tuple(between))
    if not wanted and len(fields) > 1:  # the first two fields of each source, if no evaluation compares two
        wanted = {(name, frozenset(fields[:2])): (fields[0], fields[1]) for name in run.recipe.data.evaluation}
    return [
        PairSet(name=name, encoded=run.encoded(name), fields=between, preview=preview)
        for (name, _), between in wanted.items()
    ]


def _causes(path: Path) -> dict[str, int]:
    """Distinct samples by cause; several processes may have listed the same one."""
    listed = {(line["id"], line.get("field")): str(line["cause"]) for line in _lines(path)}
    return dict(Counter(listed.values()))


def _temperatures(run: Run) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name in run.model.temperatures:
        temperature = cast(Any, run.model.temperatures[name])
        found[name] = {"scale": float(temperature.scale.detach())}
        if temperature.bias is not None:
            found[name]["bias"] = float(temperature.bias.detach())
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """A JSON-lines file, or nothing if it is absent. A last line without its newline was cut by a kill: skipped."""
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    read: list[dict[str, Any]] = []
    for number, line in enumerate(whole, 1):
        try:
            read.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    return read
