"""From a recipe to a run folder: build, train, evaluate, open again.

A run folder holds ``config.yaml`` (the resolved recipe), ``metrics.jsonl``, ``quarantine.jsonl`` (if any sample was
bad), ``checkpoints/``, ``files/`` (what encoders learned from the data), ``model/`` and ``evaluation.json``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import torch

from mmrep._run_files import claim, save_model, scratch_folder
from mmrep._run_fit import RawValues, fit_encoders
from mmrep._swap import heal_folder
from mmrep._unused import freeze_unused
from mmrep.collapse import CollapseWatch
from mmrep.config import ConfigError
from mmrep.data.limited import Limited
from mmrep.data.loader import BatchLoader
from mmrep.data.quarantine import Quarantine
from mmrep.data.reader import Reader
from mmrep.data.source import Source
from mmrep.embed.memo import Memo
from mmrep.embed.store import FeatureStore
from mmrep.evaluate._errands import Errands
from mmrep.evaluate.encoded import EncodedSet, encode_source, encode_together
from mmrep.evaluate.evaluation import Bench, Row
from mmrep.guard import Guard
from mmrep.hub.folder import load
from mmrep.hub.load import load as load_any
from mmrep.hub.start import Start, model_folder
from mmrep.model import Model
from mmrep.monitor import Monitor
from mmrep.objectives.root import Root
from mmrep.recipe import SMOKE_SAMPLES, Recipe, read_recipe
from mmrep.registry import UnknownNameError, near
from mmrep.results import Results, results_markdown
from mmrep.sizes import sizes
from mmrep.training.collectives import world
from mmrep.training.engine import barrier, share_buffers, start_processes, whole
from mmrep.training.roll_call import accounted
from mmrep.training.trainer import Callback, Trainer
from mmrep.views.view import View

logger = logging.getLogger(__name__)


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
        self._where: Callable[[], str] = lambda: "before the first step"
        if folder is not None:
            heal_folder(folder / "model")

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

    def samples(self, field: str) -> Iterable[Any]:
        """The raw training values of a field, as far as they are there, without views."""
        return RawValues(lambda: self.train_source, (field,))

    @cached_property
    def model(self) -> Model:
        """The trained model of the run folder; before training, the untrained one."""
        saved = None if self.folder is None else self.folder / "model"
        return load(saved) if saved is not None and (saved / "config.json").is_file() else self.untrained()

    def untrained(self) -> Model:
        """The model as it is before training: the same seed gives the same weights."""
        start = self._start
        files = {**self._fitted, **({} if start is None else start.files())}
        with _seeded(self.recipe.train.seed):
            model = Model(self.recipe.model, files=files)
        if start is not None:
            start.fill(model)
        return model

    @cached_property
    def _start(self) -> Start | None:
        return None if self.recipe.start is None else Start(self.recipe.start, self.recipe.model)

    def encoded(self, name: str) -> EncodedSet:
        """A held-out source, embedded by the model."""
        if name not in self._encoded:
            self._encoded[name] = encode_source(self.model, self.source(name), self.recipe.data.fields)
        return self._encoded[name]

    def evaluate(
        self, names: list[str] | None = None, model: Model | None = None, *, together: bool = False
    ) -> Results:
        """Run the recipe's evaluations: per name, its type, its source and its rows.

        Args:
            names: which; None = all.
            model: None = the run's own.
            together: every process of a launch calls this, and embeds its share of what is evaluated; the figures are
                the first process's, the others get none.
        """
        chosen = self.recipe.evaluations
        for name in names or ():
            if name not in chosen:
                raise ConfigError([f"no evaluation {name!r}{near(name, chosen)} Evaluations: {', '.join(chosen)}"])
        model = model or self.model
        untrained = cache(self.untrained)
        fields, own = self.recipe.data.fields, model is self.__dict__.get("model")

        def embed(trained: bool, name: str | None) -> EncodedSet | None:
            source = self.train_source if name is None else self.source(name)
            encode = encode_together if together else encode_source
            return encode(model if trained else untrained(), source, fields)

        errands = Errands({"embed": embed}) if together else None
        if errands is not None and world().rank:
            errands.follow()
            return {}

        def embedded(trained: bool, name: str | None) -> EncodedSet:
            if trained and own and name in self._encoded:
                return self._encoded[name]
            found = cast(EncodedSet, embed(trained, name) if errands is None else errands.ask("embed", trained, name))
            if trained and own and name is not None:
                self._encoded[name] = found
            return found

        bench = Bench(
            model=model, fields=dict(fields), untrained=untrained, train=lambda: self.train_source,
            encoded=lambda name: embedded(True, name),
            encoded_untrained=lambda name: embedded(False, name),
            encoded_train=lambda: embedded(True, None),
            encoded_train_untrained=lambda: embedded(False, None),
        )  # fmt: skip
        results: Results = {}
        for name in names or list(chosen):
            rows: list[Row] = chosen[name].build().run(bench)
            results[name] = {
                "type": chosen[name].type,
                "data": getattr(chosen[name].config, "data", None),
                "rows": rows,
            }
        if errands is not None:
            errands.done()
        return results

    def train(self, *, resume: bool = False, command: str = "", tell: Callable[[str], None] | None = None) -> Results:
        """Train, save the model, evaluate. Every process of a launch calls it.

        Args:
            resume: continue from the newest whole checkpoint of the folder, if there is one.
            command: what was typed, for the model card.
            tell: called before the first step, on the first process, with the sizes and learning rates of the run.

        Returns:
            The evaluation results (empty on all processes but the first).

        Raises:
            ConfigError: the folder holds another recipe's run.
        """
        assert self.folder is not None, "training writes a run folder"
        start_processes()
        with accounted(lambda: self._where()):
            return self._train(resume, command, tell)

    def _train(self, resume: bool, command: str, tell: Callable[[str], None] | None) -> Results:
        assert self.folder is not None
        recipe, here = self.recipe, world()
        _ = self._start  # what it refuses is refused before anything is written
        if here.rank == 0:
            claim(self.folder, recipe, resume=resume)
        barrier()
        model = self.untrained()
        root = self.root(model, memo=self._memo(self.folder, here.rank))
        root.fit(self.samples)
        loader = self.loader(root, rank=here.rank, size=here.size)
        # A small set is judged after its first pass, a large one after a thousand samples.
        enough = 1000 if self.train_source.streaming else min(1000, len(self.train_source) // here.size)
        quarantine = Quarantine(self.folder, limit=recipe.data.max_bad, minimum=enough, processes=here.size)
        trainer = Trainer(
            root, loader, train=recipe.train, optim=recipe.optim, folder=self.folder,
            on_quarantined=quarantine.add, callbacks=self._callbacks(root),
        )  # fmt: skip
        if tell is not None and here.rank == 0:
            tell("\n".join(sizes(model, trainer.optimizer.param_groups, recipe.optim.lr)))
        self._where = lambda: f"step {trainer.step + 1}"
        trainer.fit(resume=resume)
        loader.close()
        root.memo.flush()
        self._where = lambda: "after the last step"
        with self.trained(root) as final:
            if here.rank == 0:
                self.__dict__["model"] = final
                self._encoded.clear()
            card = {"data": recipe.about, "recipe": command}
            try:
                results = self.evaluate(model=final, together=True)
            except BaseException:
                if here.rank == 0:  # what was trained is not lost with what was to be said of it
                    save_model(final, self.folder, card)
                raise
            if here.rank == 0:
                (self.folder / "evaluation.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
                save_model(final, self.folder, {"results": results_markdown(results), **card})
                del self.__dict__["model"]  # from now on the saved one
                if quarantine.summary():
                    logger.warning("%s", quarantine.summary())
        barrier()
        return results

    def root(self, model: Model, memo: Memo | None = None) -> Root:
        """Model and objectives as they are trained; what no objective reads has no gradient any more.

        Args:
            model: the untrained one.
            memo: of the features of frozen towers; None = one in memory.
        """
        recipe = self.recipe
        freeze_unused(model)
        views: dict[str, list[View | None]] = {f: [v.build() for v in vs] for f, vs in recipe.data.views.items()}
        with _seeded(recipe.train.seed):  # objectives may have weights too
            return Root(
                model, recipe.objectives, fields=recipe.data.fields, views=views, average=recipe.average, memo=memo,
                teacher=recipe.teacher,
            )  # fmt: skip

    @contextmanager
    def trained(self, root: Root) -> Iterator[Model]:
        """The model as it is evaluated and saved: averaged, whole and equal on all processes, which all call this."""
        share_buffers(root)
        with root.averaged():
            model = whole(root.model, self.untrained)
            was_training = model.training
            model.eval()
            try:
                yield model
            finally:
                model.train(was_training)

    def _callbacks(self, root: Root) -> list[Callback]:
        watch = [] if self.recipe.collapse is None else [CollapseWatch(self.recipe.collapse, root)]
        monitor = [Monitor(self, root)] if self.recipe.monitor else []
        return [*watch, *monitor, *([] if self.recipe.guard is None else [Guard(self.recipe.guard, self, root)])]

    def loader(self, root: Root, *, rank: int, size: int) -> BatchLoader:
        """The training batches of process ``rank`` of ``size``, as the objectives of ``root`` read them."""
        recipe, data, model, raw, views = self.recipe, self.recipe.data, root.model, root.raw, root.views
        # A frozen tower sees the same deterministic reading in every epoch: its features are kept, not recomputed.
        # A view that only chooses among sample values (a caption of many) keeps that true: content is the key.
        memoised = {
            field for field, tower in recipe.data.fields.items()
            if model.tower(tower).frozen and field not in raw
            and not any(_on_device(v) for v in views.get(field, ()))
        } | set(root.guests)  # fmt: skip
        reader = Reader(
            root.encoders(), views=views, memoised=memoised, seed=recipe.train.seed, drop=data.drop,
            group=self.train_source.has_group, columns=root.columns(),
        )  # fmt: skip
        return BatchLoader(
            self.train_source, reader, batch_size=recipe.train.batch_size, seed=recipe.train.seed, rank=rank,
            world_size=size, workers=recipe.train.workers, cache=data.cache, distinct_groups=data.distinct_groups,
            bucket_by=data.bucket_by, lengths=data.lengths, max_tokens=data.max_tokens,
            micro_batch=recipe.train.micro_batch,
        )  # fmt: skip

    def _memo(self, folder: Path, rank: int) -> Memo:
        if self.recipe.data.features is not None:
            return Memo(store=FeatureStore(self.recipe.data.features), max_bytes=None)
        return Memo(store=FeatureStore(folder / "features" / str(rank)))

    @cached_property
    def _fitted(self) -> dict[str, Path]:
        """Let every encoder learn what it needs (a tokenizer) from the training samples, once a run folder."""
        base = (self.folder or scratch_folder()) / "files"
        started = [] if self._start is None else self._start.towers
        return fit_encoders(self.recipe, lambda: self.train_source, base, skip=started)

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


def open_run(folder: Path | str) -> Run:
    """Open a run folder.

    Raises:
        ConfigError: the folder holds no run, or one that has no trained model yet.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            [f"{str(folder)!r} is no run folder: it has no config.yaml. `mmrep train … --out {folder}` makes one"]
        )
    run = Run(read_recipe(str(folder)), folder)  # puts a half replaced model in its place
    if not (folder / "model" / "config.json").is_file():
        raise ConfigError([
            f"the run in {str(folder)!r} has no trained model yet: it is saved at the end. "
            f"`mmrep train {folder} --out {folder} --resume` goes on to there"
        ])  # fmt: skip
    return run


def evaluate_other(recipe: str, model: str, names: list[str] | None = None) -> Results:
    """Evaluate a model that this recipe need not have trained, such as a merged one or a checkpoint of the hub.

    Args:
        recipe: a run folder, or a recipe by name or path; its data, fields and evaluations count.
        model: whatever `mmrep.load` takes, or a run folder.
        names: of evaluations; None = all.

    Raises:
        ConfigError: no such recipe or evaluation, or the model lacks a tower that a field is read by.
    """
    run, other = Run(read_recipe(recipe)), load_any(model_folder(model))
    problems: list[str] = []
    for field, tower in run.recipe.data.fields.items():
        try:
            other.tower(tower)
        except UnknownNameError as error:
            problems.append(f"data.fields.{field}: {error}")
    if problems:
        raise ConfigError(problems)
    return run.evaluate(names, other)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw weights from ``seed``, and leave the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _on_device(view: View | None) -> bool:
    return view is not None and type(view).batch is not View.batch
