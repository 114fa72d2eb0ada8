"""Self-distillation of what views are assigned to: DINO, and with its patch loss iBOT and DINOv2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import field as default
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import Component, ConfigError, Of, component, config
from mmrep.data.sample import stable_hash
from mmrep.encoder import unsupported
from mmrep.masks.masker import Masker
from mmrep.model import Model
from mmrep.objectives._assign import Assign, AssignConfig
from mmrep.objectives._heads import MLP, Norm, Prototypes
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step
from mmrep.tokens import index_set, indicator
from mmrep.views.view import uniform
from mmrep.world import World


@config
class HeadConfig:
    """prototypes: K. hidden, layers, norm: of the MLP; its last map goes to ``bottleneck`` and to unit length.

    freeze: so many first steps (below 1, a share of the run) in which the prototypes do not learn.
    """

    prototypes: Annotated[int, Field(ge=2)] = 65536
    hidden: Annotated[int, Field(ge=1)] = 2048
    bottleneck: Annotated[int, Field(ge=1)] = 256
    layers: Annotated[int, Field(ge=1)] = 3
    norm: Norm = "none"
    freeze: Annotated[float, Field(ge=0)] = 0.01


@config
class PatchConfig:
    """The patch loss of iBOT. mask: of the tokens of a global view. share: of samples that are masked, by their seeds.

    head: of the tokens; null = the one of the views. assign: of the teacher's tokens. weight: beside that of views.
    """

    mask: Annotated[Component, Of("masks")] = default(default_factory=lambda: component("masks", "random", ratio=0.3))
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    head: HeadConfig | None = None
    assign: AssignConfig = default(default_factory=AssignConfig)
    weight: Annotated[float, Field(ge=0)] = 1.0


@config
class DINOConfig(ObjectiveConfig):
    """field: whose views. globals: views that the teacher reads. locals: further ones (small crops) of the student.

    head: what turns pooled features into logits. assign: how the teacher's become probabilities. temperature: of the
    student. patch: null = none.
    """

    field: str
    globals: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1)
    locals: tuple[int, ...] = ()
    head: HeadConfig = default(default_factory=HeadConfig)
    assign: AssignConfig = default(default_factory=AssignConfig)
    temperature: Annotated[float, Field(gt=0)] = 0.1
    patch: PatchConfig | None = None
    weight: Annotated[float, Field(ge=0)] = 1.0


class Head(nn.Module):
    """MLP, unit length, prototypes."""

    def __init__(self, config: HeadConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.mlp = MLP([width, *[config.hidden] * (config.layers - 1), config.bottleneck], config.norm, "gelu")
        self.prototypes = Prototypes(config.bottleneck, config.prototypes)

    def forward(self, x: Tensor, world: World, frozen: bool = False) -> Tensor:
        """[n, width] to logits [n, K]; every process calls it."""
        return self.prototypes(self.mlp(x, world), frozen)


class DINO(Objective):
    """Cross-entropy between the teacher's assignment of a global view and the student's of every other view.

    Caron et al. 2021 (arXiv:2104.14294, section 3.1): the mean over pairs of different views of the mean over samples.
    The patch loss is that of iBOT (Zhou et al. 2022, arXiv:2111.07832, equation 2): some tokens of a global view are
    replaced by a learned one, and the student assigns them as the teacher, which sees them, does; mean over a sample's
    hidden tokens, then over samples, those without hidden tokens counting as 0, then over global views.

    It works on pooled features and has heads of its own: the tower's projector rests, unless another objective asks for
    embeddings. Heads are not saved with the model.
    """

    Config = DINOConfig
    scope = "batch"

    def __init__(self, config: DINOConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems = [f"objectives.dino.{problem}" for problem in _problems(config, model, fields)]
        if problems:
            raise ConfigError(problems)
        tower = model.tower(fields[config.field])
        self.__dict__["_tower"] = tower  # seen, not owned
        self.head = Head(config.head, tower.pool.width)
        self.assign = Assign(config.assign, config.head.prototypes)
        if config.patch is not None:
            own = config.patch.head
            self.patch_head = None if own is None else Head(own, tower.encoder.width)
            self.patch_assign = Assign(config.patch.assign, (own or config.head).prototypes)
            self.token = nn.Parameter(0.02 * torch.randn(tower.encoder.width))
            self.masker: Masker = config.patch.mask.build()

    def taught(self) -> list[nn.Module]:
        """Encoder, pool and heads."""
        tower = self.__dict__["_tower"]
        heads = [self.head] if self._own_patch_head is None else [self.head, self._own_patch_head]
        return [tower.encoder, tower.pool, *heads]

    def embedded(self) -> set[str]:
        """No embedding is asked for."""
        return set()

    def pooled(self) -> set[str]:
        """See `Objective.pooled`."""
        return {cast(DINOConfig, self.config).field}

    def raw(self) -> set[str]:
        """See `Objective.raw`."""
        return {cast(DINOConfig, self.config).field}

    @property
    def _own_patch_head(self) -> Head | None:
        return self.patch_head if cast(DINOConfig, self.config).patch is not None else None

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`.

        Parts: ``views`` and ``patches``, the two losses; ``plateau``, the first over log K, which stays at 1 where all
        views are assigned to all prototypes alike; ``entropy`` of the teacher's assignments over log K, which goes to 1
        there; ``usage``, the entropy of their mean over log K, which goes to 0 where all are assigned to one prototype.
        """
        config = cast(DINOConfig, self.config)
        here = step.present(config.field).nonzero()[:, 0]
        n = step.world.sum(torch.tensor(len(here), device=here.device)).clamp_min(1)
        head = step.teacher.of(self.head)
        patches, features = torch.zeros((), device=here.device), dict[int, Tensor]()
        if config.patch is not None:
            for view in config.globals:
                features[view], loss = self._masked(step, view, n)
                patches = patches + loss / len(config.globals)
        frozen = _frozen(config.head, step)
        student: dict[int, Tensor] = {}
        for view in (*config.globals, *config.locals):
            x = features[view] if view in features else step.pooled(config.field, view)[here]
            student[view] = (self.head(x, step.world, frozen) / config.temperature).log_softmax(1)
        teacher: dict[int, Tensor] = {}
        for view in config.globals:
            with torch.no_grad():
                logits = head(step.taught_pooled(config.field, view)[here], step.world)
                teacher[view] = self.assign(logits, step.clock, step.world)
        pairs = [(g, v) for g in teacher for v in student if g != v]
        sums = torch.stack([-(teacher[g] * student[v]).sum() for g, v in pairs])
        views = sums.mean() * step.world.size / n
        loss = views
        parts = {"views": views, **self._watch(step.world, teacher, views, n)}
        if config.patch is not None:
            loss = loss + config.patch.weight * patches
            parts["patches"] = patches
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _masked(self, step: Step, view: int, n: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features of a view with hidden tokens, rows that have the field, and the loss of these tokens."""
        config = cast(DINOConfig, self.config)
        assert config.patch is not None
        tower = step.tower(config.field)
        if step.has(config.field):
            tokens = step.tokens(config.field, view)
            seeds = step.batch.seeds[step.present(config.field)] + stable_hash(config.field, view, "mask", config.name)
            mask = self.masker(tokens.grid, seeds, step.clock.progress).target[:, 0]
            chosen = uniform(seeds, 1, stream=1) < config.patch.share
            hidden = indicator(mask.masked_fill(~chosen, -1), tokens.grid.valid.shape[1])
            encoding = tower.encoder.encode(tokens.hide(index_set(hidden), self.token))
            features, values = tower.pool(encoding), encoding.tokens.values[hidden]
            targets = step.taught(config.field, view).tokens.values[hidden]
            share = (hidden.to(values.dtype) / hidden.sum(1, keepdim=True).clamp_min(1))[hidden]
        else:
            features = step.pooled(config.field, view)[:0]
            values = features.new_zeros(0, tower.encoder.width) + features.sum() * 0 + self.token.sum() * 0
            targets, share = values.detach(), values.new_zeros(0)
        head = self._own_patch_head or self.head
        frozen = _frozen(head.config, step)
        student = (head(values, step.world, frozen) / config.temperature).log_softmax(1)
        with torch.no_grad():
            teacher = self.patch_assign(step.teacher.of(head)(targets, step.world), step.clock, step.world)
        each = -(teacher * student).sum(1)
        return features, (each * share).sum() * step.world.size / n

    @torch.no_grad()
    def _watch(self, world: World, teacher: dict[int, Tensor], views: Tensor, n: Tensor) -> dict[str, Tensor]:
        """What a collapse looks like; see `forward`."""
        p = torch.cat(list(teacher.values()))
        most, count = math.log(p.shape[1]), n * len(teacher)
        mean = world.sum(p.sum(0)) / count
        return {
            "plateau": views.detach() / most,
            "entropy": world.sum(torch.special.entr(p).sum()) / count / most,
            "usage": torch.special.entr(mean).sum() / most,
        }

    def after_optimizer_step(self) -> None:
        """The centres take in what this step has seen."""
        self.assign.after_optimizer_step()
        if cast(DINOConfig, self.config).patch is not None:
            self.patch_assign.after_optimizer_step()


def _frozen(config: HeadConfig, step: Step) -> bool:
    """Whether prototypes rest at this step."""
    steps = config.freeze if config.freeze >= 1 else config.freeze * (step.clock.total or 0)
    return step.clock.step < steps


def _problems(config: DINOConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
    if config.field not in fields:
        yield f"field: unknown {config.field!r}{near(config.field, fields)} Fields: {', '.join(fields)}"
        return
    tower = model.tower(fields[config.field])
    if tower.frozen:
        yield f"field: tower {fields[config.field]!r} is frozen: it would not learn from its views"
    views = [*config.globals, *config.locals]
    if len(set(views)) < len(views):
        yield f"locals: {list(config.locals)} and globals {list(config.globals)} name a view twice"
    if len(views) < 2:
        yield f"globals: {views} is one view, which has no other to be compared with; name two, or give locals"
    if config.patch is not None and "mask_token" not in tower.encoder.supports:
        yield f"patch: {unsupported(tower.encoder, 'mask_token')}"
    if config.patch is not None and config.patch.head is None and tower.pool.width != tower.encoder.width:
        yield "patch.head: pooled features and tokens have different widths; give the tokens a head of their own"
