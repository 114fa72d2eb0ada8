"""What a predictor is told of a view, and whether it makes a difference: the rank of the right condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmrep.config import ConfigError
from mmrep.step import Step


def told(step: Step, field: str, view: int, wanted: Mapping[str, int], where: str) -> Tensor:
    """Parameters of a view, one after the other: float32 [B, sum of figures], of the samples that have the field.

    Args:
        step: the step.
        field: the field.
        view: which of its views.
        wanted: names of parameters, and how many figures each has.
        where: the config field that names them, for messages.

    Raises:
        ConfigError: the view has no such parameter, or one of another size.
    """
    params = step.params(field, view)
    for name, width in wanted.items():
        found = params[name][0].numel() if name in params else None
        if found != width:
            known = ", ".join(f"{key}: {value[0].numel()}" for key, value in params.items()) or "none"
            raise ConfigError([
                f"{where}.{name}: {width}, but view {view} of {field!r} has "
                f"{'no such parameter' if found is None else found}; it has {{{known}}}"
            ])  # fmt: skip
    return torch.cat([params[name].float().reshape(len(params[name]), -1) for name in wanted], 1)


@torch.no_grad()
def reciprocal_rank(own: Tensor, others: Callable[[int], Tensor], count: int) -> Tensor:
    """The mean over samples of 1 / rank of their own condition among it and ``count`` others, by the loss it gives.

    It is the mean reciprocal rank by which a world model is judged (IWM, Garrido et al. 2024, arXiv:2403.00504, section
    4): near 1 the predictor applies what it is told; one that ignores it has a rank of chance, and is invariant.
    Conditions with equal losses share the middle of their ranks.

    Args:
        own: loss of each sample under its own condition, [B].
        others: from a number k to the losses [B] under the conditions of the samples k places further.
        count: how many others, at most B - 1.
    """
    rank = torch.ones_like(own)
    for k in range(1, min(count, len(own) - 1) + 1):
        other = others(k)
        rank += (other < own).to(rank.dtype) + 0.5 * (other == own).to(rank.dtype)
    return rank.reciprocal().sum() / max(len(own), 1)
