"""The evaluations a recipe can name: retrieval, zero-shot classification, nearest neighbours, linear probe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmrep.config import config
from mmrep.data.sample import stable_hash
from mmrep.evaluate._relevance import Relevance
from mmrep.evaluate.baselines import lookup, nearest_input
from mmrep.evaluate.encoded import EncodedSet
from mmrep.evaluate.evaluation import Bench, Evaluation, Row
from mmrep.evaluate.knn import knn_metrics
from mmrep.evaluate.probe import linear_probe
from mmrep.evaluate.retrieval import retrieval_metrics
from mmrep.evaluate.zero_shot import TEMPLATES, class_embeddings, zero_shot_metrics
from mmrep.finetune.representation import known_classes


class Retrieval(Evaluation):
    """Both directions between two fields; samples of one group answer each other."""

    @config
    class Config:
        """data: held-out source. between: two fields. ks: cut-offs.

        baselines: ``untrained`` (the model before training) and ``nearest-input`` (each item of the second field is
        described by the first field of its nearest training item in raw inputs; where every group has a training item,
        also ``lookup``: raw distance to that item). neighbours: for ``nearest-input``. distinct: within a group, count
        texts and files that are the same once (the picture of a thing that is named in five languages), not as five
        items that fill the first five places together.
        """

        data: str
        between: Annotated[tuple[str, ...], Field(min_length=2, max_length=2)]
        ks: tuple[int, ...] = (1, 5, 10)
        baselines: tuple[Literal["untrained", "nearest-input"], ...] = ("untrained",)
        neighbours: Annotated[int, Field(ge=1)] = 1
        distinct: bool = False

    config: Config

    def run(self, bench: Bench) -> list[Row]:
        """Rows for the model, the baselines and chance, in both directions."""
        a, b = self.config.between
        encoded = bench.encoded(self.config.data)
        rows = self._both(encoded, encoded.embeddings[a], encoded.embeddings[b], "model")
        if "untrained" in self.config.baselines:
            before = bench.encoded_untrained(self.config.data)
            rows += self._both(before, before.embeddings[a], before.embeddings[b], "untrained")
        if "nearest-input" in self.config.baselines:
            items, queries = nearest_input(
                bench.untrained(), bench.train(), encoded, near=(b, bench.fields[b]), described=(a, bench.fields[a]),
                k=self.config.neighbours,
            )  # fmt: skip
            rows += self._both(encoded, queries, items, "nearest input")
            found = lookup(bench.untrained(), bench.train(), encoded, (b, bench.fields[b]))
            if found is not None:
                rows += self._both(encoded, found[1], found[0], "lookup")
        chance = [
            {"who": "chance", "direction": row["direction"],
             **{k.removeprefix("chance_"): v for k, v in row.items() if k.startswith("chance_")}}
            for row in rows if row["who"] == "model"
        ]  # fmt: skip
        kept = [{k: v for k, v in row.items() if not k.startswith("chance_")} for row in [*rows, *chance]]
        return sorted(kept, key=lambda row: row["direction"] != f"{a}→{b}")

    def _both(self, encoded: EncodedSet, left: Any, right: Any, who: str) -> list[Row]:
        a, b = self.config.between
        groups = np.array(encoded.groups(), dtype=object)
        rows: list[Row] = []
        for first, second, x, y in ((a, b, left, right), (b, a, right, left)):
            here, there = (encoded.present[field] & self._counted(encoded, field, groups) for field in (first, second))
            relevant = Relevance.from_groups(list(groups[here]), list(groups[there]))
            figures = retrieval_metrics(x[here], y[there], relevant, self.config.ks)
            rows.append({"who": who, "direction": f"{first}→{second}", **figures})
        return rows

    def _counted(self, encoded: EncodedSet, field: str, groups: Any) -> NDArray[np.bool_]:
        """Bool [n]: all, or the first of each group's equal texts and files."""
        counted = np.ones(len(encoded), dtype=bool)
        if not self.config.distinct:
            return counted
        seen: set[tuple[str, str]] = set()
        for i, group in enumerate(groups):
            raw = encoded.samples[i].fields.get(field)
            if isinstance(raw, (str, Path, list, tuple)):  # a list: of names
                counted[i] = (group, str(raw)) not in seen
                seen.add((group, str(raw)))
        return counted


class ZeroShot(Evaluation):
    """Classification of one field by the embeddings of class names in prompts."""

    @config
    class Config:
        """data: held-out labelled source. field: what is classified. text: the field (or tower) that reads prompts.

        templates: prompts with ``{}`` for the class name. temperature: which of the model's temperatures turns
        similarities into probabilities; a model without any gives none. known: the classes are those that a tower with
        representation tokens was trained to tell, so that its two embeddings are blended; see
        `mmrep.finetune.representation.known_classes`.
        """

        data: str
        field: str
        text: str
        templates: tuple[str, ...] = TEMPLATES
        temperature: str = "default"
        known: bool = False

    config: Config

    def run(self, bench: Bench) -> list[Row]:
        """Rows for the model and chance."""
        encoded = bench.encoded(self.config.data)
        labels, names = class_labels(encoded)
        tower = bench.fields.get(self.config.text, self.config.text)
        prompts = class_embeddings(
            lambda texts: np.asarray(bench.model.encode(texts, tower)), names, self.config.templates
        )
        has = len(bench.model.temperatures) > 0  # another library's encoder need not have one: no probabilities then
        temperature = bench.model.temperature(self.config.temperature) if has else None
        items: Any = encoded.embeddings[self.config.field]
        if self.config.known:
            raw = [encoded.raw(i, self.config.field) for i in range(len(encoded))]
            with known_classes(bench.model):
                items = bench.model.encode(raw, bench.fields[self.config.field], show_progress_bar=False)
        figures = zero_shot_metrics(
            items, prompts, labels,
            scale=None if temperature is None else temperature.scale.item(),
            bias=None if temperature is None or temperature.bias is None else temperature.bias.item(),
        )  # fmt: skip
        return _beside_chance(figures)


class KNN(Evaluation):
    """Classification by the nearest training embeddings."""

    @config
    class Config:
        """data: held-out labelled source. field: what is classified. k: neighbours. temperature: of their weights.

        train: the source of ``data.evaluation`` whose items and labels are known; None = ``data.train``. It is named
        where the run learned from more than what has a label. standardize: every dimension first, by the training
        items' mean and deviation; see `knn_metrics`.
        baselines: ``untrained``, the model before training. per_class: use only so many training labels of each class,
        drawn by a hash of the sample's id; None = all.
        """

        data: str
        field: str
        train: str | None = None
        baselines: tuple[Literal["untrained"], ...] = ()
        per_class: Annotated[int, Field(ge=1)] | None = None
        k: Annotated[int, Field(ge=1)] = 20
        temperature: Annotated[float, Field(gt=0)] = 0.07
        standardize: bool = False

    config: Config

    def run(self, bench: Bench) -> list[Row]:
        """Rows for the model, the baselines and the majority class."""
        config = self.config
        return _classified(
            bench, config, lambda x, labels, y, answers: knn_metrics(
                x, labels, y, answers, k=min(config.k, len(x)), temperature=config.temperature,
                standardize=config.standardize,
            )
        )  # fmt: skip


class LinearProbe(Evaluation):
    """A linear classifier on frozen embeddings."""

    @config
    class Config:
        """data: held-out labelled source. field: what is classified. train, baselines, per_class: as of ``knn``.

        A class of which one training item is known is left out, since none could be held out to choose the strength:
        its test items count as missed.
        """

        data: str
        field: str
        train: str | None = None
        baselines: tuple[Literal["untrained"], ...] = ()
        per_class: Annotated[int, Field(ge=2)] | None = None

    config: Config

    def run(self, bench: Bench) -> list[Row]:
        """Rows for the model, the baselines and the majority class."""
        return _classified(bench, self.config, _probe)


def _probe(x: np.ndarray, labels: list[str], y: np.ndarray, answers: list[str]) -> dict[str, float]:
    counts = Counter(labels)
    kept = [i for i, label in enumerate(labels) if counts[label] > 1]
    return linear_probe(x[kept], [labels[i] for i in kept], y, answers)


def class_labels(encoded: EncodedSet) -> tuple[np.ndarray, list[str]]:
    """Integer labels [n] and class names; labels given as names are numbered in sorted order."""
    raw = [s.label for s in encoded.samples]
    if any(label is None for label in raw):
        raise ValueError(
            f"{sum(label is None for label in raw)} of {len(raw)} samples have no label; set the source's `label:`"
        )
    if encoded.class_names is not None and all(isinstance(label, int) for label in raw):
        return np.array(raw), encoded.class_names
    names = encoded.class_names or sorted({str(label) for label in raw})
    return np.array([names.index(str(label)) for label in raw]), names


def _classified(bench: Bench, config: Any, measure: Callable[..., dict[str, float]]) -> list[Row]:
    """Rows of a classifier of embeddings: the model's, the untrained model's if asked for, and the majority class."""
    own = config.train is None
    known = bench.encoded_train() if own else bench.encoded(config.train)
    rows = [{"who": "model", **measure(*_split(known, bench.encoded(config.data), config))}]
    if "untrained" in config.baselines:
        known = bench.encoded_train_untrained() if own else bench.encoded_untrained(config.train)
        rows.append({"who": "untrained", **measure(*_split(known, bench.encoded_untrained(config.data), config))})
    majority = [row.pop("majority") for row in rows]
    return [*rows, {"who": "majority class", "accuracy": majority[0]}]


def _split(train: EncodedSet, test: EncodedSet, config: Any) -> tuple[np.ndarray, list[str], np.ndarray, list[str]]:
    """Training embeddings and labels, test embeddings and labels."""
    x, labels, ids = _labelled(train, config.field)
    y, answers, _ = _labelled(test, config.field)
    if config.per_class is None:
        return x, labels, y, answers
    kept = few_labels(ids, labels, config.per_class)
    return x[kept], [labels[i] for i in kept], y, answers


def few_labels(ids: Sequence[str], labels: Sequence[str], per_class: int) -> list[int]:
    """The places, ascending, of ``per_class`` samples of each label, chosen by a hash of their ids."""
    seen: Counter[str] = Counter()
    kept: list[int] = []
    for i in sorted(range(len(ids)), key=lambda i: stable_hash("label", ids[i])):
        seen[labels[i]] += 1
        if seen[labels[i]] <= per_class:
            kept.append(i)
    return sorted(kept)


def _labelled(encoded: EncodedSet, field: str) -> tuple[np.ndarray, list[str], list[str]]:
    here = encoded.present[field]
    samples = [s for s, present in zip(encoded.samples, here, strict=True) if present]
    return encoded.embeddings[field][here], [str(s.label) for s in samples], [s.id for s in samples]


def _beside_chance(figures: dict[str, float]) -> list[Row]:
    chance = {k.removeprefix("chance_"): v for k, v in figures.items() if k.startswith("chance_")}
    own = {k: v for k, v in figures.items() if not k.startswith("chance_")}
    return [{"who": "model", **own}, {"who": "chance", **chance}]
