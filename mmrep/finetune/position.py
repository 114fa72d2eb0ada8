"""Where between task vectors a merged model stands: coefficients that are learned on a few samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmrep.config import ConfigError
from mmrep.data.batch import Batch
from mmrep.finetune.merge import agree, floats
from mmrep.model import Model
from mmrep.progress import progress
from mmrep.run import Run


def learn_coefficients(
    base: Model,
    tuned: Sequence[Model],
    loss: Callable[[Model], Tensor],
    *,
    steps: int = 100,
    lr: float = 0.1,
    momentum: float = 0.9,
) -> list[float]:
    """Coefficients for `add_task_vectors`, found by gradient descent on a small probe set.

    As Self Positioning (Li et al. 2024, arXiv:2410.15035), which searches the space between task vectors by stochastic
    gradient descent: ``lambda = s softmax(w)``, with the share ``w`` of each model and the length ``s`` learned; they
    begin at equal shares and length 1. Only these few numbers are fitted, so that a small set will do.

    Args:
        base: as in `add_task_vectors`.
        tuned: likewise.
        loss: of one batch, drawn anew in each call if that is wanted; it may use `Model.tower` and call towers, but
            not `Model.encode`, which has no gradient.
        steps: of the descent.
        lr: its learning rate.
        momentum: likewise.

    Returns:
        One coefficient for each of ``tuned``.

    Raises:
        ConfigError: as `interpolate`.
        ValueError: the loss does not depend on the weights, or is not finite.
    """
    probe = _Probe(copy.deepcopy(base).eval().requires_grad_(False), loss)
    return _descend(base, tuned, probe, tuple, steps=steps, lr=lr, momentum=momentum)


def learn_coefficients_on(
    run: Run, base: Model, tuned: Sequence[Model], *, steps: int = 100, lr: float = 0.1, momentum: float = 0.9
) -> list[float]:
    """`learn_coefficients` by the objectives of a recipe on its own training batches.

    Args:
        run: of a recipe that begins from ``base`` (``start:``), so that its model is of that architecture. Nothing of
            it is trained, views are drawn as in training, dropout is off.
        base: as there.
        tuned: likewise.
        steps: likewise, a batch each.
        lr: likewise.
        momentum: likewise.

    Raises:
        ConfigError: as there; or an objective has weights of its own, which no merged model brings.
        ValueError: as there.
    """
    model = run.untrained()
    agree([base, model])
    model.load_state_dict(base.state_dict())
    for name in model.towers:  # what was frozen in training may differ between the models, and is merged too
        tower = model.tower(name)
        tower.configure(replace(tower.config, frozen=False))
    model.requires_grad_(True)
    root = run.root(model)
    if own := [name for name, part in root.objectives.items() if any(True for _ in part.parameters())]:
        raise ConfigError([
            f"objectives: {', '.join(own)} has weights of its own, which no merged model brings; take one without"
        ])  # fmt: skip
    root.fit(run.samples)
    root.eval().requires_grad_(False)
    loader = run.loader(root, rank=0, size=1)
    batches = _for_ever(loader)
    try:
        return _descend(
            base, tuned, _Losses(root), lambda: (next(batches).to(model.device),), steps=steps, lr=lr, momentum=momentum
        )
    finally:
        batches.close()
        loader.close()


def _for_ever(loader: Any) -> Generator[Batch, None, None]:
    while True:
        yield from loader


def _descend(
    base: Model,
    tuned: Sequence[Model],
    probe: nn.Module,
    arguments: Callable[[], tuple[Any, ...]],
    *,
    steps: int,
    lr: float,
    momentum: float,
) -> list[float]:
    """The descent; ``probe.model`` gets the weights of each point, and ``probe(*arguments())`` is its loss."""
    agree([base, *tuned])
    device = base.device
    origin, *others = (floats(model, device) for model in (base, *tuned))
    moves = {name: torch.stack([state[name] - origin[name] for state in others]) for name in origin}
    share = torch.zeros(len(tuned), device=device, requires_grad=True)
    length = torch.ones((), device=device, requires_grad=True)
    optimizer = torch.optim.SGD([share, length], lr=lr, momentum=momentum)
    with progress(steps, desc="position", unit="step") as bar:
        for step in range(steps):
            coefficients = length * share.softmax(0)
            weights = {
                f"model.{name}": origin[name] + torch.tensordot(coefficients.to(move.dtype), move, 1)
                for name, move in moves.items()
            }
            value = functional_call(probe, weights, arguments())
            if not value.requires_grad or not bool(value.isfinite()):
                why = (
                    "is not finite" if value.requires_grad else "does not depend on the weights (Model.encode has none)"
                )
                raise ValueError(f"step {step}: the loss, {float(value):g}, {why}")
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            bar.update()
    return [float(c) for c in (length * share.softmax(0)).detach()]


class _Probe(nn.Module):
    """A loss of a model as a module, whose weights `functional_call` can replace."""

    def __init__(self, model: Model, loss: Callable[[Model], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self) -> Tensor:
        return self.loss(self.model)


class _Losses(nn.Module):
    """The losses of a recipe as one number; ``model`` is the same module as in the root."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.model = root.model
        self.root = root

    def forward(self, batch: Batch) -> Tensor:
        return self.root(batch)["loss"]
