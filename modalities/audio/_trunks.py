"""An encoder around a network of another library, its *trunk*."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrep.encoder import BadSampleError
from mmrep.modalities.audio._base import AudioEncoder, Preprocess
from mmrep.tokens import Encoding, Grid, Inputs, Tokens
from mmrep.views import View


class TrunkEncoder(AudioEncoder):
    """`tokenize` and `encode` of an encoder that wraps a network, also of batches without rows.

    A trunk has ``tokenize(inputs)``, ``encode(tokens, keep, layers)``, ``length(item)`` and the attributes ``width,
    pooled_width, depth, supports, shortest`` (the fewest samples that it can read).

    Args:
        config: of the encoder.
        files: as in `Encoder`.
        trunk: the wrapped network.
        preprocess: how its inputs are made.
    """

    def __init__(self, config: Any, files: Path | None, *, trunk: Any, preprocess: Preprocess) -> None:
        super().__init__(config, files, preprocess=preprocess)
        self.trunk = trunk
        self.width, self.depth, self.pooled_width = trunk.width, trunk.depth, trunk.pooled_width
        self.supports = trunk.supports

    def read_enough(self, raw: Any, view: View | None, seed: int) -> Tensor:
        """One clip, float32 [1, T].

        Raises:
            BadSampleError: the audio cannot be read, or (``too short``) is less than one frame of the model.
        """
        values = self.read(raw, view, seed).values
        if values.shape[1] < self.trunk.shortest:
            raise BadSampleError(
                "too short", f"{values.shape[1]} samples; the model reads {self.trunk.shortest} or more"
            )
        return values

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One clip to ``{"wave": float32 [1, T]}``; see `decode` for what audio may be.

        Raises:
            BadSampleError: the audio cannot be read, or (``too short``) is less than one frame of the model.
        """
        return {"wave": self.read_enough(raw, view, seed)}

    def length(self, item: Inputs) -> int:
        """The number of frames of a waveform; spectrograms are all of one length."""
        return self.trunk.length(item)

    def tokenize(self, inputs: Inputs) -> Tokens:
        """Inputs to tokens; see the network."""
        if not len(inputs["seconds"]):  # most of the libraries' layers cannot run on no rows
            one = self.trunk.tokenize({key: value.new_ones(1, *value.shape[1:]) for key, value in inputs.items()})
            return Tokens(one.values[:0], _no_rows(one.grid))
        return self.trunk.tokenize(inputs)

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Run the transformer over the kept tokens; layers are block outputs, before a final norm."""
        self.check_request(keep, layers)
        if len(tokens.values):
            return self.trunk.encode(tokens, keep, layers)
        first = None if keep is None else keep.new_zeros(1, keep.shape[1])
        return _empty(self.trunk.encode(_one_blank(tokens), first, layers))


def _no_rows(grid: Grid) -> Grid:
    return Grid(grid.coords[:0], grid.valid[:0], grid.special[:0], grid.shape)


def _one_blank(tokens: Tokens) -> Tokens:
    """One row of zeros in place of a batch without rows; what made the batch keeps its gradient path."""
    values, grid = tokens.values, tokens.grid
    N, C = grid.coords.shape[1:]
    flags = torch.ones(1, N, dtype=torch.bool, device=values.device)
    special = torch.zeros_like(flags)
    return Tokens(
        values.new_zeros(1, N, values.shape[2]) + values.sum(), Grid(grid.coords.new_zeros(1, N, C), flags, special)
    )


def _empty(encoding: Encoding) -> Encoding:
    """An encoding without its rows."""
    return Encoding(
        Tokens(encoding.tokens.values[:0], _no_rows(encoding.tokens.grid)),
        None if encoding.pooled is None else encoding.pooled[:0],
        tuple(layer[:0] for layer in encoding.layers),
    )
