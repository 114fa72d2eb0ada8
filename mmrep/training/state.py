"""Weights and optimizer state by parameter name, in and out: what a checkpoint holds of them.

Names are those of the bare module: no ``module.`` of a data-parallel wrapper and no ``_orig_mod.`` of a compiled part,
wherever in the module they are. Sharded tensors (FSDP2) are gathered on the way out and sharded again on the way in, so
that a checkpoint does not depend on how the run was spread; all processes must call these functions together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmrep.registry import near
from mmrep.training.checkpoint import Packet
from mmrep.training.errors import ResumeError


def module_packet(module: nn.Module) -> Packet:
    """All parameters and persistent buffers."""
    clean = _Cleaner(module)
    return Packet({clean(name): _whole(value) for name, value in module.state_dict().items()})


def load_module(module: nn.Module, packet: Packet) -> None:
    """Load what `module_packet` gave.

    Raises:
        ResumeError: the names or the shapes are not the module's.
    """
    current, clean = module.state_dict(), _Cleaner(module)
    names = {clean(name): name for name in current}
    _refuse_differences("weights", set(packet.tensors), set(names))
    for name, value in packet.tensors.items():
        if value.shape != current[names[name]].shape:
            raise ResumeError(f"{name} has shape {list(value.shape)} in the checkpoint and "
                              f"{list(current[names[name]].shape)} in this recipe")  # fmt: skip
    module.load_state_dict({names[n]: _like(value, current[names[n]]) for n, value in packet.tensors.items()})


def optimizer_packet(optimizer: torch.optim.Optimizer, module: nn.Module) -> Packet:
    """The optimizer's state: tensors named ``<parameter>/<key>``, and what is not a tensor as JSON."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for parameter, name in _names(optimizer, module).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = _whole(value)
            else:
                others[f"{name}/{key}"] = value
    return Packet(tensors, others)


def load_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, packet: Packet) -> None:
    """Load what `optimizer_packet` gave. Hyper-parameters are not loaded: they follow from the config and the step.

    Raises:
        ResumeError: there is state of a parameter that this optimizer does not train.
    """
    names = _names(optimizer, module)
    stored: dict[str, dict[str, Any]] = {}
    for key, value in [*packet.tensors.items(), *packet.data.items()]:
        name, _, part = key.rpartition("/")
        stored.setdefault(name, {})[part] = value
    trained = set(names.values())
    _refuse_differences("optimizer state", set(stored), trained, missing=False)
    state: dict[int, dict[str, Any]] = {}
    ordered = (parameter for group in optimizer.param_groups for parameter in group["params"])
    for index, parameter in enumerate(ordered):
        found = stored.get(names[parameter])
        if found is not None:
            state[index] = {key: value if key == "step" else _like(value, parameter) for key, value in found.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _names(optimizer: torch.optim.Optimizer, module: nn.Module) -> Mapping[Tensor, str]:
    """Name by parameter, of the parameters that the optimizer moves."""
    trained, clean = {id(p) for group in optimizer.param_groups for p in group["params"]}, _Cleaner(module)
    return {p: clean(name) for name, p in module.named_parameters() if id(p) in trained}


class _Cleaner:
    """Takes wrappers out of names. ``module`` goes by its owner's type: a part of ours may well be called so."""

    def __init__(self, module: nn.Module) -> None:
        parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        parts = module.named_modules(remove_duplicate=False)
        self._inner = {f"{name}.module".lstrip(".") for name, part in parts if isinstance(part, parallel)}

    def __call__(self, name: str) -> str:
        steps = name.split(".")
        paths = [".".join(steps[: i + 1]) for i in range(len(steps))]
        kept = (s for s, path in zip(steps, paths, strict=True) if s != "_orig_mod" and path not in self._inner)
        return ".".join(kept)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Any, reference: Tensor) -> Any:
    """``value`` sharded, placed and strided as ``reference`` is, where both have the same shape.

    The strides matter: a fused optimizer walks weights and moments in memory order, channels-last weights included.
    """
    if not isinstance(value, Tensor) or value.shape != reference.shape:
        return value
    if isinstance(reference, DTensor):
        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
    return torch.empty_like(reference, dtype=value.dtype, requires_grad=False).copy_(value)


def _refuse_differences(what: str, stored: set[str], known: set[str], *, missing: bool = True) -> None:
    lines = [f"  only in the checkpoint: {name}{near(name, known)}" for name in sorted(stored - known)[:8]]
    if missing:
        lines += [f"  only in this recipe: {name}{near(name, stored)}" for name in sorted(known - stored)[:8]]
    if lines:
        raise ResumeError(f"the {what} of the checkpoint are not this recipe's:\n" + "\n".join(lines))
