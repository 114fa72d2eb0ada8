"""How large a run is, in words: what each tower has, what of it trains, and at which learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mmrep.model import Model, parameter_counts


def sizes(model: Model, groups: Sequence[Mapping[str, Any]], lr: float) -> list[str]:
    """A line for each tower, for all together, and for each learning rate.

    Args:
        model: as it is trained: what rests has no ``requires_grad``.
        groups: the optimizer's, of `mmrep.training.optim.parameter_groups`.
        lr: the base learning rate.
    """
    lines, counts = list[str](), parameter_counts(model)
    for name, config in model.config.towers.items():
        tower, (total, trained) = model.tower(name), counts[name]
        parts = {part: _trained(getattr(tower, part)) for part in ("encoder", "pool", "projector")}
        where = ", ".join(f"{part} {number:,}" for part, number in parts.items() if number)
        adapter = ""
        if config.adapter is not None and tower.adapter is not None:
            own = set(tower.encoder.state_dict()) - set(tower.adapter.base_names(tower.encoder))
            added = sum(p.numel() for key, p in tower.encoder.named_parameters() if key in own)
            adapter = f"; adapter {config.adapter.type}: {added:,}"
        share = f" ({where})" if trained else ""
        lines.append(f"tower {name}: {total:,} parameters, {trained:,} trained{share}{adapter}")
    total, trained = (sum(both[i] for both in counts.values()) for i in (0, 1))
    lines.append(f"all towers: {total:,} parameters, {trained:,} trained")
    return lines + rates(groups, lr)


def rates(groups: Sequence[Mapping[str, Any]], lr: float) -> list[str]:
    """A line for each learning rate and beginning; of `mmrep.training.optim.parameter_groups`."""
    by_rate: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for group in groups:
        by_rate.setdefault((group["lr_scale"], group["begin"]), []).append(group)
    lines: list[str] = []
    for (scale, begin), same in by_rate.items():
        size = sum(p.numel() for group in same for p in group["params"])
        decays: dict[float, int] = {}
        for group in same:
            if group["weight_decay"]:
                number = sum(p.numel() for p in group["params"])
                decays[group["weight_decay"]] = decays.get(group["weight_decay"], 0) + number
        decay = "".join(f", weight decay {value:g} on {number:,}" for value, number in decays.items())
        factor = "" if scale == 1 else f" (x {scale:.3g})"
        start = f", from {100 * begin:.3g} % of the run" if begin else ""
        lines.append(f"learning rate {lr * scale:.3g}{factor}{start}: {size:,} parameters{decay}")
    return lines


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
