"""Pictures at their own aspect ratio, as patches (NaViT, arXiv:2307.06304; NaFlex, arXiv:2502.14786)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmrep.modalities.image._preprocess import FILTERS, Preprocess
from mmrep.tokens import Grid, Inputs


def native_size(width: int, height: int, *, patch: int, max_patches: int, enlarge: bool) -> tuple[int, int]:
    """Width and height of the largest copy of the same aspect ratio that ``max_patches`` patches cover.

    Args:
        width: of the picture.
        height: of the picture.
        patch: side of a patch, in pixels; partly filled patches count whole.
        max_patches: at most so many, rows times columns.
        enlarge: whether a small picture grows.

    Returns:
        The size in pixels, at least 1 x 1; a picture longer than ``max_patches`` to 1 is made wider than it was.
    """
    longer = max(width, height)

    def at(side: int) -> tuple[int, int]:
        return max(1, round(width * side / longer)), max(1, round(height * side / longer))

    low, high = 1, patch * max_patches if enlarge else longer  # of the longer side: low fits, past high is not wanted
    while low < high:
        middle = (low + high + 1) // 2
        wide, tall = at(middle)
        fits = math.ceil(wide / patch) * math.ceil(tall / patch) <= max_patches
        low, high = (middle, high) if fits else (low, middle - 1)
    return at(low)


def fit_native(picture: Any, how: Preprocess, *, patch: int, max_patches: int, enlarge: bool) -> Any:
    """A PIL image, or bands as float32 [C, H, W], resized to its `native_size`."""
    from torchvision.transforms.v2 import functional as TF

    asked = {"patch": patch, "max_patches": max_patches, "enlarge": enlarge}
    if isinstance(picture, Image.Image):
        size = native_size(*picture.size, **asked)
        gap = 3.0 if how.fast_resize else None
        return picture if size == picture.size else picture.resize(size, FILTERS[how.interpolation], reducing_gap=gap)
    wide, tall = native_size(picture.shape[2], picture.shape[1], **asked)
    if (tall, wide) == tuple(picture.shape[1:]):
        return picture
    return TF.resize(picture, [tall, wide], TF.InterpolationMode(how.interpolation), antialias=True)


def to_patches(pixels: Tensor, patch: int, fill: Sequence[float]) -> Inputs:
    """One picture [C, H, W] to ``patches`` [rows * columns, C * patch * patch] and ``shape`` int64 [2] (rows, columns).

    A patch that reaches over the right or lower border is filled up with ``fill``, a value per channel.
    """
    C, H, W = pixels.shape
    rows, columns = math.ceil(H / patch), math.ceil(W / patch)
    whole = torch.tensor(fill).to(pixels.dtype).view(C, 1, 1).repeat(1, rows * patch, columns * patch)
    whole[:, :H, :W] = pixels
    cut = whole.view(C, rows, patch, columns, patch).permute(1, 3, 0, 2, 4)
    return {"patches": cut.reshape(rows * columns, -1), "shape": torch.tensor([rows, columns])}


def collate_patches(items: Sequence[Inputs]) -> Inputs:
    """``patches`` [B, N, C * patch * patch], padded with zeros at the end, ``valid`` bool [B, N], ``shape`` [B, 2]."""
    counts = torch.tensor([len(item["patches"]) for item in items])
    most = int(counts.max())
    patches = torch.stack([F.pad(item["patches"], (0, 0, 0, most - len(item["patches"]))) for item in items])
    valid = torch.arange(most) < counts[:, None]
    return {"patches": patches, "valid": valid, "shape": torch.stack([item["shape"] for item in items])}


def ragged_grid(inputs: Inputs, shapes: Sequence[tuple[int, int]], special: int) -> Grid:
    """The grid of a batch of `collate_patches` behind ``special`` tokens; regular where all pictures are alike."""
    valid, columns = inputs["valid"], inputs["shape"][:, 1:]
    B, N = valid.shape
    if len(set(shapes)) == 1 and shapes[0][0] * shapes[0][1] == N:
        return Grid.regular(B, shapes[0], special=special, device=valid.device)
    places = torch.arange(N, device=valid.device)
    coords = torch.stack([places // columns, places % columns], dim=-1) * valid[..., None]
    return Grid(
        coords=F.pad(coords.float(), (0, 0, special, 0)),
        valid=F.pad(valid, (special, 0), value=True),
        special=F.pad(torch.zeros_like(valid), (special, 0), value=True),
    )
