"""Where everything moves from one moment to the next, and features that can be carried along: the motion of MC-JEPA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import ConfigError, component, config
from mmrep.losses._views import ViewLoss
from mmrep.losses.warping import cost_volume, photometric, resize_flow, smoothness, warp
from mmrep.model import Model, Tower
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step, idle
from mmrep.targets.target import look
from mmrep.tokens import Tokens

Weight = Annotated[float, Field(ge=0)]


@config
class FlowConfig(ObjectiveConfig):
    """field: whose tokens lie on a regular grid of (time, row, column). view: of it.

    levels: sizes of the grid at which the flow is estimated, each half of the next. radius: of the search at each
    level, in tokens. hidden: width of the estimator. cells: what a token was made from is a block of cells x cells
    figures, row by row (the pixels of a patch: its side); 1 = tokens are the picture.

    Weights of the terms: regression, reconstruction, smoothness, cycle, variance, covariance; l1, l2, ssim: within the
    reconstruction. edge: how steeply smoothness gives way where the picture has edges.
    """

    field: str
    view: Annotated[int, Field(ge=0)] = 0
    levels: Annotated[int, Field(ge=1)] = 2
    radius: Annotated[int, Field(ge=1)] = 1
    hidden: Annotated[int, Field(ge=1)] = 64
    cells: Annotated[int, Field(ge=1)] = 1
    regression: Weight = 1.0
    reconstruction: Weight = 1.0
    smoothness: Weight = 0.1
    cycle: Weight = 0.1
    variance: Weight = 1.0
    covariance: Weight = 0.04
    l1: Weight = 1.0
    l2: Weight = 0.0
    ssim: Weight = 1.0
    edge: Weight = 10.0
    weight: Weight = 1.0


class FlowEstimator(nn.Module):
    """Feature maps of two moments to the flow between them, from coarse to fine: warp by what is known, compare with
    the neighbourhood, add what is left (as in PWC-Net, Sun et al. 2018, arXiv:1709.02371).

    One small network of convolutions serves all levels.
    """

    def __init__(self, width: int, hidden: int, radius: int) -> None:
        super().__init__()
        self.radius = radius
        self.reduce = nn.Conv2d(width, hidden, 1)
        around = (2 * radius + 1) ** 2
        self.first = nn.Conv2d(hidden + around + 2, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.last = nn.Conv2d(hidden, 2, 3, padding=1)
        with torch.no_grad():  # nothing moves at first
            self.last.weight.mul_(0.01)
            cast(Tensor, self.last.bias).zero_()

    def forward(self, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        """Levels [n, D, rows, columns], the coarsest first, of two moments; the flow [n, 2, rows, columns] of each."""
        flows: list[Tensor] = []
        for here, there in zip(a, b, strict=True):
            size = (here.shape[2], here.shape[3])
            flow = resize_flow(flows[-1], size) if flows else here.new_zeros(len(here), 2, *size)
            costs = cost_volume(here, warp(there, flow), self.radius)
            x = F.leaky_relu(self.first(torch.cat([self.reduce(here), costs, flow], 1)), 0.1)
            flows.append(flow + self.last(F.leaky_relu(self.second(x), 0.1)))
        return flows


class Flow(Objective):
    """Optical flow without labels and features that follow it: MC-JEPA (Bardes et al. 2023, arXiv:2307.12698).

    Each moment's tokens are encoded by themselves, so that no moment knows the next. With x_t its features at a level,
    f the flow from t to t + 1, b the flow back, I the picture that the tokens were made from, and ``W(x, f)(p) = x(p +
    f(p))``, the terms, each of both directions and averaged over pairs of moments and samples of all processes::

        regression     = mean over levels of mean (x_t - W(x_t+1, f))^2
        reconstruction = l1 |I_t - W(I_t+1, f)| + l2 (..)^2 + ssim (1 - SSIM) / 2     at the finest level
        smoothness     = first differences of f, less across edges of I_t             at the finest level
        cycle          = mean over levels of mean (x_t - W(W(x_t, b), f))^2
        variance, covariance = mean over levels of those of VICReg, of the tokens of all moments

    The content half of the method is `redundancy` with ``vicreg`` on two views, beside it.
    """

    Config = FlowConfig
    scope = "batch"

    def __init__(self, config: FlowConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems = [f"objectives.flow.{problem}" for problem in _problems(config, model, fields)]
        if problems:
            raise ConfigError(problems)
        self.estimator = FlowEstimator(model.tower(fields[config.field]).encoder.width, config.hidden, config.radius)
        spread = {"invariance": 0.0, "variance": config.variance, "covariance": config.covariance}
        self.spread = cast(ViewLoss, component("view_losses", "vicreg", **spread).build())

    def embedded(self) -> set[str]:
        """No embedding is asked for."""
        return set()

    def raw(self) -> set[str]:
        """See `Objective.raw`."""
        return {cast(FlowConfig, self.config).field}

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; parts are the terms without their weights; ``still``, the reconstruction if nothing
        moved; and ``motion``, the mean length of the flow in tokens.
        """
        config = cast(FlowConfig, self.config)
        n = step.world.sum(step.present(config.field).sum()).clamp_min(1)
        if not step.has(config.field):
            encoder = step.tower(config.field).encoder
            nothing = (idle(encoder) + idle(self)) * step.world.size
            empty = next(encoder.parameters()).new_zeros(0, encoder.width) + nothing
            spread = self._spread([empty] * config.levels, step)
            return {"loss": nothing + spread.pop("loss"), **spread}
        x, picture = self.moments(step)
        levels = self.levels(x.flatten(0, 1))
        spread = self._spread([level.permute(0, 2, 3, 1).flatten(0, 2) for level in levels], step)
        terms = self._terms([level.unflatten(0, x.shape[:2]) for level in levels], picture)
        share = step.world.size / n
        sums = {name: each.sum() * share for name, each in terms.items()}
        weighed = ("regression", "reconstruction", "smoothness", "cycle")
        loss = sum((getattr(config, name) * sums[name] for name in weighed), spread.pop("loss"))
        return {"loss": loss, **{name: value.detach() for name, value in sums.items()}, **spread}

    def moments(self, step: Step) -> tuple[Tensor, Tensor]:
        """Features [B, T, D, rows, columns] of each moment alone, and the picture [B, T, C, rows', columns'].

        Raises:
            ConfigError: the grid is not regular, or of one moment.
        """
        config = cast(FlowConfig, self.config)
        tokens = step.tokens(config.field, config.view)
        shape = tokens.grid.shape
        if shape is None or len(shape) != 3 or shape[0] < 2:
            raise ConfigError([
                f"objectives.flow.field: {config.field!r} has tokens of shape {shape}; a flow needs a full grid (time, "
                "row, column) of 2 moments or more: let the encoder read no more frames than every sample has"
            ])  # fmt: skip
        (T, rows, columns), B = shape, len(tokens.values)
        at = (~tokens.grid.special[0]).nonzero()[:, 0].view(T, -1)
        encoder = step.tower(config.field).encoder
        alone = encoder.encode(tokens.repeat(T), at.repeat(B, 1)).tokens.values[:, -rows * columns :]
        alone = alone if alone.dtype == torch.float64 else alone.float()
        x = alone.unflatten(1, (rows, columns)).permute(0, 3, 1, 2).unflatten(0, (B, T))
        made = step.content(config.field, config.view).values[:, at.flatten()].to(x.dtype)
        picture = made.view(B, T, rows, columns, -1).permute(0, 1, 4, 2, 3)
        return x, F.pixel_shuffle(picture, config.cells)

    def levels(self, x: Tensor) -> list[Tensor]:
        """Feature maps [n, D, rows, columns] at every level, the coarsest first."""
        found = [x]
        for _ in range(cast(FlowConfig, self.config).levels - 1):
            found.insert(0, F.avg_pool2d(found[0], 2))
        return found

    def _terms(self, levels: list[Tensor], picture: Tensor) -> dict[str, Tensor]:
        """Each term [B], of levels [B, T, D, rows, columns] and the picture [B, T, C, ...]."""
        config = cast(FlowConfig, self.config)
        B, pairs = len(picture), picture.shape[1] - 1
        # Rows are (direction, sample, pair): forwards first, then the same pairs backwards.
        both = [(level[:, :-1].flatten(0, 1), level[:, 1:].flatten(0, 1)) for level in levels]
        a, b = [torch.cat([x, y]) for x, y in both], [torch.cat([y, x]) for x, y in both]
        with torch.autocast(picture.device.type, enabled=False):
            flows = self.estimator(a, b)
            backs = [torch.cat([flow[B * pairs :], flow[: B * pairs]]) for flow in flows]
            carried = [warp(y, flow) for y, flow in zip(b, flows, strict=True)]
            home = [warp(warp(x, back), flow) for x, back, flow in zip(a, backs, flows, strict=True)]
            i, j = (picture[:, :-1].flatten(0, 1), picture[:, 1:].flatten(0, 1))
            i, j = torch.cat([i, j]), torch.cat([j, i])
            fine = resize_flow(flows[-1], (i.shape[2], i.shape[3]))
            weights = config.l1, config.l2, config.ssim
            terms = {
                "regression": _distance(a, carried),
                "reconstruction": photometric(i, warp(j, fine), *weights),
                "smoothness": smoothness(fine, i, config.edge),
                "cycle": _distance(a, home),
                "still": photometric(i, j, *weights).detach(),
                "motion": flows[-1].detach().norm(dim=1).flatten(1).mean(1),
            }
        return {name: each.view(2, B, pairs).mean((0, 2)) for name, each in terms.items()}

    def _spread(self, levels: list[Tensor], step: Step) -> dict[str, Tensor]:
        """Variance and covariance of the tokens [n, D] of each level, averaged over levels."""
        found = [self.spread([level], world=step.world) for level in levels]
        return {name: torch.stack([one[name] for one in found]).mean() for name in ("loss", "variance", "covariance")}


def _distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The mean over levels of the mean squared difference of each row, [n]."""
    return torch.stack([(x - y).square().flatten(1).mean(1) for x, y in zip(a, b, strict=True)]).mean(0)


def _problems(config: FlowConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
    if config.field not in fields:
        yield f"field: unknown {config.field!r}{near(config.field, fields)} Fields: {', '.join(fields)}"
        return
    tower: Tower = model.tower(fields[config.field])
    missing = {"drop_tokens", "content"} - tower.encoder.supports
    if missing:
        yield f"field: the encoder of {config.field!r} does not support {', '.join(sorted(missing))}"
        return
    if tower.config.frozen:
        yield f"field: tower {fields[config.field]!r} of {config.field!r} is frozen: its features cannot follow"
    sight = look(tower.encoder)
    yield from _of_tokens(config, sight.tokens)
    figures = tower.encoder.content(sight.inputs)
    if figures.vocabulary is not None or figures.values.ndim != 3 or figures.values.shape[2] % config.cells**2:
        found = "codes" if figures.vocabulary is not None else f"{figures.values.shape[-1]} figures"
        yield f"cells: a token of {config.field!r} is made from {found}, not from blocks of {config.cells}^2"


def _of_tokens(config: FlowConfig, tokens: Tokens) -> Iterator[str]:
    axes = tokens.grid.coords.shape[2]
    if axes != 3:
        yield f"field: tokens of {config.field!r} have {axes} coordinates; a flow needs 3: time, row and column"
    elif tokens.grid.shape is not None and min(tokens.grid.shape[1:]) < 2 ** (config.levels - 1):
        rows, columns = tokens.grid.shape[1:]
        yield f"levels: {config.levels} levels need {2 ** (config.levels - 1)} rows and columns, not {rows} x {columns}"
