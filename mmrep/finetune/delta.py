"""Checkpoints fused by how far each has moved: where one has learned more, it has more to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from mmrep.config import ConfigError
from mmrep.finetune.merge import soup
from mmrep.model import Model

By = Literal["tensor", "element"]


@torch.no_grad()
def fuse_by_delta(base: Model, tuned: Sequence[Model], *, by: By = "tensor") -> Model:
    """``theta_0 + sum_i w_i (theta_i - theta_0)`` with ``w_i = |theta_i - theta_0| / sum_j |theta_j - theta_0|``.

    After the delta-guided fusion of CoDiEmb (arXiv:2508.11442), of which the abstract alone was read: the formula is
    ours. The deviation of each parameter from where it began weighs the checkpoints, tensor by tensor, instead of one
    weight for each model as in a soup. Where nothing has moved, what was there stays.

    Args:
        base: theta_0, from which all the others were tuned.
        tuned: theta_i, at least one.
        by: the deviation is the Euclidean norm of a ``tensor``'s, or the size of each single ``element``'s.

    Returns:
        A new model in eval mode, on the device of the last one, computed in fp64.

    Raises:
        ConfigError: the models are not of one architecture (every difference by name), there are none, or another
            ``by``.
    """
    if by not in ("tensor", "element"):
        raise ConfigError([f"by: 'tensor' or 'element', got {by!r}"])
    if not tuned:
        raise ConfigError(["fuse_by_delta: it needs one tuned model at least"])
    merged = soup([base, *tuned])  # checks them, and takes care of buffers that have no mean
    states, origin, new = [model.state_dict() for model in tuned], base.state_dict(), {}
    for name, value in merged.state_dict().items():
        if value.is_floating_point():
            start = origin[name].to(value.device, torch.float64)
            moves = torch.stack([state[name].to(start) - start for state in states])
            sizes = moves.abs()
            if by == "tensor":
                sizes = moves.flatten(1).norm(dim=1).view(-1, *[1] * start.ndim)
            total = sizes.sum(0)
            weights = sizes / torch.where(total > 0, total, 1.0)
            new[name] = (start + (weights * moves).sum(0)).to(value.dtype)
    merged.load_state_dict(new, strict=False)
    return merged
