"""A small image model with one masked objective, and steps of it, for the tests of targets."""

from __future__ import annotations

from typing import Any

import torch

from mmrep.config import component
from mmrep.data.batch import Batch
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.schedules import Clock
from mmrep.step import Step
from mmrep.world import LocalWorld

SIZE, PATCH, WIDTH, DEPTH = 16, 4, 16, 3


def root(*, seed: int = 0, encoder: dict[str, Any] | None = None, **objective: Any) -> Root:
    """A tower ``image`` and the objective ``masked`` on the field ``x``."""
    torch.manual_seed(seed)
    vit = {"size": SIZE, "patch": PATCH, "width": WIDTH, "depth": DEPTH, "heads": 2, **(encoder or {})}
    tower = TowerConfig(encoder=component("encoders", "image-vit", **vit))
    model = Model(ModelConfig(dim=8, towers={"image": tower}))
    return Root(model, [component("objectives", "masked", field="x", **objective)], fields={"x": "image"}, views={})


def batch(built: Root, n: int = 4, seed: int = 0, pictures: list[Any] | None = None) -> Batch:
    """``n`` random pictures of one size, or what the encoder makes of ``pictures``."""
    if pictures is None:
        generator = torch.Generator().manual_seed(seed)
        inputs = {"pixels": torch.randint(0, 256, (n, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)}
    else:
        encoder, n = built.model.tower("image").encoder, len(pictures)
        inputs = encoder.collate([encoder.prepare(picture) for picture in pictures])
    here = torch.ones(n, dtype=torch.bool)
    seeds = torch.arange(n) * 7919 + seed
    return Batch(ids=[str(i) for i in range(n)], inputs={"x": [inputs]}, present={"x": here}, seeds=seeds)


def step(built: Root, given: Batch, clock: Clock | None = None, world: Any = None) -> Step:
    """A step of the model on a batch, in this process."""
    return Step(
        built.model, given, fields=built.fields, views={}, world=world or LocalWorld(), memo=built.memo,
        teacher=built.teacher, clock=clock,
    )  # fmt: skip


def masked(built: Root) -> Any:
    """The objective."""
    return built.objectives["masked"]


def drawn(built: Root, s: Step) -> torch.Tensor:
    """Which tokens the objective hides in this step: bool [B, N]."""
    found: list[torch.Tensor] = []
    objective = masked(built)
    inner = objective.masker

    class Spy:
        def __call__(self, *arguments: Any) -> Any:
            mask = inner(*arguments)
            found.append(mask.target)
            return mask

    objective.masker = Spy()
    with torch.no_grad():
        objective(s)
    objective.masker = inner
    from mmrep.tokens import indicator

    return indicator(found[0].flatten(1), s.tokens("x").values.shape[1])
