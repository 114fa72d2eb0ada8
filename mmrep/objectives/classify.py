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
from mmrep.model import Model
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step, idle
from mmrep.tokens import Inputs
from mmrep.tower import Tower


@config
class ClassifyConfig(ObjectiveConfig):
    """field: what is classified; its samples have labels. text: the field or tower that reads the classes' names.

    classes: all of them, as the labels name them. templates: with ``{}`` for the name; the vectors of several are
    averaged. temperature: which of the model's. near: weight of keeping the classes' vectors where they were before
    training, by the texts ``near_templates``, read without what is learned in the prompt; the mean of the squared
    distance of unit vectors. same: weight of also keeping what they say of every sample: the divergence KL(before ||
    now) of the probabilities.
    """

    field: str
    text: str
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("{}",)
    temperature: str = "default"
    near: Annotated[float, Field(ge=0)] = 0.0
    same: Annotated[float, Field(ge=0)] = 0.0
    near_templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("a photo of a {}.",)
    weight: Annotated[float, Field(ge=0)] = 1.0


class Classify(Objective):
    """Cross-entropy over classes of ``scale * cos(sample, class)``: CoOp (Zhou et al. 2022, arXiv:2109.01134, eq. 1).

    A class's vector is the embedding of its name in a template, by the text tower as it is now. What of the model
    learns is the recipe's affair: with everything frozen but the learned vectors of a ``prompt-tuned-text`` it is CoOp
    (a context) or Learning to Name Classes (the names); ``near`` and ``same`` keep a prompt near an ensemble of texts,
    as BiomedCoOp and KgCoOp do. Samples without a label count for nothing.
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
        self.register_buffer("before", torch.zeros(len(config.classes), model.dim))

    def embedded(self) -> set[str]:
        """See `Objective.embedded`."""
        config = cast(ClassifyConfig, self.config)
        return {config.field, config.text}

    def count(self, step: Step) -> int:
        """See `Objective.count`: the samples that have the field and a label."""
        return int((step.present(cast(ClassifyConfig, self.config).field) & (self._labels(step) >= 0)).sum())

    @torch.no_grad()
    def fit(self, samples: Callable[[str], Iterable[Any]]) -> None:
        """Remember where the classes are before training, if they are to stay near."""
        config, tower = cast(ClassifyConfig, self.config), self._tower
        if config.near or config.same:
            read = getattr(tower.encoder, "untuned", tower.encoder.prepare)
            texts = expand_templates(config.classes, config.near_templates)
            was_training = tower.training
            tower.eval()
            inputs = {key: value.to(self.before.device) for key, value in _inputs(tower, texts, read).items()}
            self.before.copy_(_averaged(tower(inputs), len(config.classes)))
            tower.train(was_training)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are ``accuracy`` and, where asked for, ``near`` and ``same``.

        Raises:
            ValueError: a label is none of the classes.
        """
        config = cast(ClassifyConfig, self.config)
        labels = self._labels(step)
        here = step.present(config.field) & (labels >= 0)
        n = step.world.sum(here.sum())
        classes = self.classes()
        total = classes.sum() * 0 + idle(self)
        parts: dict[str, Tensor] = {}
        if step.has(config.field):
            counted = here[step.present(config.field)]
            items = F.normalize(step.embedding(config.field)[step.present(config.field)], dim=1)[counted]
            scale = step.model.temperature(config.temperature).scale
            logits, wanted = scale * items @ classes.T, labels[here]
            losses = F.cross_entropy(logits, wanted, reduction="none")
            parts["accuracy"] = (logits.argmax(1) == wanted).float().mean() if len(wanted) else logits.new_zeros(())
            if config.same:
                old = (scale * items @ self.before.T).detach().log_softmax(1)
                kept = F.kl_div(logits.log_softmax(1), old, reduction="none", log_target=True).sum(1)
                parts["same"] = kept.detach().mean() if len(kept) else kept.new_zeros(())
                losses = losses + config.same * kept
            total = total + losses.sum() * (step.world.size / n.clamp_min(1))
        if config.near:
            away = (classes - self.before).square().sum(1).mean()
            parts["near"] = away.detach()
            total = total + config.near * away
        return {"loss": total, **{name: value.detach() for name, value in parts.items()}}

    def classes(self) -> Tensor:
        """The classes' unit vectors now, [C, dim]."""
        prefix = "prompt_"
        inputs = {name.removeprefix(prefix): value for name, value in self.named_buffers() if name.startswith(prefix)}
        return _averaged(self._tower(inputs), len(self.index))

    @property
    def _tower(self) -> Tower:
        return self.__dict__["_tower"]

    def _labels(self, step: Step) -> Tensor:
        """The place of each sample's class, int64 [B]; -1 where it has no label."""
        found = [-1 if label is None else self.index.get(str(label), -2) for label in step.labels]
        if -2 in found:
            label = str(step.labels[found.index(-2)])
            raise ValueError(f"label {label!r} is none of objectives.classify.classes{near(label, self.index)}")
        return torch.tensor(found, dtype=torch.long, device=step.model.device)


def _inputs(tower: Tower, texts: list[str], prepare: Callable[[Any], Inputs]) -> Inputs:
    return tower.encoder.collate([prepare(text) for text in texts])


def _averaged(vectors: Tensor, classes: int) -> Tensor:
    """Unit vectors of the classes [C, dim] from those of their texts, class by class."""
    return F.normalize(F.normalize(vectors, dim=1).unflatten(0, (classes, -1)).mean(1), dim=1)
