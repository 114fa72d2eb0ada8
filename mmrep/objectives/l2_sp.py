"""Not forgetting: parameters stay near those that they began with (L2-SP)."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import ConfigError, config
from mmrep.model import Model
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step


@config
class L2SPConfig(ObjectiveConfig):
    """alpha: pull towards the start, of the parameters that have one. beta: pull towards zero, of new matrices.

    new: names of further parameters that have no start worth keeping, as ``towers.text.projector.*``.
    """

    alpha: Annotated[float, Field(ge=0)] = 0.01
    beta: Annotated[float, Field(ge=0)] = 0.01
    new: tuple[str, ...] = ()


class L2SP(Objective):
    """``alpha / 2 |w - w_0|^2 + beta / 2 |v|^2`` (Li, Grandvalet and Davoine 2018, arXiv:1802.01483).

    ``w`` are the trained parameters that began with weights of the recipe's ``start``; without a start, those of the
    encoders, which a hub's checkpoint fills. ``v`` are the other trained matrices of the towers and fusions; biases,
    gains and temperatures are left alone. ``w_0`` is in checkpoints, but not in the saved model. The optimizer's own
    decay pulls everything to zero all the same: set ``optim.weight_decay: 0`` beside it. The gradient goes through the
    optimizer: under Adam it is rescaled by the gradient's own size, so that alpha is no plain rate as under SGD.
    """

    Config = L2SPConfig
    scope = "batch"  # it belongs to no sample: once a step, also where a batch is computed in parts

    def __init__(self, config: L2SPConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        trained = {
            name: p for name, p in model.named_parameters()
            if p.requires_grad and name.startswith(("towers.", "fusions."))
        }  # fmt: skip
        for pattern in config.new:
            if not any(fnmatchcase(name, pattern) for name in trained):
                raise ConfigError(
                    [f"objectives.l2-sp.new: {pattern!r} matches no trained parameter{near(pattern, trained)}"]
                )
        self._old = [
            name for name in trained
            if _has_start(name, model) and not any(fnmatchcase(name, pattern) for pattern in config.new)
        ]  # fmt: skip
        self._new = [name for name, p in trained.items() if name not in self._old and p.ndim > 1]
        if not self._old:
            raise ConfigError(["objectives.l2-sp: no trained parameter began with saved weights, so none can be kept"])
        # Not buffers: DDP would send those around in every forward pass.
        self.start = nn.ParameterList(nn.Parameter(trained[n].detach().clone(), requires_grad=False) for n in self._old)

    def embedded(self) -> set[str]:
        """See `Objective.embedded`."""
        return set()

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; part ``distance`` is ``|w - w_0|``."""
        config = cast(L2SPConfig, self.config)
        now = dict(step.model.named_parameters())
        zero = torch.zeros((), device=step.model.device)
        moved = zero + sum((now[name] - start).pow(2).sum() for name, start in zip(self._old, self.start, strict=True))
        new = zero + sum(now[name].pow(2).sum() for name in self._new)
        return {"loss": config.alpha / 2 * moved + config.beta / 2 * new, "distance": moved.detach().sqrt()}


def _has_start(name: str, model: Model) -> bool:
    return ".encoder." in name if model.began is None else name in model.began
