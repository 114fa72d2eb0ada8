"""Labels told by how similar samples are to their classes' names: what prompts are learned with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrep.config import ConfigError, config
from mmrep.evaluate.zero_shot import expand_templates
from mmrep.finetune.representation import NAME, RepresentationTokens
from mmrep.model import Model
from mmrep.objectives._labels import label_places
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step, idle
from mmrep.tokens import Inputs
from mmrep.tower import Tower
from mmrep.world import World


@config
class ClassifyConfig(ObjectiveConfig):
    """field: what is classified; its samples have labels. text: the field or tower that reads the classes' names.

    classes: all of them, as the labels name them. templates: with ``{}`` for the name; the vectors of several are
    averaged. temperature: which of the model's. near: weight of keeping the classes' vectors where they were before
    training, by the texts ``near_templates``, read without what is learned in the prompt; the mean of the squared
    distance of unit vectors. same: weight of also keeping what they say of every sample: the divergence KL(before ||
    now) of the probabilities. near_prompts: texts of each class, as many of one as of another, in place of
    ``near_templates``: what a language model says of them, for instance. outliers: of ``same``, leaves out of each
    batch the texts whose score is further than so many standard deviations from the mean of all, see `steadiest`.
    """

    field: str
    text: str
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("{}",)
    temperature: str = "default"
    near: Annotated[float, Field(ge=0)] = 0.0
    same: Annotated[float, Field(ge=0)] = 0.0
    near_templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("a photo of a {}.",)
    near_prompts: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] | None = None
    outliers: Annotated[float, Field(gt=0)] | None = None
    weight: Annotated[float, Field(ge=0)] = 1.0


class Classify(Objective):
    """Cross-entropy over classes of ``scale * cos(sample, class)``: CoOp (Zhou et al. 2022, arXiv:2109.01134, eq. 1).

    A class's vector is the embedding of its name in a template, by the text tower as it is now. What of the model
    learns is the recipe's affair: with everything frozen but the learned vectors of a ``prompt-tuned-text`` it is CoOp
    (a context) or Learning to Name Classes (the names); ``near`` and ``same`` keep a prompt near an ensemble of texts,
    as KgCoOp and, with ``near_prompts`` and ``outliers``, BiomedCoOp (Koleilat et al. 2025, arXiv:2411.15232) do, whose
    averages run over classes and dimensions too: its weights are these times such counts. Samples without a label count
    for nothing.

    Where the field's tower has a second embedding (`RepresentationTokens`), the cross-entropy is that of the first
    times ``alpha`` of the adapter plus that of the second times ``1 - alpha`` (MMRL, arXiv:2503.08497, section 3.3).
    """

    Config = ClassifyConfig
    scope = "sample"
    before: Tensor

    def __init__(self, config: ClassifyConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems: list[str] = []
        if config.field not in fields:
            problems.append(f"field: unknown {config.field!r}{near(config.field, fields)} Fields: {', '.join(fields)}")
        names = [*fields, *model.config.towers]
        if config.text not in names:
            problems.append(f"text: unknown {config.text!r}{near(config.text, names)} Known: {', '.join(names)}")
        if len(set(config.classes)) < len(config.classes):
            problems.append("classes: one is named twice")
        problems += _ensemble_problems(config)
        if config.temperature not in model.temperatures:
            problems.append(
                f"temperature: unknown {config.temperature!r}{near(config.temperature, model.temperatures)}"
            )
        if problems:
            raise ConfigError([f"objectives.classify.{problem}" for problem in problems])
        tower = model.tower(fields.get(config.text, config.text))
        self.__dict__["_tower"] = tower  # seen, not owned
        self.index = {name: place for place, name in enumerate(config.classes)}
        prompts = expand_templates(config.classes, config.templates)
        for name, value in _inputs(tower, prompts, tower.encoder.prepare).items():
            self.register_buffer(f"prompt_{name}", value, persistent=False)
        texts = len(next(iter(config.near_prompts.values())) if config.near_prompts else config.near_templates)
        self.register_buffer("before", torch.zeros(len(config.classes), texts, model.dim))

    def embedded(self) -> set[str]:
        """See `Objective.embedded`."""
        config = cast(ClassifyConfig, self.config)
        return {config.field, config.text}

    def count(self, step: Step) -> int:
        """See `Objective.count`: the samples that have the field and a label."""
        return int(
            (
                step.present(cast(ClassifyConfig, self.config).field)
                & (label_places(step, self.index, "classify") >= 0)
            ).sum()
        )

    @torch.no_grad()
    def fit(self, samples: Callable[[str], Iterable[Any]]) -> None:
        """Remember where the classes are before training, if they are to stay near."""
        config, tower = cast(ClassifyConfig, self.config), self._tower
        if config.near or config.same:
            read = getattr(tower.encoder, "untuned", tower.encoder.prepare)
            prompts = config.near_prompts
            texts = (
                [text for name in config.classes for text in prompts[name]]
                if prompts
                else expand_templates(config.classes, config.near_templates)
            )
            was_training = tower.training
            tower.eval()
            inputs = {key: value.to(self.before.device) for key, value in _inputs(tower, texts, read).items()}
            with tower.without_adapter():
                self.before.copy_(F.normalize(tower(inputs), dim=1).unflatten(0, (len(config.classes), -1)))
            tower.train(was_training)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are ``accuracy`` and, where asked for, ``near`` and ``same``.

        Raises:
            ValueError: a label is none of the classes.
        """
        config = cast(ClassifyConfig, self.config)
        labels = label_places(step, self.index, "classify")
        here = step.present(config.field) & (labels >= 0)
        n = step.world.sum(here.sum())
        classes = self.classes()
        total = classes.sum() * 0 + idle(self)
        parts: dict[str, Tensor] = {}
        second = self._second(step) if step.has(config.field) else None
        # Asked for on every process, present or not; features of a frozen tower are no inputs of the step.
        items = F.normalize(step.embedding(config.field)[here], dim=1)
        followed = steadiest(items, self.before, config.outliers, step.world) if config.outliers else None
        scale = step.model.temperature(config.temperature).scale
        logits, wanted = scale * items @ classes.T, labels[here]
        losses = F.cross_entropy(logits, wanted, reduction="none")
        parts["accuracy"] = _right(logits, wanted)
        if second is not None:
            alpha, others = second
            more = scale * others[here[step.present(config.field)]].to(items.dtype) @ classes.T
            losses = alpha * losses + (1 - alpha) * F.cross_entropy(more, wanted, reduction="none")
            parts["accuracy_second"] = _right(more, wanted)
        if config.same:
            old = (scale * items @ _mean(self.before, followed).T).detach().log_softmax(1)
            moved = F.kl_div(logits.log_softmax(1), old, reduction="none", log_target=True).sum(1)
            parts["same"] = moved.detach().sum() / max(len(moved), 1)
            losses = losses + config.same * moved
        total = total + losses.sum() * (step.world.size / n.clamp_min(1))
        if config.near:
            away = (classes - _mean(self.before)).square().sum(1).mean()
            parts["near"] = away.detach()
            total = total + config.near * away
        return {"loss": total, **{name: value.detach() for name, value in parts.items()}}

    def _second(self, step: Step) -> tuple[float, Tensor] | None:
        """The share of the first embedding, and the second, of length 1, of the samples that have the field."""
        field = cast(ClassifyConfig, self.config).field
        adapter = step.tower(field).adapter
        if not isinstance(adapter, RepresentationTokens) or not adapter.config.read:
            return None
        return adapter.config.alpha, F.normalize(step.encoding(field).extra[NAME], dim=1)

    def classes(self) -> Tensor:
        """The classes' unit vectors now, [C, dim]."""
        prefix = "prompt_"
        inputs = {name.removeprefix(prefix): value for name, value in self.named_buffers() if name.startswith(prefix)}
        return _averaged(self._tower(inputs), len(self.index))

    @property
    def _tower(self) -> Tower:
        return self.__dict__["_tower"]


@torch.no_grad()
def steadiest(items: Tensor, texts: Tensor, outliers: float, world: World) -> Tensor:
    """Which texts of a class to follow in a batch: those whose scores agree with the others'.

    Text ``p`` of every class scores ``mean_i max_c cos(item i, text p of class c)``; it is kept where this is no
    further than ``outliers`` standard deviations from the mean over texts. BiomedCoOp first takes the scores in units
    of their median deviation from the median, which changes nothing in what follows.

    Args:
        items: unit vectors [n, dim] of this process, n >= 0.
        texts: unit vectors [C, P, dim].
        outliers: standard deviations, > 0 (BiomedCoOp: 1.5).
        world: the processes, all of which must call.

    Returns:
        bool [P], the same on all processes; all true where the scores are equal, or there are no items.
    """
    best = torch.einsum("nd,cpd->ncp", items, texts).amax(1)
    total = world.sum(torch.cat([best.sum(0), best.new_tensor([len(best)])]))
    scores = total[:-1] / total[-1].clamp_min(1)
    away, spread = (scores - scores.mean()).abs(), scores.std() if len(scores) > 1 else scores.new_zeros(())
    kept = away <= outliers * spread
    return kept if bool(kept.any()) else torch.ones_like(kept)


def _ensemble_problems(config: ClassifyConfig) -> list[str]:
    problems: list[str] = []
    if config.outliers and not config.same:
        problems.append("outliers: says which texts `same` follows, and same is 0")
    if config.near_prompts is not None:
        if missing := [name for name in config.classes if name not in config.near_prompts]:
            problems.append(f"near_prompts: no texts of {missing[0]!r}, of {len(config.classes)} classes")
        if other := [name for name in config.near_prompts if name not in config.classes]:
            problems.append(f"near_prompts: {other[0]!r} is none of the classes{near(other[0], config.classes)}")
        if len(counts := {len(texts) for texts in config.near_prompts.values()}) > 1:
            problems.append(
                f"near_prompts: every class needs as many texts, some have {min(counts)}, some {max(counts)}"
            )
    return problems


def _right(logits: Tensor, wanted: Tensor) -> Tensor:
    """Of samples whose greatest logit is the wanted one; 0 of none."""
    return (logits.argmax(1) == wanted).float().mean() if len(wanted) else logits.new_zeros(())


def _mean(texts: Tensor, kept: Tensor | None = None) -> Tensor:
    """The classes' unit vectors [C, dim] from those of their texts [C, P, dim]."""
    return F.normalize((texts if kept is None else texts[:, kept]).mean(1), dim=1)


def _inputs(tower: Tower, texts: list[str], prepare: Callable[[Any], Inputs]) -> Inputs:
    return tower.encoder.collate([prepare(text) for text in texts])


def _averaged(vectors: Tensor, classes: int) -> Tensor:
    """Unit vectors of the classes [C, dim] from those of their texts, class by class."""
    return _mean(F.normalize(vectors, dim=1).unflatten(0, (classes, -1)))
