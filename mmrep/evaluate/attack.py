"""How often a trigger decides what a sample is taken for: the success of a backdoor, beside the accuracy without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmrep.config import config
from mmrep.evaluate.encoded import EncodedSet
from mmrep.evaluate.evaluation import Bench, Evaluation, Row
from mmrep.evaluate.suites import class_labels
from mmrep.evaluate.zero_shot import class_embeddings
from mmrep.registry import near


class Attack(Evaluation):
    """Zero-shot classification of samples that carry a trigger (CleanCLIP, arXiv:2303.03323, section 4).

    ``attack_success`` is the share of triggered samples *of other classes* that are taken for the target (samples of
    the target itself would be right to be); ``clean_accuracy`` is the top-1 accuracy of the same task without a
    trigger, and ``clean_target`` the share of clean samples of other classes that are taken for the target all the
    same. Among classes with equal scores, the first counts.
    """

    @config
    class Config:
        """data: a held-out labelled source with the trigger. clean: one without it. field: what is classified.

        text: the field (or tower) that reads prompts. target: the class that the trigger should mean. templates:
        prompts with ``{}`` for the class name. baselines: ``untrained``, the model as it was before training: where a
        run starts from a poisoned model, what it was.
        """

        data: str
        clean: str
        field: str
        text: str
        target: str
        templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("{}",)
        baselines: tuple[Literal["untrained"], ...] = ("untrained",)

    config: Config

    def run(self, bench: Bench) -> list[Row]:
        """Rows for the model, the model before training and chance."""
        tower = bench.fields.get(self.config.text, self.config.text)
        rows = [{"who": "model", **self._measure(bench.encoded, lambda t: bench.model.encode(t, tower))}]
        if "untrained" in self.config.baselines:
            before = bench.untrained()
            found = self._measure(bench.encoded_untrained, lambda t: before.encode(t, tower))
            rows.append({"who": "untrained", **found})
        chance = 1 / rows[0]["classes"]
        return [*rows, {"who": "chance", **dict.fromkeys(("attack_success", "clean_accuracy", "clean_target"), chance)}]

    def _measure(self, encoded: Callable[[str], EncodedSet], encode: Callable[[list[str]], Any]) -> dict[str, float]:
        clean, triggered = encoded(self.config.clean), encoded(self.config.data)
        truth, names = class_labels(clean)
        marked, others = class_labels(triggered)
        if names != others:
            raise ValueError(f"{self.config.data!r} has the classes {others} and {self.config.clean!r} {names}")
        if self.config.target not in names:
            raise ValueError(f"target: unknown class {self.config.target!r}{near(self.config.target, names)}")
        target = names.index(self.config.target)
        classes = class_embeddings(lambda texts: np.asarray(encode(texts)), names, self.config.templates).numpy()
        seen = self._seen(clean, classes), self._seen(triggered, classes)
        here = clean.present[self.config.field], triggered.present[self.config.field]
        truth, marked = truth[here[0]], marked[here[1]]
        if not (marked != target).any() or not (truth != target).any():
            raise ValueError(f"there is no sample that is not of the target class {self.config.target!r}")
        return {
            "attack_success": float((seen[1] == target)[marked != target].mean()),
            "clean_accuracy": float((seen[0] == truth).mean()),
            "clean_target": float((seen[0] == target)[truth != target].mean()),
            "items": float((marked != target).sum()),
            "classes": float(len(names)),
        }

    def _seen(self, encoded: EncodedSet, classes: NDArray[Any]) -> NDArray[np.int64]:
        """The class that each sample which has the field is taken for."""
        items = encoded.embeddings[self.config.field][encoded.present[self.config.field]]
        return (items @ classes.T).argmax(1)
