"""Prediction of hidden tokens: masked autoencoders, JEPA, data2vec and masked language models are settings of it.

A mask says which tokens of a field are visible and which are to be predicted; the encoder reads the visible ones; a
predictor says something of each hidden one; a target says what that should have been; a loss compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmrep.config import ConfigError
from mmrep.data.sample import stable_hash
from mmrep.losses.token_contrast import contrast
from mmrep.losses.tokenwise import LOSSES
from mmrep.masks.masker import Masker
from mmrep.model import Model
from mmrep.objectives._agreement import disagreement
from mmrep.objectives._condition import reciprocal_rank, told
from mmrep.objectives._given import Given
from mmrep.objectives._masked_config import MaskedConfig, check_tower, problems_of
from mmrep.objectives.objective import Objective
from mmrep.predictors.predictor import Predictor, take
from mmrep.registry import near
from mmrep.step import Step, idle
from mmrep.targets.target import Reading, Target, look
from mmrep.tokens import Content, Grid, Mask, Tokens, index_set, keep_special
from mmrep.views.view import uniform

Seen = tuple[Tokens, Tensor, Tensor]
"""Context, its index and the targets of the predictor."""


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
            check_tower(config, tower, fields[config.field])
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
        if config.input != "visible" and config.mask is not None:
            self.token = nn.Parameter(0.02 * torch.randn(tower.encoder.width))
        problems = list(problems_of(config, self.target, self.predictor))
        if problems:
            raise ConfigError([f"objectives.masked.{problem}" for problem in problems])
        chosen = config.loss or self.target.losses[0]
        self.loss = LOSSES.get(chosen)
        self.chosen = chosen

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
        """See `Objective.forward`; parts are those of the target, and ``agreement``, the mean of what it weighs.

        Of codes also ``plateau``, the loss over log K: it stays at 1 where nothing but their number is known.
        """
        config = cast(MaskedConfig, self.config)
        here, counted = step.present(config.field), self._counted(step)
        n = step.world.sum(counted.sum())
        if not step.has(config.field):
            towers = [step.tower(name).encoder for name in (config.field, *config.given)]
            nothing = sum((idle(encoder) for encoder in towers), idle(self))
            self.target.absent(step)
            loss = nothing * step.world.size
            return {"loss": loss + self.target.parts().get("loss", 0), **self._plateau(nothing)}
        tokens = step.tokens(config.field, config.view)
        own = (config.field, config.view, "mask", config.name)
        seeds = step.batch.seeds[here] + stable_hash(*(own if config.tied is None else ("tied", config.tied)))
        mask = self._mask(tokens.grid, seeds, step.clock.progress)
        groups, seen = mask.target.shape[1], self._context(step, tokens, mask)
        wanted = self.target(step, config.field, config.view if config.target_view is None else config.target_view)
        if wanted.values.shape[:2] != tokens.values.shape[:2]:
            raise ConfigError([
                f"objectives.masked.target_view: view {config.target_view} of {config.field!r} has "
                f"{wanted.values.shape[1]} tokens, and view {config.view} has {tokens.values.shape[1]}: an altered "
                "reading keeps every token in its place"
            ])  # fmt: skip
        condition = self._condition(step, groups)

        def judge(predicted: Tensor) -> Tensor:
            return self._compared(step, predicted, wanted, seen[2], groups, seeds)

        predicted = self._say(tokens, seen, groups, condition)
        each = judge(predicted)
        loss = (each * counted[here]).sum() * (step.world.size / n.clamp_min(1))
        parts = {**self.target.parts(), **self._plateau(loss)}
        if config.agreement:
            apart = disagreement(predicted, seen[2], groups, tokens.grid.valid.shape[1])
            loss = loss + config.agreement * (apart * counted[here]).sum() * (step.world.size / n.clamp_min(1))
            parts["agreement"] = (1 - apart.detach()).mean()
        if (extra := parts.pop("loss", None)) is not None:
            loss = loss + extra
        if config.alternatives and condition is not None:
            turned = partial(torch.roll, condition, dims=0)

            def told_otherwise(k: int) -> Tensor:
                return judge(self._say(tokens, seen, groups, turned(shifts=-k * groups)))

            parts["mrr"] = reciprocal_rank(each.detach(), told_otherwise, config.alternatives)
        return {"loss": loss, **parts}

    def _plateau(self, loss: Tensor) -> dict[str, Tensor]:
        """The share of log K that is left, where the loss is a cross-entropy over K codes."""
        choices = self.target.choices if self.loss is LOSSES["cross-entropy"] else 0
        return {"plateau": loss.detach() / math.log(choices)} if choices > 1 else {}

    def _mask(self, grid: Grid, seeds: Tensor, progress: float) -> Mask:
        if self.masker is not None:
            return self.masker(grid, seeds, progress)
        everything = index_set(grid.valid & ~grid.special)[:, None]
        return Mask(visible=everything, target=everything)

    def _say(self, tokens: Tokens, seen: Seen, groups: int, condition: Tensor | None) -> Tensor:
        """What is predicted: [B * groups, Nt, width]."""
        context, index, target = seen
        return self.predictor(context, index, tokens.repeat(groups), target, condition)

    def _compared(
        self, step: Step, predicted: Tensor, wanted: Content, target: Tensor, groups: int, seeds: Tensor
    ) -> Tensor:
        """The loss of each sample, [B]."""
        config = cast(MaskedConfig, self.config)
        if self.chosen != "own":
            return self._each(predicted, wanted, target, groups, seeds)
        predicted = predicted if predicted.dtype == torch.float64 else predicted.float()
        each = self.target.distance(step, predicted, wanted, target, Reading(config.field, config.view))
        return each.view(-1, groups).mean(1)

    def _context(self, step: Step, tokens: Tokens, mask: Mask) -> Seen:
        """What the predictor sees, where it stands, and which tokens are to be predicted."""
        config = cast(MaskedConfig, self.config)
        contexts, groups = mask.visible.shape[1], mask.target.shape[1]
        visible, target = mask.visible.flatten(0, 1), mask.target.flatten(0, 1)
        encoder = step.tower(config.field).encoder
        if self.masker is None:
            context = step.encoding(config.field, config.view).tokens
            index = torch.arange(context.values.shape[1], device=target.device).expand(len(target), -1)
        elif config.input == "visible":
            context = encoder.encode(tokens.repeat(contexts), visible).tokens
            index = keep_special(visible, tokens.grid.repeat(contexts))
            if contexts == 1 < groups:
                context, index = context.repeat(groups), index.repeat_interleave(groups, 0)
        elif config.input == "unplaced":
            assert self.token is not None
            shown = torch.cat([visible.repeat_interleave(groups // contexts, 0), target], 1)
            unplaced = tokens.repeat(groups).unplace(target, self.token)
            context, index = encoder.encode(unplaced, shown).tokens, keep_special(shown, unplaced.grid)
        else:
            assert self.token is not None
            context = encoder.encode(tokens.repeat(groups).hide(target, self.token)).tokens
            index = torch.arange(context.values.shape[1], device=target.device).expand(len(target), -1)
        if config.everywhere:
            marks = tokens.grid.valid & ~tokens.grid.special
            target = index_set(marks.repeat_interleave(groups, 0))
        reached = 0
        if not config.own:
            reached = context.values.sum() * 0  # its encoder takes part in the processes' reduction of gradients
            grid, index = context.grid, index[:, :0]
            nothing = Grid(coords=grid.coords[:, :0], valid=grid.valid[:, :0], special=grid.special[:, :0])
            context = Tokens(context.values[:, :0], nothing)
        if self.given is not None:
            context, index = self.given(step, config.field, context, index, groups)
            context = replace(context, values=context.values + reached)
        return context, index, target

    def _condition(self, step: Step, groups: int) -> Tensor | None:
        config = cast(MaskedConfig, self.config)
        if not config.condition:
            return None
        figures = told(step, config.field, config.view, config.condition, "objectives.masked.condition")
        return figures[:, None].repeat_interleave(groups, 0)

    def _each(self, predicted: Tensor, wanted: Content, target: Tensor, groups: int, seeds: Tensor) -> Tensor:
        """The mean loss of each sample's hidden tokens, [B]."""
        losses = self._losses(predicted, wanted, target, groups, seeds)
        valid = target >= 0
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
