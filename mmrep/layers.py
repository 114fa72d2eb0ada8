"""Which layer of an encoder a parameter belongs to: what counts as before, in and after its blocks.

It is found by looking: whatever the first block's input depends on comes before the layers, in any library's model and
under any name. Tables of names (``pos_embed``, ``embeddings``, …) are right for one library at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmrep.encoder import Encoder


class _Reached(Exception):
    """The first block is about to run: the rest of the forward pass is not needed."""


def stacked(module: nn.Module, depth: int) -> list[nn.Module]:
    """The ``depth`` blocks of a network: of all its lists of that length, the one with the most parameters.

    Args:
        module: the network.
        depth: how many blocks it has.

    Returns:
        The blocks in order; empty if ``depth`` is 0 or no list is so long (blocks that share their weights, as ALBERT's
        do, are one block in a loop).
    """
    lists = [part for part in module.modules() if isinstance(part, (nn.ModuleList, nn.Sequential)) and depth]
    long = [part for part in lists if len(part) == depth]
    sizes = [sum(p.numel() for p in part.parameters()) for part in long]
    return list(long[sizes.index(max(sizes))]) if long else []


def parameter_layers(encoder: Encoder) -> dict[str, int]:
    """The layer of every parameter of an encoder, by name relative to it.

    0: what the input of the first block depends on (embeddings, positions). k: block k. One more than there are blocks:
    the rest (final norms, projections).

    Args:
        encoder: anywhere, in any mode; one of its examples is run up to its first block.

    Returns:
        Empty if the encoder has no `Encoder.layer_modules`.
    """
    blocks = encoder.layer_modules()
    if not blocks:
        return {}
    by_block = {id(p): number for number, block in enumerate(blocks, 1) for p in block.parameters()}
    others = {n: p for n, p in encoder.named_parameters(remove_duplicate=False) if id(p) not in by_block}
    before = _before(encoder, blocks[0], list(others.values()))
    last = len(blocks) + 1
    return {
        name: by_block.get(id(p), 0 if id(p) in before else last)
        for name, p in encoder.named_parameters(remove_duplicate=False)
    }


def known(names: Sequence[str]) -> list[str]:
    """What a pattern may have been meant to say: every name, and every part of the tree with ``.*``."""
    parts = {name.rsplit(".", level)[0] + ".*" for name in names for level in range(1, name.count(".") + 1)}
    return [*names, *sorted(parts)]


def _before(encoder: Encoder, first: nn.Module, parameters: list[nn.Parameter]) -> set[int]:
    """Ids of those of ``parameters`` that the input of the first block depends on."""
    wanted = [p for p in {id(p): p for p in parameters}.values() if p.is_floating_point()]
    if not wanted:
        return set()
    states, was_training = [p.requires_grad for p in wanted], encoder.training
    encoder.eval()  # no statistics, no random numbers
    try:
        for parameter in wanted:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            inputs = [value for value in _input_of(first, encoder) if value.requires_grad]
        ones = [torch.ones_like(value) for value in inputs]
        gradients = torch.autograd.grad(inputs, wanted, ones, allow_unused=True) if inputs else ()
    finally:
        encoder.train(was_training)
        for parameter, state in zip(wanted, states, strict=True):
            parameter.requires_grad_(state)
    return {id(p) for p, gradient in zip(wanted, gradients, strict=bool(inputs)) if gradient is not None}


def _input_of(first: nn.Module, encoder: Encoder) -> list[Tensor]:
    """The tensors that the first block is called with, for one of the encoder's examples."""
    found: list[Tensor] = []

    def look(_: nn.Module, args: Any, options: Any) -> None:
        found.extend(_tensors((args, options)))
        raise _Reached

    entry = next(part for part in first.modules() if not isinstance(part, nn.ModuleList))  # a list is never called
    handle = entry.register_forward_pre_hook(look, with_kwargs=True)
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    batch = encoder.collate([encoder.prepare(raw) for raw in encoder.examples(1, 0)])
    try:
        encoder.forward({key: value.to(device) for key, value in batch.items()})  # not what was compiled
    except _Reached:
        return found
    finally:
        handle.remove()
    raise ValueError(f"{type(encoder).__name__}: its forward pass does not call the first of its layer_modules()")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
