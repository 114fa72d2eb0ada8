"""From a recipe to a run folder: build, train, evaluate, open again.

A run folder holds ``config.yaml`` (the resolved recipe), ``metrics.jsonl``, ``quarantine.jsonl`` (if any sample was
bad), ``checkpoints/``, ``files/`` (what encoders learned from the data), ``model/`` and ``evaluation.json``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmrep.config import ConfigError, dump
from mmrep.data.limited import Limited
from mmrep.data.loader import BatchLoader
from mmrep.data.quarantine import Quarantine
from mmrep.data.reader import Reader
from mmrep.data.sample import Sample
from mmrep.data.source import Source
from mmrep.evaluate.encoded import EncodedSet, encode_source
from mmrep.evaluate.evaluation import Bench, Row
from mmrep.hub.folder import load
from mmrep.model import Model
from mmrep.objectives.root import Root
from mmrep.recipe import SMOKE_SAMPLES, Recipe, read_recipe, recipe_json, write_recipe
from mmrep.registry import near
from mmrep.training.collectives import world
from mmrep.training.engine import barrier, start_processes
from mmrep.training.trainer import Callback, Trainer
from mmrep.views.view import View

logger = logging.getLogger(__name__)
Results = dict[str, dict[str, Any]]
_FIT_SAMPLES = 100_000
_FITTED = ".fitted"


class Run:
    """A recipe with everything built from it, on demand and once.

    Args:
        recipe: the resolved recipe.
        folder: the run folder, or None for a dry run, which writes nothing.
        smoke: cut every source to a few samples.
    """

    def __init__(self, recipe: Recipe, folder: Path | None = None, *, smoke: bool = False) -> None:
        self.recipe = recipe
        self.folder = folder
        self.smoke = smoke
        self._encoded: dict[str, EncodedSet] = {}

    @cached_property
    def train_source(self) -> Source:
        """The training source, with its columns checked against ``data.fields``."""
        return self._source("data.train", self.recipe.data.train)

    def source(self, name: str) -> Source:
        """A held-out source of ``data.evaluation``."""
        known = self.recipe.data.evaluation
        if name not in known:
            raise ConfigError(
                [f"no held-out source {name!r}{near(name, known)} data.evaluation has: {', '.join(known)}"]
            )
        return self._source(f"data.evaluation.{name}", known[name])

    @cached_property
    def model(self) -> Model:
        """The trained model of the run folder; before training, the untrained one."""
        saved = None if self.folder is None else self.folder / "model"
        return load(saved) if saved is not None and (saved / "config.json").is_file() else self.untrained()

    def untrained(self) -> Model:
        """The model as it is before training: the same seed gives the same weights."""
        files = self._fitted
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.train.seed)
            return Model(self.recipe.model, files=files)

    def encoded(self, name: str) -> EncodedSet:
        """A held-out source, embedded by the model."""
        if name not in self._encoded:
            self._encoded[name] = encode_source(self.model, self.source(name), self.recipe.data.fields)
        return self._encoded[name]

    def evaluate(self, names: list[str] | None = None, model: Model | None = None) -> Results:
        """Run the recipe's evaluations: per name, its type, its source and its rows."""
        chosen = self.recipe.evaluations
        for name in names or ():
            if name not in chosen:
                raise ConfigError([f"no evaluation {name!r}{near(name, chosen)} Evaluations: {', '.join(chosen)}"])
        bench = self._bench(model or self.model)
        results: Results = {}
        for name in names or list(chosen):
            rows: list[Row] = chosen[name].build().run(bench)
            results[name] = {
                "type": chosen[name].type,
                "data": getattr(chosen[name].config, "data", None),
                "rows": rows,
            }
        return results

    def train(self, *, resume: bool = False, command: str = "") -> Results:
        """Train, save the model, evaluate. Every process of a launch calls it.

        Args:
            resume: continue from the newest whole checkpoint of the folder, if there is one.
            command: what was typed, for the model card.

        Returns:
            The evaluation results (empty on all processes but the first).

        Raises:
            ConfigError: the folder holds another recipe's run.
        """
        assert self.folder is not None, "training writes a run folder"
        recipe = self.recipe
        start_processes()
        here = world()
        if here.rank == 0:
            self._claim(resume)
        barrier()
        model = self.untrained()
        views: dict[str, list[View | None]] = {f: [v.build() for v in vs] for f, vs in recipe.data.views.items()}
        root = Root(model, recipe.objectives, fields=recipe.data.fields, views=views, average=recipe.average)
        loader = self._loader(model, views, rank=here.rank, size=here.size)
        # A small set is judged after its first pass, a large one after a thousand samples.
        enough = 1000 if self.train_source.streaming else min(1000, len(self.train_source) // here.size)
        quarantine = Quarantine(self.folder, limit=recipe.data.max_bad, minimum=enough, processes=here.size)
        trainer = Trainer(
            root, loader, train=recipe.train, optim=recipe.optim, folder=self.folder,
            on_quarantined=quarantine.add, callbacks=[Monitor(self, root)] if recipe.monitor else [],
        )  # fmt: skip
        trainer.fit(resume=resume)
        loader.close()
        results: Results = {}
        if here.rank == 0:
            with root.averaged():
                model.eval()
                self.__dict__["model"] = model
                self._encoded.clear()
                results = self.evaluate()
                (self.folder / "evaluation.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
                self._save_model(model, results, command)
            del self.__dict__["model"]  # from now on the saved one
            if quarantine.summary():
                logger.warning("%s", quarantine.summary())
        barrier()
        return results

    def _loader(self, model: Model, views: Mapping[str, list[View | None]], *, rank: int, size: int) -> BatchLoader:
        recipe = self.recipe
        encoders = {field: model.tower(tower).encoder for field, tower in recipe.data.fields.items()}
        # A frozen tower sees the same deterministic reading in every epoch: its features are kept, not recomputed.
        # A view that only chooses among sample values (a caption of many) keeps that true: content is the key.
        memoised = {
            field for field, tower in recipe.data.fields.items()
            if model.tower(tower).config.frozen and not any(_on_device(v) for v in views.get(field, ()))
        }  # fmt: skip
        reader = Reader(
            encoders, views=views, memoised=memoised, seed=recipe.train.seed, group=self.train_source.has_group
        )
        return BatchLoader(
            self.train_source, reader, batch_size=recipe.train.batch_size, seed=recipe.train.seed, rank=rank,
            world_size=size, workers=recipe.train.workers, cache=recipe.data.cache,
        )  # fmt: skip

    def _bench(self, model: Model) -> Bench:
        fields = dict(self.recipe.data.fields)
        untrained: dict[str, Any] = {}

        def before() -> Model:
            if "model" not in untrained:
                untrained["model"] = self.untrained()
            return untrained["model"]

        def encoded(name: str) -> EncodedSet:
            if model is self.__dict__.get("model"):
                return self.encoded(name)
            return encode_source(model, self.source(name), fields)

        return Bench(
            model=model, fields=fields, encoded=encoded,
            encoded_untrained=lambda name: encode_source(before(), self.source(name), fields),
            train=lambda: self.train_source,
            encoded_train=lambda: encode_source(model, self.train_source, fields),
            untrained=before,
        )  # fmt: skip

    @cached_property
    def _fitted(self) -> dict[str, Path]:
        """Let every encoder learn what it needs (a tokenizer) from the training samples, once a run folder."""
        files: dict[str, Path] = {}
        base = (self.folder or _scratch()) / "files"
        for name, tower in self.recipe.model.towers.items():
            folder = base / name
            if world().rank == 0 and not (folder / _FITTED).is_file():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                tower.encoder.cls.fit(tower.encoder.config, _Column(self, name), folder)
                if any(folder.iterdir()):
                    (folder / _FITTED).touch()
                else:
                    folder.rmdir()
            barrier()
            if (folder / _FITTED).is_file():
                files[name] = folder
        return files

    def _source(self, path: str, chosen: Any) -> Source:
        source: Source = chosen.build()
        columns = source.columns
        if columns is not None:
            missing = [f for f in self.recipe.data.fields if f not in columns]
            if path == "data.train" and missing:
                raise ConfigError([
                    f"data.fields.{field}: {path} has no column {field!r}{near(field, columns)} "
                    f"Columns: {', '.join(columns)}"
                    for field in missing
                ])  # fmt: skip
        return Limited(source, SMOKE_SAMPLES) if self.smoke else source

    def _claim(self, resume: bool) -> None:
        """Make the folder this recipe's, or refuse: a run is never mixed with another's files."""
        assert self.folder is not None
        config = self.folder / "config.yaml"
        if config.is_file():
            if not resume:
                raise ConfigError(
                    [f"{self.folder} holds a run already: add --resume to go on, or choose another --out"]
                )
            before = read_recipe(str(config))
            if recipe_json(before) != recipe_json(self.recipe):
                raise ConfigError(
                    [f"{config} differs from the recipe given: {', '.join(_differences(before, self.recipe))}"]
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError([f"{self.folder} is not empty and holds no run; choose another --out"])
        self.folder.mkdir(parents=True, exist_ok=True)
        write_recipe(self.recipe, config)

    def _save_model(self, model: Model, results: Results, command: str) -> None:
        """Write the model beside its final place and rename, so that a kill leaves the old or the new one."""
        assert self.folder is not None
        final, fresh, old = (self.folder / name for name in ("model", ".model-new", ".model-old"))
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        model.save_pretrained(
            fresh,
            model_card_kwargs={"results": results_markdown(results), "data": self.recipe.about, "recipe": command},
        )
        if final.exists():
            os.rename(final, old)
        os.rename(fresh, final)
        shutil.rmtree(old, ignore_errors=True)


class Monitor(Callback):
    """Runs the evaluations named in ``monitor`` every ``train.eval_every`` steps and logs their figures."""

    def __init__(self, run: Run, root: Root) -> None:
        self.run = run
        self.root = root

    def on_eval(self, trainer: Trainer, step: int) -> dict[str, float] | None:
        """Figures by name, ``eval/<evaluation>/<direction>/<figure>``; on the first process only."""
        if not trainer.is_main:
            return None
        with self.root.averaged():
            results = self.run.evaluate(self.run.recipe.monitor, self.root.model)
        return {
            "/".join(filter(None, ("eval", name, row.get("direction"), key))): float(value)
            for name, result in results.items()
            for row in result["rows"]
            if row["who"] == "model"
            for key, value in row.items()
            if key not in ("who", "direction")
        }


@dataclass
class _Column:
    """The raw training values that a tower will read, for `Encoder.fit`: read only if it asks."""

    run: Run
    tower: str

    def __iter__(self) -> Any:
        names = [f for f, t in self.run.recipe.data.fields.items() if t == self.tower]
        for sample in islice(self.run.train_source.stream(), _FIT_SAMPLES):
            if isinstance(sample, Sample):
                yield from (sample.fields[name] for name in names if sample.fields.get(name) is not None)


def open_run(folder: Path | str) -> Run:
    """Open a run folder.

    Raises:
        ConfigError: the folder holds no run.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            [f"{str(folder)!r} is no run folder: it has no config.yaml. `mmrep train … --out {folder}` makes one"]
        )
    return Run(read_recipe(str(folder)), folder)


def results_markdown(results: Results) -> str:
    """The results as one Markdown table per evaluation."""
    blocks: list[str] = []
    for name, result in results.items():
        keys = [k for k in result["rows"][0] if k not in ("who", "direction")]
        head = f"| {name} | |" + "".join(f" {k} |" for k in keys) + "\n|---|---|" + "---|" * len(keys)
        lines = [
            f"| {row.get('direction', '')} | {row['who']} |" + "".join(f" {_figure(row.get(k))} |" for k in keys)
            for row in result["rows"]
        ]
        blocks.append("\n".join([head, *lines]))
    return "\n\n".join(blocks)


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) and abs(value) < 2 else f"{value:g}"


def _on_device(view: View | None) -> bool:
    return view is not None and type(view).batch is not View.batch


def _differences(a: Recipe, b: Recipe) -> list[str]:
    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            return {
                k: v for key, part in value.items() for k, v in flat(part, f"{path}.{key}" if path else key).items()
            }
        return {path: value}

    left, right = flat(dump(a)), flat(dump(b))
    return [
        f"{k}: {left.get(k)!r} there, {right.get(k)!r} here"
        for k in sorted({*left, *right})
        if left.get(k) != right.get(k)
    ][:8]


def _scratch() -> Path:
    """A folder for a dry run, which must not write into the run folder; removed at exit."""
    import atexit
    import tempfile

    folder = tempfile.mkdtemp(prefix="mmrep-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
