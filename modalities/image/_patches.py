"""What targets made from pixels share: the patches of an encoder, and one vector for each of its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmrep.encoder import Encoder
from mmrep.tokens import Grid, Inputs


def patch_of(encoder: Encoder, name: str) -> tuple[int, int]:
    """Side of the patches that the encoder's tokens are, and number of channels.

    Raises:
        ValueError: its tokens are no square patches of whole pictures.
    """
    known: Any = encoder
    patch = getattr(encoder, "patch", None)
    if encoder.modality != "image" or not isinstance(patch, int):
        raise ValueError(f"target {name!r} needs an image encoder with a patch size (image-vit), not this one")
    if getattr(encoder, "native", False):
        raise ValueError(f"target {name!r} needs whole pictures; resize: native gives patches. Use crop or squash")
    return patch, known.preprocess.channels


def pixels_of(encoder: Encoder, inputs: Inputs) -> Tensor:
    """The normalised pixels of a batch, float [B, C, H, W]."""
    known: Any = encoder
    return known.normalize(inputs["pixels"])


def per_patch(values: Tensor, side: int, grid: Grid) -> Tensor:
    """Figures [B, C, rows, columns] to one vector for each token: [B, N, side * side * C].

    Args:
        values: ``side`` by ``side`` places of them make a patch.
        side: see there.
        grid: the encoder's tokens: special ones in front, then patches in raster order.
    """
    B, C = values.shape[:2]
    patches = F.unfold(values, side, stride=side).view(B, C, side * side, -1).permute(0, 3, 2, 1).flatten(2)
    special = grid.valid.shape[1] - patches.shape[1]
    return torch.cat([patches.new_zeros(B, special, patches.shape[2]), patches], 1)
