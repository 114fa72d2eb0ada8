"""Which tokens are not the original ones: a small generator fills hidden places, the encoder finds what it replaced."""

from __future__ import annotations

from dataclasses import field as default
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.blocks import Transformer
from mmrep.config import Component, ConfigError, Of, component, config
from mmrep.data.sample import stable_hash
from mmrep.encoder import unsupported
from mmrep.masks.masker import Masker
from mmrep.model import Model
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step, idle
from mmrep.targets.target import look
from mmrep.tokens import Tokens, indicator
from mmrep.views.view import uniform


@config
class GeneratorConfig:
    """width, depth, heads: of the generator; a quarter to a half of the encoder's width works best (section 3.2)."""

    width: Annotated[int, Field(ge=1)] = 48
    depth: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 2

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")


@config
class ReplacedConfig(ObjectiveConfig):
    """field: whose tokens are replaced; their content must be codes, as that of text is. view: which of its views.

    mask: which tokens the generator fills. generator: its size. found: weight of finding what it replaced, beside the
    generator's own loss.
    """

    field: str
    view: int = 0
    mask: Annotated[Component, Of("masks")] = default(default_factory=lambda: component("masks", "random", ratio=0.15))
    generator: GeneratorConfig = default(default_factory=GeneratorConfig)
    found: Annotated[float, Field(ge=0)] = 50.0
    weight: Annotated[float, Field(ge=0)] = 1.0


class Replaced(Objective):
    """ELECTRA (Clark et al. 2020, arXiv:2003.10555, section 2): replaced token detection.

    The generator guesses the hidden tokens (cross-entropy, mean over those of a sample); one is drawn from what it
    thinks of each; the encoder reads the text with these in place of the hidden, and says of every token whether it is
    another than in the original (binary cross-entropy, mean over a sample's tokens). A drawn token that happens to be
    the original counts as such. No gradient passes through what was drawn. Generator and encoder share the embeddings
    that `Encoder.tokenize` makes. The generator is not saved with the model.
    """

    Config = ReplacedConfig
    scope = "sample"

    def __init__(self, config: ReplacedConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        if config.field not in fields:
            hint = near(config.field, fields)
            raise ConfigError(
                [f"objectives.replaced.field: unknown {config.field!r}{hint} Fields: {', '.join(fields)}"]
            )
        tower = model.tower(fields[config.field])
        encoder = tower.encoder
        problems: list[str] = []
        if tower.frozen:
            problems.append(f"tower {fields[config.field]!r} is frozen: it would learn nothing")
        vocabulary = None
        if not {"mask_token", "content"} <= encoder.supports:
            missing = next(name for name in ("content", "mask_token") if name not in encoder.supports)
            problems.append(unsupported(encoder, missing))
        else:
            vocabulary = encoder.content(look(encoder).inputs).vocabulary
            if vocabulary is None:
                problems.append(
                    f"{tower.modality} tokens are no codes: none of them can be put in the place of another"
                )
        if problems:
            raise ConfigError([f"objectives.replaced ({config.field}): {problem}" for problem in problems])
        assert vocabulary is not None
        self.vocabulary = vocabulary
        self.masker: Masker = config.mask.build()
        width, size = encoder.width, config.generator
        self.token = nn.Parameter(0.02 * torch.randn(width))
        self.embed = nn.Linear(width, size.width)
        self.transformer = Transformer(size.width, size.depth, size.heads)
        self.norm = nn.LayerNorm(size.width)
        self.guess = nn.Linear(size.width, vocabulary)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def embedded(self) -> set[str]:
        """No embedding is asked for."""
        return set()

    def raw(self) -> set[str]:
        """See `Objective.raw`."""
        return {cast(ReplacedConfig, self.config).field}

    def count(self, step: Step) -> int:
        """See `Objective.count`: the samples that have the field."""
        return int(step.present(cast(ReplacedConfig, self.config).field).sum())

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`.

        Parts: ``generator`` and ``found``, the two losses, of this process's samples; ``replaced``, the share of tokens
        that are not the original; ``accuracy`` of saying so.
        """
        config = cast(ReplacedConfig, self.config)
        here = step.present(config.field)
        n = step.world.sum(here.sum())
        encoder = step.tower(config.field).encoder
        if not step.has(config.field):
            return {"loss": (idle(encoder) + idle(self)) * step.world.size}
        tokens, content = step.tokens(config.field, config.view), step.content(config.field, config.view)
        seeds = step.batch.seeds[here] + stable_hash(config.field, config.view, "replaced", config.name)
        target = self.masker(tokens.grid, seeds, step.clock.progress).target[:, 0]
        hidden = indicator(target, tokens.values.shape[1])
        logits = self.guesses(tokens.hide(target, self.token))
        losses = F.cross_entropy(logits.transpose(1, 2), content.values, reduction="none")
        generator = _mean(losses, hidden)
        codes = torch.where(hidden, draw(logits.detach(), seeds), content.values)
        read = encoder.tokenize(encoder.recode(step.inputs(config.field, config.view), codes))
        said = self.head(encoder.encode(read).tokens.values)[..., 0].float()
        among = tokens.grid.valid & ~tokens.grid.special
        other = codes != content.values
        found = _mean(F.binary_cross_entropy_with_logits(said, other.to(said.dtype), reduction="none"), among)
        loss = (generator + config.found * found).sum() * (step.world.size / n.clamp_min(1))
        right = ((said > 0) == other).float()
        parts = {"generator": generator, "found": found, "replaced": _mean(other.float(), among)}
        parts["accuracy"] = _mean(right, among)
        return {"loss": loss, **{name: each.detach().mean() for name, each in parts.items()}}

    def guesses(self, tokens: Tokens) -> Tensor:
        """What the generator thinks of every place: logits float32 [B, N, vocabulary]."""
        valid = tokens.grid.valid
        values, _ = self.transformer(self.embed(tokens.values), None if bool(valid.all()) else valid)
        return self.guess(self.norm(values)).float()


def draw(logits: Tensor, seeds: Tensor) -> Tensor:
    """One code of each place by its probability, by the Gumbel trick from the sample's seed: int64 [B, N]."""
    noise = uniform(seeds, logits.shape[1] * logits.shape[2], stream=1).view(logits.shape).clamp_min(2.0**-25)
    return (logits - (-noise.log()).log()).argmax(-1)


def _mean(values: Tensor, among: Tensor) -> Tensor:
    """Of [B, N], the mean of each row where bool ``among``: [B]."""
    weight = among.to(values.dtype)
    return (values * weight).sum(1) / weight.sum(1).clamp_min(1)
