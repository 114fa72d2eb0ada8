"""A prompt whose context moves with the picture: what a sample looks like says how the classes' names are read."""

from __future__ import annotations

from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import ConfigError, config
from mmrep.encoder import Encoder
from mmrep.evaluate.zero_shot import expand_templates
from mmrep.model import Model
from mmrep.objectives._labels import label_places
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step, idle
from mmrep.tokens import Encoding
from mmrep.tower import Tower


@config
class ConditionalPromptsConfig(ObjectiveConfig):
    """field: what is classified; its samples have labels, and as many views as are compared.

    text: the tower of a ``prompt-tuned-text`` encoder with a context. classes: all of them, as the labels name them.
    template: with ``{}`` for the name. temperature: which of the model's. views: of the field; the first is classified.
    consistency: weight of the squared distance between the classes' vectors in the first view and in each other.
    """

    field: str
    text: str
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    template: str = "{}"
    temperature: str = "default"
    views: Annotated[int, Field(ge=1)] = 3
    consistency: Annotated[float, Field(ge=0)] = 1.0


class ConditionalPrompts(Objective):
    """Cross-entropy over classes by prompts that depend on the sample, and the same prompts for all of its views.

    GOPro (Singha, Jha and Banerjee 2023, arXiv:2308.11605). From every layer ``l`` of the field's encoder come content,
    the mean token ``m``, and style, the mean of ``m`` and the deviation ``s`` of the tokens. All context vectors are
    moved by ``sum_l rho_l (A_l (m + s) / 2 + B_l m) / 2`` with learned ``A, B, rho``. The consistency is the mean over
    samples, classes and dimensions of the squared distance of unit vectors, a sum over the other views. GOPro's third
    term, a contrast of projected views, trains a projector that nothing else reads, and is left out.

    Every sample reads every class's prompt: C texts a sample and view. The net that moves the context is the
    objective's: it is in checkpoints, and the saved model reads the prompts without it.
    """

    Config = ConditionalPromptsConfig
    scope = "sample"

    def __init__(self, config: ConditionalPromptsConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        if problems := _problems(config, model, fields):
            raise ConfigError([f"objectives.conditional-prompts.{problem}" for problem in problems])
        tower, reader = model.tower(config.text), model.tower(fields[config.field]).encoder
        self.__dict__["_tower"] = tower  # seen, not owned
        self.index = {name: place for place, name in enumerate(config.classes)}
        prompts = expand_templates(config.classes, (config.template,))
        prepared = tower.encoder.collate([tower.encoder.prepare(prompt) for prompt in prompts])
        for name, value in prepared.items():
            self.register_buffer(f"prompt_{name}", value, persistent=False)
        width = cast(int, getattr(tower.encoder, "context_width", 0))
        widths = _layer_widths(reader)
        self.style = nn.ModuleList(nn.Linear(each, width) for each in widths)
        self.look = nn.ModuleList(nn.Linear(each, width) for each in widths)
        self.blend = nn.Linear(reader.depth, 1)

    def embedded(self) -> set[str]:
        """See `Objective.embedded`."""
        config = cast(ConditionalPromptsConfig, self.config)
        return {config.field, config.text}

    def raw(self) -> set[str]:
        """See `Objective.raw`: the layers of a frozen encoder are needed, too."""
        return {cast(ConditionalPromptsConfig, self.config).field}

    def count(self, step: Step) -> int:
        """See `Objective.count`: the samples that have the field and a label."""
        return int(
            (
                step.present(cast(ConditionalPromptsConfig, self.config).field)
                & (label_places(step, self.index, "conditional-prompts") >= 0)
            ).sum()
        )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are ``accuracy`` and ``consistency``.

        Raises:
            ValueError: a label is none of the classes.
        """
        config = cast(ConditionalPromptsConfig, self.config)
        labels, present = label_places(step, self.index, "conditional-prompts"), step.present(config.field)
        here = present & (labels >= 0)
        n = step.world.sum(here.sum()).clamp_min(1)
        if not here.any():
            return {"loss": idle(self) + idle(self._tower) + idle(step.tower(config.field))}
        rows = here[present]
        encodings = [self._encoding(step, view) for view in range(config.views)]
        tower = step.tower(config.field)
        items = F.normalize(tower.project(tower.pool(encodings[0])), dim=1)[rows]
        first, *others = [self.classes(self.shift(encoding)[rows]) for encoding in encodings]
        logits = step.model.temperature(config.temperature).scale * torch.einsum("nd,ncd->nc", items, first)
        losses = F.cross_entropy(logits, labels[here], reduction="none")
        apart = sum(((first - other).square().mean((1, 2)) for other in others), losses.new_zeros(len(losses)))
        total = (losses + config.consistency * apart).sum() * (step.world.size / n)
        accuracy = (logits.argmax(1) == labels[here]).float().mean()
        return {"loss": total, "accuracy": accuracy.detach(), "consistency": apart.detach().mean()}

    def classes(self, shift: Tensor) -> Tensor:
        """The classes' unit vectors [n, C, dim] where the context is moved by ``shift`` [n, token width]."""
        prefix, count, number = "prompt_", len(self.index), len(shift)
        inputs = {name.removeprefix(prefix): value for name, value in self.named_buffers() if name.startswith(prefix)}
        repeated = {name: value.repeat(number, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
        vectors = self._tower({**repeated, "shift": shift.repeat_interleave(count, 0)})
        return F.normalize(vectors, dim=1).unflatten(0, (number, count))

    def shift(self, encoding: Encoding) -> Tensor:
        """How far the context moves: [samples, token width]."""
        known = encoding.tokens.grid.valid
        moved: list[Tensor] = []
        for values, style, look in zip(encoding.layers, self.style, self.look, strict=True):
            same = known.shape[1] == values.shape[1]  # stages of a convolutional net have grids of their own, all valid
            valid = (known if same else torch.ones_like(values[..., 0], dtype=torch.bool))[..., None]
            count = valid.sum(1)
            mean = (values * valid).sum(1) / count
            deviation = (((values - mean[:, None]).square() * valid).sum(1) / count + 1e-8).sqrt()
            moved.append((style((mean + deviation) / 2) + look(mean)) / 2)
        return self.blend(torch.stack(moved, -1))[..., 0]

    def _encoding(self, step: Step, view: int) -> Encoding:
        field = cast(ConditionalPromptsConfig, self.config).field
        encoder = step.tower(field).encoder
        return encoder.encode(step.tokens(field, view), None, range(1, encoder.depth + 1))

    @property
    def _tower(self) -> Tower:
        return self.__dict__["_tower"]


@torch.no_grad()
def _layer_widths(encoder: Encoder) -> list[int]:
    """The width of each layer's tokens, which differ from stage to stage in some encoders."""
    was_training = encoder.training
    encoder.eval()
    items = [encoder.prepare(raw) for raw in encoder.examples(1, 0)]
    device = next(encoder.parameters()).device
    inputs = {name: value.to(device) for name, value in encoder.collate(items).items()}
    found = encoder.encode(encoder.tokenize(inputs), None, range(1, encoder.depth + 1)).layers
    encoder.train(was_training)
    return [values.shape[2] for values in found]


def _problems(config: ConditionalPromptsConfig, model: Model, fields: dict[str, str]) -> list[str]:
    if config.field not in fields:
        return [f"field: unknown {config.field!r}{near(config.field, fields)} Fields: {', '.join(fields)}"]
    if config.text not in model.config.towers:
        return [f"text: unknown tower {config.text!r}{near(config.text, model.config.towers)}"]
    problems: list[str] = []
    if not model.tower(fields[config.field]).encoder.depth:
        problems.append(f"field: the encoder of {config.field!r} gives no layers, from which the prompts are made")
    if not getattr(model.tower(config.text).encoder, "context_width", 0):
        problems.append("text: its encoder must be a prompt-tuned-text with a context, which is what moves")
    if len(set(config.classes)) < len(config.classes):
        problems.append("classes: one is named twice")
    if config.temperature not in model.temperatures:
        problems.append(f"temperature: unknown {config.temperature!r}{near(config.temperature, model.temperatures)}")
    return problems
