"""What of a tower rests: by part, by depth or by name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import nn

from mmrep.layers import known, parameter_layers
from mmrep.registry import near

if TYPE_CHECKING:
    from mmrep.tower import Tower

Frozen = bool | Literal["tower"] | Annotated[int, Field(ge=0)] | list[str]


def freeze(tower: Tower, frozen: Frozen) -> list[nn.Module]:
    """Take the gradient from what ``frozen`` names (see `mmrep.tower.TowerConfig`).

    Args:
        tower: with encoder, pool and projector in place.
        frozen: as in its config.

    Returns:
        The modules all of whose parameters rest, outermost ones only. They belong in eval mode, so that dropout and
        running statistics rest too.

    Raises:
        ValueError: more layers than there are, or a pattern that matches nothing.
    """
    whole: list[nn.Module] = []
    if frozen is True or frozen == "tower":
        whole = [tower.encoder, tower.pool, *([tower.projector] if frozen == "tower" else [])]
    for part in whole:
        part.requires_grad_(False)
    named = dict(tower.named_parameters(remove_duplicate=False))
    names: set[str] = set()
    if isinstance(frozen, list):
        names = _matched(frozen, list(named))
    elif not isinstance(frozen, (bool, str)):
        names = {f"encoder.{name}" for name, layer in _layers(tower, frozen).items() if layer <= frozen}
    for name in names:
        named[name].requires_grad_(False)
    return [*whole, *(found for part in tower.children() for found in _resting(part))]


def _layers(tower: Tower, count: int) -> dict[str, int]:
    layers, depth = parameter_layers(tower.encoder), len(tower.encoder.layer_modules())
    if not layers:
        raise ValueError(
            f"frozen={count}: {type(tower.encoder).__name__} has no layers to count; freeze it whole (true) or by "
            "patterns of names"
        )
    if count > depth:
        raise ValueError(f"frozen={count}: {type(tower.encoder).__name__} has {depth} layers")
    return layers


def _matched(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Names that the patterns freeze, each applied to what those before it left; ``!`` takes matches out again."""
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern.removeprefix("!"))}
        if not matches:
            raise ValueError(f"frozen: {pattern!r} matches no parameter{near(pattern.removeprefix('!'), known(names))}")
        if pattern.startswith("!") and not matches & chosen:
            raise ValueError(f"frozen: {pattern!r} takes out what no pattern before it has frozen")
        chosen = chosen - matches if pattern.startswith("!") else chosen | matches
    return chosen


def _resting(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that have parameters and train none of them."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        return [module]
    return [found for child in module.children() for found in _resting(child)]
