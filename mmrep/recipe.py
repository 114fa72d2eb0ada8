"""A recipe: a commented YAML that names data, model, objectives, optimisation and evaluations.

``extends: <recipe or path>`` starts from another recipe; mappings merge key by key, anything else replaces. A recipe
of the library is named (``quickstart``); one's own is a path (``./mine.yaml``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from mmrep._recipe_files import recipe_names, recipe_text, resolve
from mmrep.collapse import CollapseConfig
from mmrep.config import Component, ConfigError, Of, config, dump, merge, override, parse
from mmrep.guard import GuardConfig
from mmrep.hub.start import saved_config
from mmrep.methods import MethodClaim
from mmrep.model import ModelConfig
from mmrep.registry import near
from mmrep.teacher import TeacherConfig
from mmrep.training.optim import OptimConfig
from mmrep.training.trainer import TrainConfig

__all__ = ["DataConfig", "Recipe", "read_recipe", "recipe_json", "recipe_names", "recipe_text", "write_recipe"]

SMOKE = {"train": {"steps": 4, "epochs": None, "batch_size": 16, "workers": 0, "eval_every": None, "log_every": 1},
         "guard": None}  # fmt: skip
"""What ``--smoke`` lays over any recipe; sources are cut to `SMOKE_SAMPLES` as well."""
SMOKE_SAMPLES = 48


@config
class DataConfig:
    """What is read.

    train: the training source. fields: tower by column; a column that is not named is not read. views: per field, one
    or more random readings. evaluation: held-out sources by name. max_bad: share of unreadable samples past which the
    run stops. cache: keep prepared samples in memory.

    Which training samples share a batch: distinct_groups: never two of one ``group``. bucket_by: those in which this
    field has a similar length, so that little is padded. lengths: column that holds these lengths; null = measure them
    when the run starts. max_tokens: with bucket_by, samples times longest of a batch at most; ``train.batch_size`` is
    then the most samples.

    drop: by field, the probability that a training sample's value is treated as missing (modality dropout); something
    of each sample always stays. features: a folder in which the features of frozen towers are kept from run to run,
    by encoder, preprocessing and content; null = ``features`` in the run's folder, which only a resumed run reads, and
    of 2 GiB at most for each process.
    """

    train: Annotated[Component, Of("sources")]
    fields: dict[str, str]
    views: Annotated[dict[str, list[Component]], Of("views")] = field(default_factory=dict)
    evaluation: Annotated[dict[str, Component], Of("sources")] = field(default_factory=dict)
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.05
    cache: bool = False
    distinct_groups: bool = False
    bucket_by: str | None = None
    lengths: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    drop: dict[str, Annotated[float, Field(ge=0, lt=1)]] = field(default_factory=dict[str, float])
    features: str | None = None

    def __post_init__(self) -> None:
        problems = [
            f"data.{name}: means something only with data.bucket_by, which names the field that is measured"
            for name in ("lengths", "max_tokens")
            if self.bucket_by is None and getattr(self, name) is not None
        ]
        if self.bucket_by is not None and self.bucket_by not in self.fields:
            hint = near(self.bucket_by, self.fields)
            problems.append(f"data.bucket_by: unknown field {self.bucket_by!r}{hint} Fields: {', '.join(self.fields)}")
        for name in self.drop:
            if name not in self.fields:
                hint = near(name, self.fields)
                problems.append(f"data.drop.{name}: unknown field{hint or '.'} Fields: {', '.join(self.fields)}")
        if problems:
            raise ConfigError(problems)


@config
class Recipe:
    """The resolved recipe.

    about: one line on what it is. methods: which published methods it is, for `mmrep methods`. evaluations: what is
    measured at the end, by name. monitor: which of them also run
    every ``train.eval_every`` steps; they should read validation data, never the test. guard: one of them that must not
    fall, or the run ends. average: decay of a moving
    average of the weights, which is then what is evaluated and saved. start: a saved model (folder or hub id) to begin
    from: towers, temperatures and fusions of its names begin with its weights, and what ``model`` does not say of them
    is taken from it, so that ``model`` need only name what is new or differs.
    """

    data: DataConfig
    model: ModelConfig
    objectives: Annotated[list[Component], Of("objectives")]
    train: TrainConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluations: Annotated[dict[str, Component], Of("evaluations")] = field(default_factory=dict)
    monitor: list[str] = field(default_factory=list)
    average: Annotated[float, Field(gt=0, lt=1)] | None = None
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    collapse: CollapseConfig | None = field(default_factory=CollapseConfig)
    guard: GuardConfig | None = None
    start: str | None = None
    about: str = ""
    methods: list[MethodClaim] = field(default_factory=list[MethodClaim])

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.objectives:
            problems.append("objectives: at least one is needed")
        towers = self.model.towers
        modalities = [getattr(tower.encoder.cls, "modality", None) for tower in towers.values()]
        for column, name in self.data.fields.items():
            if name not in towers and modalities.count(name) != 1:
                problems.append(
                    f"data.fields.{column}: no tower {name!r}{near(name, towers)} Towers: {', '.join(towers)}"
                )
        problems += [
            f"model.fusions.{name}: a field of data.fields has this name" for name in self.model.fusions
            if name in self.data.fields
        ]  # fmt: skip
        for column in self.data.views:
            if column not in self.data.fields:
                problems.append(
                    f"data.views.{column}: unknown field{near(column, self.data.fields)} "
                    f"Fields: {', '.join(self.data.fields)}"
                )
        for name in self.monitor:
            if name not in self.evaluations:
                problems.append(
                    f"monitor: unknown {name!r}{near(name, self.evaluations)} "
                    f"Evaluations: {', '.join(self.evaluations)}"
                )
        if self.guard is not None:
            if self.guard.evaluation not in self.evaluations:
                hint = f"{near(self.guard.evaluation, self.evaluations)} Evaluations: {', '.join(self.evaluations)}"
                problems.append(f"guard.evaluation: unknown {self.guard.evaluation!r}{hint}")
            if self.train.eval_every is None:
                problems.append("guard: it looks every train.eval_every steps, which is null")
        for name, chosen in self.evaluations.items():
            for key in ("data", "train", "clean"):
                source = getattr(chosen.config, key, None)
                if source is not None and source not in self.data.evaluation:
                    problems.append(
                        f"evaluations.{name}.{key}: unknown {source!r}{near(source, self.data.evaluation)} "
                        f"data.evaluation has: {', '.join(self.data.evaluation) or 'nothing'}"
                    )
        if problems:
            raise ConfigError(problems)


def read_recipe(name: str | Mapping[str, Any], overrides: Sequence[str] = (), *, smoke: bool = False) -> Recipe:
    """Read a recipe by name or path, lay overrides over it and validate it.

    Args:
        name: name of one of the library's recipes, path of a YAML file or of a run folder, or the plain data itself.
        overrides: ``a.b=value`` from the command line.
        smoke: cut steps and batch so that the recipe only shows that it runs.

    Raises:
        ConfigError: every problem found, with its path.
    """
    data = resolve(name) if isinstance(name, str) else dict(name)
    if smoke:
        data = merge(data, SMOKE)
    for assignment in overrides:
        data = override(data, assignment)
    if data.get("start") is not None and not _is_resolved(name):
        data = {**data, "model": merge(saved_config(str(data["start"])), data.get("model", {}))}
    return parse(Recipe, data)


def _is_resolved(name: str | Mapping[str, Any]) -> bool:
    """Whether this is the config of a run, which has everything and must not need the model that it started from."""
    if not isinstance(name, str):
        return False
    path = Path(name)
    return (path.is_dir() and (path / "config.yaml").is_file()) or path.name == "config.yaml"


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML that `read_recipe` reads back to an equal recipe."""
    path.write_text(yaml.safe_dump(dump(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")


def recipe_json(recipe: Recipe) -> str:
    """The resolved recipe as JSON, for comparing two runs."""
    return json.dumps(dump(recipe), sort_keys=True)
