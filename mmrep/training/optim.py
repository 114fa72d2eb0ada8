"""Optimizers and their parameter groups: what decays, and what must not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import field
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.registry import near
from mmrep.schedules import Schedule

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@config
class OptimConfig:
    """How weights move.

    optimizer: ``adamw`` (decoupled decay), ``adam`` or ``sgd`` (decay added to the gradient). lr: base learning rate,
    moved by ``schedule``. weight_decay: for weight matrices only, see `parameter_groups`. betas, eps: of Adam; the
    defaults are CLIP's for vision transformers (Radford et al. 2021, table 20). momentum: of SGD. clip_norm: bound on
    the norm of the whole gradient; None = off. no_decay: further parameters without decay, by name; ``*`` matches.
    """

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 5e-4
    schedule: Schedule = field(default_factory=lambda: Schedule(shape="cosine", warmup=0.05))
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    betas: Annotated[tuple[float, ...], Field(min_length=2, max_length=2)] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    no_decay: tuple[str, ...] = ()


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters of ``module``, fused where torch has a kernel for their device."""
    groups = parameter_groups(module, config.weight_decay, config.no_decay)
    devices = {p.device.type for group in groups for p in group["params"]}
    options: dict[str, Any] = {"lr": config.lr, "fused": devices <= {"cpu", "cuda"}}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, **options)
    adam = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return adam(groups, betas=(config.betas[0], config.betas[1]), eps=config.eps, **options)


def parameter_groups(
    module: nn.Module, weight_decay: float, no_decay_names: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group: ``decay`` or ``no_decay``.

    Without decay are: parameters of at most one dimension (biases, temperatures, gains), all parameters of
    normalisation layers, and whatever a module declares with a method ``no_weight_decay() -> names relative to it``
    (position tables). The decision looks at the owner's type, never at a part of a name, and is made before any
    sharding. A tied parameter appears once and does not decay if any of its owners says so.

    Args:
        module: the module with all parameters.
        weight_decay: of the ``decay`` group.
        no_decay_names: further names without decay, relative to ``module``; ``*`` matches any part.

    Returns:
        Groups for a torch optimizer, without empty ones; each also has ``"name"`` and ``"param_names"``.

    Raises:
        ValueError: nothing is trainable, or one of ``no_decay_names`` matches no parameter.
    """
    parameters = {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    if not parameters:
        raise ValueError("no trainable parameter: everything is frozen")
    without = {id(p) for p in _without_decay(module)}
    for pattern in no_decay_names:
        matched = [p for name, p in parameters.items() if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"no_decay: {pattern!r} matches no trainable parameter{near(pattern, parameters)}")
        without.update(map(id, matched))
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "param_names": [], "weight_decay": weight_decay},
        "no_decay": {"params": [], "param_names": [], "weight_decay": 0.0},
    }
    placed: set[int] = set()
    for name, parameter in parameters.items():
        if id(parameter) in placed:
            continue
        placed.add(id(parameter))
        group = groups["no_decay" if id(parameter) in without else "decay"]
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def _without_decay(module: nn.Module) -> Iterator[nn.Parameter]:
    for owner in module.modules():
        is_norm = isinstance(owner, _NORMS)
        yield from (p for p in owner.parameters(recurse=False) if is_norm or p.ndim <= 1)
        declare = getattr(owner, "no_weight_decay", None)
        if callable(declare):
            patterns = list(cast(Iterable[str], declare()))
            for name, parameter in owner.named_parameters(remove_duplicate=False):
                if any(fnmatchcase(name, pattern) for pattern in patterns):
                    yield parameter


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group; a group's own ``lr_scale`` multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the whole gradient, over all shards of a sharded one; 0-D, on the device."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return cast(Any, norm).full_tensor() if hasattr(norm, "full_tensor") else norm
