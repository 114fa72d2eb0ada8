"""Gradient checkpointing: a block's activations are computed again in the backward pass instead of being kept.

(Chen et al. 2016, arXiv:1604.06174.) Memory for one more forward pass: of each block only its input is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmrep.encoder import Encoder


def checkpoint_blocks(encoder: Encoder) -> bool:
    """Compute the blocks of an encoder, and of encoders inside it, again in the backward pass.

    The gradient is the same: dropout draws the same numbers again. Names in checkpoints stay as they are. One way
    serves the blocks of every library; transformers' decoders, which would put keys and values into their cache
    twice, are loaded without one. It never goes through torch's reentrant variant, under which a block that several
    objectives run breaks DDP's reduction.

    Args:
        encoder: changed in place.

    Returns:
        Whether there are blocks that can be computed again; of an encoder without `Encoder.layer_modules` nothing can.
    """
    parts = [part for part in encoder.modules() if isinstance(part, Encoder)]
    blocks = {id(block): block for part in parts for block in part.layer_modules()}.values()
    found = [block for block in blocks if not isinstance(block, nn.ModuleList)]  # a list has no forward pass of its own
    for block in found:
        block.forward = _Again(block)
    return bool(found)


class _Again:
    """A block's forward pass, computed again where a gradient is asked for. Copied with the block, it runs the copy."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *args: Any, **options: Any) -> Any:
        forward, runs = type(self.block).forward, 0
        if not torch.is_grad_enabled():
            return forward(self.block, *args, **options)
        ways = [(config, config._attn_implementation) for config in _configs(self.block)]

        def run(*args: Any, **options: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 1:
                return forward(self.block, *args, **options)
            kept = [(buffer, buffer.clone()) for buffer in self.block.buffers()]  # running statistics count once
            now = [(config, config._attn_implementation) for config, _ in ways]
            _set(ways)
            try:
                return forward(self.block, *args, **options)
            finally:
                _set(now)
                for buffer, value in kept:
                    buffer.copy_(value)

        return checkpoint(run, *args, use_reentrant=False, **options)


def _configs(block: nn.Module) -> list[Any]:
    """Configs of transformers, which say how parts of the block compute attention.

    An encoder may be asked for its attention between the two passes, and another way draws another dropout.
    """
    found = {id(config): config for part in block.modules() if (config := getattr(part, "config", None)) is not None}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _set(ways: list[tuple[Any, Any]]) -> None:
    for config, way in ways:
        config._attn_implementation = way
