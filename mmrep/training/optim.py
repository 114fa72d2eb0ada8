"""Optimizers and their parameter groups: what decays and what must not, what moves slower, later or not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.layers import known, parameter_layers
from mmrep.registry import near
from mmrep.schedules import Schedule

logger = logging.getLogger(__name__)

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@config
class GroupConfig:
    """Parameters that move in a way of their own.

    match: a pattern of parameter names, or several; names are those of the whole run (``model.towers.text.encoder.…``,
    ``objectives.…``), ``*`` matches any part. lr: factor of the learning rate. weight_decay: of those that decay at
    all; None = as the others. begin: share of the run before which they rest (gradual unfreezing: Howard and Ruder
    2018, arXiv:1801.06146): until then their gradient is dropped, so that they neither move, nor gather moments, nor
    count in ``clip_norm``.
    """

    match: str | list[str]
    lr: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    begin: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def patterns(self) -> list[str]:
        """``match`` as a list."""
        return [self.match] if isinstance(self.match, str) else list(self.match)


@config
class OptimConfig:
    """How weights move.

    optimizer: ``adamw`` (decoupled decay), ``adam`` or ``sgd`` (decay added to the gradient). lr: base learning rate,
    moved by ``schedule``. weight_decay: for weight matrices only, see `parameter_groups`. betas, eps: of Adam; the
    defaults are CLIP's for vision transformers (Radford et al. 2021, table 20). momentum: of SGD. clip_norm: bound on
    the norm of the whole gradient; None = off. no_decay: further parameters without decay, by name; ``*`` matches.

    layer_decay: d, layer-wise decay of the learning rate (arXiv:1801.06146; in the form of ELECTRA and BEiT): of
    an encoder with L layers, layer k moves at ``d ** (L + 1 - k)`` of it, what comes before the layers is layer 0, and
    everything else in the model moves at the whole of it. groups: parameters with a learning rate, a decay or a
    beginning of their own; a parameter belongs to the first that it matches.
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
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    groups: list[GroupConfig] = field(default_factory=list[GroupConfig])


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters of ``module``, fused where torch has a kernel for their device."""
    groups = parameter_groups(
        module, config.weight_decay, config.no_decay, layer_decay=config.layer_decay, groups=config.groups
    )
    devices = {p.device.type for group in groups for p in group["params"]}
    options: dict[str, Any] = {"lr": config.lr, "fused": devices <= {"cpu", "cuda"}}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, **options)
    adam = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return adam(groups, betas=(config.betas[0], config.betas[1]), eps=config.eps, **options)


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    no_decay_names: Iterable[str] = (),
    *,
    layer_decay: float | None = None,
    groups: Sequence[GroupConfig] = (),
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group: ``decay`` or ``no_decay``, of each learning rate and beginning.

    Without decay are: parameters of at most one dimension (biases, temperatures, gains), all parameters of
    normalisation layers, and whatever a module declares with a method ``no_weight_decay() -> names relative to it``
    (position tables). The decision looks at the owner's type, never at a part of a name, and is made before any
    sharding. A tied parameter appears once and does not decay if any of its owners says so.

    Args:
        module: the module with all parameters.
        weight_decay: of the ``decay`` group.
        no_decay_names: further names without decay, relative to ``module``; ``*`` matches any part.
        layer_decay: see `OptimConfig`; layers are those of every encoder in the module (`Encoder.layer_modules`).
        groups: see `GroupConfig`.

    Returns:
        Groups for a torch optimizer, without empty ones; each also has ``"name"``, ``"param_names"``, ``"lr_scale"``
        and ``"begin"``.

    Raises:
        ValueError: nothing is trainable; a pattern matches no parameter, or only such as an earlier group has; no
            encoder that trains has layers.
    """
    parameters = {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    if not parameters:
        raise ValueError("no trainable parameter: everything is frozen")
    without = {id(p) for p in _without_decay(module)}
    for pattern in no_decay_names:
        without.update(id(parameters[name]) for name in _matched(pattern, parameters, "no_decay"))
    chosen = _chosen(parameters, groups)
    scales = {} if layer_decay is None else _layer_scales(module, layer_decay)
    found: dict[tuple[int, float, bool], dict[str, Any]] = {}
    placed: set[int] = set()
    for name, parameter in parameters.items():
        if id(parameter) in placed:
            continue
        placed.add(id(parameter))
        number, decays = chosen.get(id(parameter), len(groups)), id(parameter) not in without
        own = groups[number] if number < len(groups) else GroupConfig(match="*")
        scale = scales.get(id(parameter), 1.0) * own.lr
        if (number, scale, decays) not in found:
            label = "decay" if decays else "no_decay"
            decay = weight_decay if own.weight_decay is None else own.weight_decay
            found[number, scale, decays] = {
                "name": label if number == len(groups) else f"groups[{number}] {label}",
                "params": [], "param_names": [], "weight_decay": decay if decays else 0.0,
                "lr_scale": scale, "begin": own.begin,
            }  # fmt: skip
        found[number, scale, decays]["params"].append(parameter)
        found[number, scale, decays]["param_names"].append(name)
    return [found[key] for key in sorted(found, key=lambda key: (key[0], -key[1], not key[2]))]


def _matched(pattern: str, names: Iterable[str], where: str) -> list[str]:
    names = list(names)
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if not matched:
        raise ValueError(f"{where}: {pattern!r} matches no trainable parameter{near(pattern, known(names))}")
    return matched


def _chosen(parameters: Mapping[str, nn.Parameter], groups: Sequence[GroupConfig]) -> dict[int, int]:
    """The number of the first group that matches, by the id of a parameter."""
    chosen: dict[int, int] = {}
    for number, group in enumerate(groups):
        for pattern in group.patterns:
            matched = _matched(pattern, parameters, f"optim.groups[{number}].match")
            fresh = [id(parameters[name]) for name in matched if chosen.get(id(parameters[name]), number) == number]
            if not fresh:
                raise ValueError(
                    f"optim.groups[{number}].match: all that {pattern!r} matches belongs to an earlier group; put the "
                    "narrower pattern first"
                )
            chosen.update(dict.fromkeys(fresh, number))
    return chosen


def _layer_scales(module: nn.Module, decay: float) -> dict[int, float]:
    """Factor of the learning rate by the id of a parameter, of all encoders that have layers."""
    scales: dict[int, float] = {}
    without: list[str] = []
    for name, part in module.named_modules():
        trains = [p for p in part.parameters() if p.requires_grad] if hasattr(part, "layer_modules") else []
        if all(id(p) in scales for p in trains):  # no encoder, a resting one, or one inside another
            continue
        layers = parameter_layers(cast(Any, part))
        if not layers:
            without.append(name)
        named = dict(part.named_parameters(remove_duplicate=False))
        last = len(cast(Any, part).layer_modules()) + 1
        for parameter, layer in layers.items():
            scales.setdefault(id(named[parameter]), decay ** (last - layer))
    if not scales:
        raise ValueError(f"layer_decay={decay:g}: no encoder that trains has layers; use optim.groups instead")
    for name in without:
        logger.warning("layer_decay: %s has no layers, and moves at the whole learning rate", name)
    return scales


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


def rest(optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Drop the gradients of groups that have not begun at ``progress``, the share of the run that is done."""
    for group in optimizer.param_groups:
        if progress < group.get("begin", 0.0):
            for parameter in group["params"]:
                parameter.grad = None


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the whole gradient, over all shards of a sharded one; 0-D, on the device."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return cast(Any, norm).full_tensor() if hasattr(norm, "full_tensor") else norm
