"""Prediction of hidden tokens: masked autoencoders, JEPA, data2vec and masked language models are settings of it.

A mask says which tokens of a field are visible and which are to be predicted; the encoder reads the visible ones; a
predictor says something of each hidden one; a target says what that should have been; a loss compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import field as default
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import Component, ConfigError, Of, component, config
from mmrep.data.sample import stable_hash
from mmrep.encoder import unsupported
from mmrep.losses.token_contrast import contrast
from mmrep.losses.tokenwise import LOSSES
from mmrep.masks.masker import Masker, maskable
from mmrep.model import Model
from mmrep.objectives._given import Given
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.predictors.predictor import Predictor, take
from mmrep.registry import near
from mmrep.step import Step, idle
from mmrep.targets.target import Target, look
from mmrep.tokens import Content, Grid, Mask, Tokens, index_set, keep_special
from mmrep.views.view import uniform


@config
class MaskedConfig(ObjectiveConfig):
    """field: whose tokens are predicted. view: which of its views the encoder reads. of: the view whose tokens are
    predicted, if it is another one: ``view`` is then an altered reading of it, token for token.

    input: what the encoder reads: only the ``visible`` tokens (MAE, I-JEPA), or all of them with a learned
    ``mask-token`` in the hidden places (SimMIM, BEiT, HuBERT). mask, predictor, target: see their registries; without a
    mask (null) nothing is hidden, and all tokens of ``of`` are predicted from the altered view (TERA). loss: by name;
    None = the target's first. negatives, temperature: of the loss ``contrastive`` alone; the distractors of a token are
    other hidden tokens of its sample, so many drawn with replacement, or ``all``.

    condition: the view's parameters that the predictor is told, and how many figures each has: ``{crop: 4}``. given:
    other fields of the sample, all of whose tokens the predictor gets too. own: it also gets the visible tokens of the
    field itself; false = everything hidden is predicted from the given fields alone.
    """

    field: str
    view: int = 0
    of: int | None = None
    input: Literal["visible", "mask-token"] = "visible"
    mask: Annotated[Component | None, Of("masks")] = default(default_factory=lambda: component("masks", "random"))
    predictor: Annotated[Component, Of("predictors")] = default(
        default_factory=lambda: component("predictors", "transformer")
    )
    target: Annotated[Component, Of("targets")] = default(default_factory=lambda: component("targets", "content"))
    loss: str | None = None
    condition: dict[str, Annotated[int, Field(ge=1)]] = default(default_factory=dict[str, int])
    given: tuple[str, ...] = ()
    own: bool = True
    negatives: Annotated[int, Field(ge=1)] | Literal["all"] = 100
    temperature: Annotated[float, Field(gt=0)] = 0.1
    weight: Annotated[float, Field(ge=0)] = 1.0


class Masked(Objective):
    """The mean over samples of the mean over a sample's hidden tokens of the loss of each.

    A sample without hidden tokens (of one token) counts with a loss of 0.
    """

    Config = MaskedConfig
    scope = "sample"

    def __init__(self, config: MaskedConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        unknown = [name for name in (config.field, *config.given) if name not in fields]
        if unknown:
            raise ConfigError([
                f"objectives.masked: unknown field {name!r}{near(name, fields)} Fields: {', '.join(fields)}"
                for name in unknown
            ])  # fmt: skip
        tower = model.tower(fields[config.field])
        self.__dict__["_tower"] = tower  # seen, not owned
        self.masker: Masker | None = None if config.mask is None else config.mask.build()
        try:
            self._refuse(config, model, fields)
            self.target: Target = config.target.build(tower)
            self.predictor: Predictor = config.predictor.build(
                width=tower.encoder.width, out=self.target.width, axes=look(tower.encoder).axes,
                condition=sum(config.condition.values()),
            )  # fmt: skip
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError([f"objectives.masked ({config.field}): {error}"]) from error
        self.given = Given(config.given, model, fields, tower.encoder.width) if config.given else None
        self.token = None
        if config.input == "mask-token":
            self.token = nn.Parameter(0.02 * torch.randn(tower.encoder.width))
        problems = list(self._problems(config))
        if problems:
            raise ConfigError([f"objectives.masked.{problem}" for problem in problems])
        chosen = config.loss or self.target.losses[0]
        self.loss = None if chosen == "contrastive" else LOSSES[chosen]

    def _refuse(self, config: MaskedConfig, model: Model, fields: dict[str, str]) -> None:
        tower = model.tower(fields[config.field])
        if tower.config.frozen:
            raise ValueError(f"tower {fields[config.field]!r} is frozen: nothing would learn from its hidden tokens")
        need = "mask_token" if config.input == "mask-token" else "drop_tokens"
        if config.mask is not None and need not in tower.encoder.supports:
            raise ValueError(unsupported(tower.encoder, need))

    def _problems(self, config: MaskedConfig) -> Iterator[str]:
        allowed = self.target.losses
        if config.loss is not None and config.loss not in allowed:
            hint = near(config.loss, allowed)
            yield f"loss: {config.loss!r} does not fit this target{hint} One of: {', '.join(allowed)}"
        if config.field in config.given:
            yield f"given: {config.field!r} is what is predicted"
        if not config.own and (not config.given or config.input == "mask-token"):
            yield "own: false predicts from `given` fields alone: name some, and use input: visible"
        if config.mask is None and config.input == "mask-token":
            yield "input: mask-token hides nothing without a mask"
        if config.mask is None and config.of in (None, config.view):
            yield "mask: null predicts what is seen: name in `of` another view, of which this one is an altered reading"
        if self.predictor.needs_hidden and config.input == "visible" and config.mask is not None:
            yield (
                f"predictor: {config.predictor.type!r} reads the encoder's output at the hidden places, which input: "
                "visible does not compute; use input: mask-token, or predictor: {type: transformer}"
            )

    def fit(self, samples: Callable[[str], Iterable[Any]]) -> None:
        """See `Objective.fit`: what the target learns."""
        self.target.fit(samples(cast(MaskedConfig, self.config).field))

    def taught(self) -> list[nn.Module]:
        """See `Objective.taught`."""
        return self.target.taught(self.__dict__["_tower"])

    def embedded(self) -> set[str]:
        """No embedding is asked for."""
        return set()

    def raw(self) -> set[str]:
        """See `Objective.raw`."""
        return {self.config.field, *self.config.given}

    def count(self, step: Step) -> int:
        """See `Objective.count`: the samples that have the field."""
        return int(self._counted(step).sum())

    def _counted(self, step: Step) -> Tensor:
        """Bool [B]: the samples that have the field, and something to predict it from."""
        config = cast(MaskedConfig, self.config)
        here = step.present(config.field)
        return here if config.own else here & torch.stack([step.present(name) for name in config.given]).any(0)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are those of the target."""
        config = cast(MaskedConfig, self.config)
        here, counted = step.present(config.field), self._counted(step)
        n = step.world.sum(counted.sum())
        if not step.has(config.field):
            towers = [step.tower(name).encoder for name in (config.field, *config.given)]
            nothing = sum((idle(encoder) for encoder in towers), idle(self))
            self.target.absent(step)
            return {"loss": nothing * step.world.size + self.target.parts().get("loss", 0)}
        tokens = step.tokens(config.field, config.view)
        seeds = step.batch.seeds[here] + stable_hash(config.field, config.view, "mask", config.name)
        mask = _everything(tokens.grid) if self.masker is None else self.masker(tokens.grid, seeds, step.clock.progress)
        predicted, target = self.predict(step, tokens, mask)
        wanted = self.target(step, config.field, config.view if config.of is None else config.of)
        if wanted.values.shape[:2] != tokens.grid.valid.shape:
            raise ConfigError([
                f"objectives.masked.of: view {config.of} of {config.field!r} has {wanted.values.shape[1]} tokens, and "
                f"view {config.view} has {tokens.values.shape[1]}: an altered reading keeps every token in its place"
            ])  # fmt: skip
        each = self._each(predicted, wanted, target, mask.target.shape[1], seeds)
        loss = (each * counted[here]).sum() * (step.world.size / n.clamp_min(1))
        parts = dict(self.target.parts())
        if (extra := parts.pop("loss", None)) is not None:
            loss = loss + extra
        return {"loss": loss, **parts}

    def predict(self, step: Step, tokens: Tokens, mask: Mask) -> tuple[Tensor, Tensor]:
        """What is predicted: [B * groups, Nt, width], and of which tokens: int64 [B * groups, Nt]."""
        config = cast(MaskedConfig, self.config)
        contexts, groups = mask.visible.shape[1], mask.target.shape[1]
        visible, target = mask.visible.flatten(0, 1), mask.target.flatten(0, 1)
        encoder = step.tower(config.field).encoder
        if config.mask is None:
            context = encoder.encode(tokens).tokens
            index = torch.arange(context.values.shape[1], device=target.device).expand(len(target), -1)
        elif config.input == "visible":
            context = encoder.encode(tokens.repeat(contexts), visible).tokens
            index = keep_special(visible, tokens.grid.repeat(contexts))
            if contexts == 1 < groups:
                context, index = context.repeat(groups), index.repeat_interleave(groups, 0)
        else:
            assert self.token is not None
            context = encoder.encode(tokens.repeat(groups).hide(target, self.token)).tokens
            index = torch.arange(context.values.shape[1], device=target.device).expand(len(target), -1)
        reached = 0
        if not config.own:
            reached = context.values.sum() * 0  # its encoder takes part in the processes' reduction of gradients
            grid, index = context.grid, index[:, :0]
            nothing = Grid(coords=grid.coords[:, :0], valid=grid.valid[:, :0], special=grid.special[:, :0])
            context = Tokens(context.values[:, :0], nothing)
        if self.given is not None:
            context, index = self.given(step, config.field, context, index, groups)
            context = replace(context, values=context.values + reached)
        return self.predictor(context, index, tokens.repeat(groups), target, self._condition(step, groups)), target

    def _condition(self, step: Step, groups: int) -> Tensor | None:
        config = cast(MaskedConfig, self.config)
        if not config.condition:
            return None
        params = step.params(config.field, config.view)
        for name, width in config.condition.items():
            found = params[name][0].numel() if name in params else None
            if found != width:
                known = ", ".join(f"{key}: {value[0].numel()}" for key, value in params.items()) or "none"
                raise ConfigError([
                    f"objectives.masked.condition.{name}: {width}, but view {config.view} of {config.field!r} has "
                    f"{'no such parameter' if found is None else found}; it has {{{known}}}"
                ])  # fmt: skip
        columns = [params[name].float().reshape(len(params[name]), -1) for name in config.condition]
        return torch.cat(columns, 1)[:, None].repeat_interleave(groups, 0)

    def _each(self, predicted: Tensor, wanted: Content, target: Tensor, groups: int, seeds: Tensor) -> Tensor:
        """The mean loss of each sample's hidden tokens, [B]."""
        valid = target >= 0
        losses = self._losses(predicted, wanted, target, groups, seeds)
        sample = torch.arange(len(target), device=target.device).div(groups, rounding_mode="floor")
        sample = sample[:, None].expand_as(target)[valid]
        B = len(target) // groups
        sums = losses.new_zeros(B).index_add(0, sample, losses)
        counts = losses.new_zeros(B).index_add(0, sample, torch.ones_like(losses))
        return sums / counts.clamp_min(1)

    def _losses(self, predicted: Tensor, wanted: Content, target: Tensor, groups: int, seeds: Tensor) -> Tensor:
        """The loss of each of the n hidden tokens of ``target`` [R, T], in its order: [n]."""
        valid = target >= 0
        values = take(wanted.values.repeat_interleave(groups, 0), target)
        predicted = predicted if predicted.dtype == torch.float64 else predicted.float()
        if values.is_floating_point():
            values = values.to(predicted.dtype)
        if self.loss is None:
            return self._contrast(predicted, values, valid, groups, seeds)[valid]
        observed = wanted.observed
        if observed is not None:
            observed = take(observed.repeat_interleave(groups, 0), target)[valid]
        return self.loss(predicted[valid], values[valid], observed)

    def _contrast(self, predicted: Tensor, values: Tensor, valid: Tensor, groups: int, seeds: Tensor) -> Tensor:
        config = cast(MaskedConfig, self.config)
        T, M = valid.shape[1], config.negatives
        if M == "all":
            return contrast(predicted, values, valid, None, config.temperature)
        # A stream for each group: the numbers of a token must not depend on how many slots its batch has.
        noise = torch.stack([uniform(seeds, T * M, stream=1 + group) for group in range(groups)], 1)
        return contrast(predicted, values, valid, noise.view(-1, T, M), config.temperature)

    def after_optimizer_step(self) -> None:
        """See `Objective.after_optimizer_step`."""
        self.target.after_optimizer_step()


def _everything(grid: Grid) -> Mask:
    """All tokens that a mask may name are predicted, and none is hidden: int64 [B, 1, K] both."""
    index = index_set(maskable(grid))[:, None]
    return Mask(visible=index, target=index)
