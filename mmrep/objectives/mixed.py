"""Two samples in one sequence: each is painted from its own part, and tokens recognise those of their own sample."""

from __future__ import annotations

from dataclasses import field as default
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrep.config import Component, ConfigError, Of, component, config
from mmrep.data.sample import stable_hash
from mmrep.encoder import unsupported
from mmrep.losses.tokenwise import LOSSES
from mmrep.masks.masker import draw, lowest, share
from mmrep.model import Model
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.predictors.predictor import Predictor, take
from mmrep.registry import near
from mmrep.step import Step, idle
from mmrep.targets.content import ContentTarget, ContentTargetConfig
from mmrep.targets.target import look
from mmrep.tokens import Inputs, Tokens, index_set, keep_special


@config
class MixedConfig(ObjectiveConfig):
    """field: whose tokens are mixed; of a regular grid of one size. view: which of its views.

    ratio: share of a mixture's tokens that come from the first of its two samples. predictor: see its registry.
    normalize: of the content, as in the target ``content``. recognition: weight of the contrast of a mixture's tokens.
    temperature: of it.
    """

    field: str
    view: int = 0
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    predictor: Annotated[Component, Of("predictors")] = default(
        default_factory=lambda: component("predictors", "transformer")
    )
    normalize: bool = True
    recognition: Annotated[float, Field(ge=0)] = 0.1
    temperature: Annotated[float, Field(gt=0)] = 0.25
    weight: Annotated[float, Field(ge=0)] = 1.0


class Mixed(Objective):
    """MixedAE (Chen et al. 2023, arXiv:2303.17152, section 3): reconstruction + recognition of homologous tokens.

    Of every token of a mixture the content is that of sample i, or of the next sample of the batch, of all processes
    (the first follows the last); the encoder reads all of them. Each of the two samples is painted, where its own
    tokens are not, from its own encoded tokens alone. Recognition is ``mean over tokens of -1 / |P| * sum over p in P
    of log softmax(cos / T)`` among the other tokens of the mixture, P those of the same sample. With micro-batches the
    next sample is one of the same micro-batch. The paper's attention, which picks the most similar tokens, is left out.
    """

    Config = MixedConfig
    scope = "sample"

    def __init__(self, config: MixedConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        if config.field not in fields:
            hint = near(config.field, fields)
            raise ConfigError([f"objectives.mixed.field: unknown {config.field!r}{hint} Fields: {', '.join(fields)}"])
        tower = model.tower(fields[config.field])
        if tower.frozen:
            raise ConfigError([f"objectives.mixed: tower {fields[config.field]!r} is frozen: nothing would learn"])
        if missing := {"mask_token", "content"} - tower.encoder.supports:
            raise ConfigError([f"objectives.mixed: {unsupported(tower.encoder, min(missing))}"])
        try:
            self.target = ContentTarget(ContentTargetConfig(normalize=config.normalize), tower)
            self.predictor: Predictor = config.predictor.build(
                width=tower.encoder.width, out=self.target.width, axes=look(tower.encoder).axes
            )
        except ValueError as error:
            raise ConfigError([f"objectives.mixed: {error}"]) from error
        if self.predictor.needs_hidden:
            raise ConfigError(
                [f"objectives.mixed.predictor: {config.predictor.type!r} reads what is hidden; use another"]
            )
        self.loss = LOSSES[self.target.losses[0]]

    def embedded(self) -> set[str]:
        """No embedding is asked for."""
        return set()

    def raw(self) -> set[str]:
        """See `Objective.raw`."""
        return {cast(MixedConfig, self.config).field}

    def count(self, step: Step) -> int:
        """See `Objective.count`: the samples that have the field."""
        return int(step.present(cast(MixedConfig, self.config).field).sum())

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are ``reconstruction`` and ``recognition``, without its weight.

        Raises:
            ValueError: the tokens are no full grid.
        """
        config = cast(MixedConfig, self.config)
        n = step.world.sum(step.present(config.field).sum())
        encoder = step.tower(config.field).encoder
        following = self._following(step)
        if not step.has(config.field):
            return {"loss": (idle(encoder) + idle(self)) * step.world.size}
        tokens = step.tokens(config.field, config.view)
        if tokens.grid.shape is None:
            raise ValueError("objective 'mixed' puts tokens of two samples into one grid, and these are ragged")
        seeds = step.batch.seeds[step.present(config.field)] + stable_hash(config.field, config.view, "mixed")
        plain = tokens.grid.valid & ~tokens.grid.special
        own = lowest(draw(seeds, 1, plain.shape[1]), plain, share(config.ratio, plain.sum(1)))
        partner = torch.cat([tokens.values[1:], encoder.tokenize(following).values])
        mixed = torch.where((own | ~plain)[..., None], tokens.values, partner)
        encoded = encoder.encode(Tokens(mixed, tokens.grid, tokens.positions)).tokens
        content = self.target(step, config.field, config.view).values
        after = self.target.of(encoder.content(following)).values
        sides = ((own, content), (plain & ~own, torch.cat([content[1:], after])))
        painted = [self._paint(encoded, tokens, side, plain & ~side, wanted) for side, wanted in sides]
        reconstruction = (painted[0] + painted[1]) / 2
        recognition = recognise(encoded.values, own, plain, config.temperature)
        each = reconstruction + config.recognition * recognition
        return {
            "loss": each.sum() * (step.world.size / n.clamp_min(1)),
            "reconstruction": reconstruction.detach().mean(),
            "recognition": recognition.detach().mean(),
        }

    def _following(self, step: Step) -> Inputs:
        """The inputs [1, ...] of the sample after this process's last: the first that some later process has."""
        config = cast(MixedConfig, self.config)
        if step.has(config.field):
            first = {name: value[:1] for name, value in step.inputs(config.field, config.view).items()}
        else:  # what another process gathers has this shape
            first = {name: value[:0] for name, value in look(step.tower(config.field).encoder).inputs.items()}
        firsts = {name: step.world.gather(value) for name, value in sorted(first.items())}
        mine = next(iter(first.values()))
        place = step.world.offset(len(mine)) + 1
        return {name: value[[place % len(value)]] if len(value) else value for name, value in firsts.items()}

    def _paint(self, encoded: Tokens, tokens: Tokens, seen: Tensor, hidden: Tensor, wanted: Tensor) -> Tensor:
        """The mean loss [B] of what is predicted ``hidden`` bool [B, N] from what is ``seen`` bool [B, N]."""
        visible, target = index_set(seen), index_set(hidden)
        context, index = encoded.keep(visible), keep_special(visible, tokens.grid)
        predicted = self.predictor(context, index, tokens, target)
        predicted = predicted if predicted.dtype == torch.float64 else predicted.float()
        values, valid = take(wanted, target), target >= 0
        values = values.to(predicted.dtype) if values.is_floating_point() else values
        losses = torch.zeros_like(valid, dtype=predicted.dtype)
        losses = losses.masked_scatter(valid, self.loss(predicted[valid], values[valid], None))
        return losses.sum(1) / valid.sum(1).clamp_min(1)


def recognise(values: Tensor, own: Tensor, plain: Tensor, temperature: float) -> Tensor:
    """The contrast [B] of the tokens of each mixture; see `Mixed`.

    Args:
        values: [B, N, D].
        own: bool [B, N], the tokens of the first sample.
        plain: bool [B, N], the tokens that count.
        temperature: of the cosines.
    """
    values = F.normalize(values if values.dtype == torch.float64 else values.float(), dim=-1)
    with torch.autocast(values.device.type, enabled=False):
        logits = values @ values.mT / temperature
    alike = own[:, :, None] == own[:, None]
    others = plain[:, None] & ~torch.eye(plain.shape[1], dtype=torch.bool, device=plain.device)
    logs = logits - logits.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
    positives = alike & others
    counted = plain & positives.any(-1)  # a token that is alone of its sample has nothing to recognise
    each = -(logs.masked_fill(~positives, 0)).sum(-1) / positives.sum(-1).clamp_min(1)
    return each.masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp_min(1)
