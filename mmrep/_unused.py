"""Parameters that no training step can reach: a pretrained network's own pooling head under another pool."""

from __future__ import annotations

import logging

import torch

from mmrep.config import ConfigError
from mmrep.model import Model, Tower

logger = logging.getLogger(__name__)


def freeze_unused(model: Model) -> dict[str, list[str]]:
    """Freeze encoder and pool parameters that neither the tokens nor the embedding depend on.

    A gradient would never come to them: decay would shrink them, and the processes of a data-parallel run would wait
    for it in vain.

    Args:
        model: with its towers in place; each tower that trains is run once, on two of its encoder's examples.

    Returns:
        The names frozen, by tower.

    Raises:
        ConfigError: a weight of an adapter has no effect.
    """
    frozen: dict[str, list[str]] = {}
    for name in model.towers:
        tower = model.tower(name)
        if tower.frozen or not (unused := _unused(tower)):
            continue
        if tower.adapter is not None:
            kept = {f"encoder.{now}" for now in tower.adapter.base_names(tower.encoder)}
            if passed := [n for n in unused if n.startswith("encoder.") and n not in kept]:
                raise ConfigError([
                    f"model.towers.{name}.adapter: the encoder passes by {passed[0]} ({len(passed)} weights of the "
                    "adapter have no effect), as it reads what it stands in for without calling it; name other targets"
                ])  # fmt: skip
        for parameter in unused.values():
            parameter.requires_grad_(False)
        frozen[name] = list(unused)
        logger.info("tower %s: pool %r leaves out %s; frozen", name, tower.config.pool.type, ", ".join(unused))
    return frozen


def _unused(tower: Tower) -> dict[str, torch.nn.Parameter]:
    named = {n: p for n, p in tower.named_parameters() if p.requires_grad}
    was_training = tower.training
    tower.eval()  # no dropout, no statistics
    try:
        encoder, device = tower.encoder, next(tower.parameters()).device
        inputs = encoder.collate([encoder.prepare(raw) for raw in encoder.examples(2, 0)])
        encoding = tower.encoding({key: value.to(device) for key, value in inputs.items()})
        reached = encoding.tokens.values.float().sum() + tower.project(tower.pool(encoding)).sum()
        reached = reached + sum(value.float().sum() for value in encoding.extra.values())
        gradients = torch.autograd.grad(reached, list(named.values()), allow_unused=True)
    finally:
        tower.train(was_training)
    return {name: p for (name, p), g in zip(named.items(), gradients, strict=True) if g is None}
