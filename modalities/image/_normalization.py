"""Mean and standard deviation of each channel, learned from the training pictures and saved with the encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrep.encoder import BadSampleError
from mmrep.modalities.image._bands import read_bands

FILE = "normalization.json"
_FARTHEST = 1e6  # standard deviations; what lies beyond is a mark for missing data, not a measurement


def learn(samples: Iterable[Any], folder: Path, *, channels: int, max_pixels: int) -> None:
    """Write ``normalization.json``: the statistics of all pixels of all pictures, each pixel counting the same.

    Sums are merged picture by picture in float64 (Chan, Golub and LeVeque 1979), so that a large mean costs the
    deviation no digits. A channel that never changes gets a deviation of 1. Unreadable pictures are left out.

    Raises:
        ValueError: no picture could be read; the message has the first reason.
    """
    count, mean, squares = 0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    reason = "there are none"
    for raw in samples:
        if raw is None:
            continue
        try:
            pixels = read_bands(raw, channels, max_pixels=max_pixels).flatten(1).double()
        except BadSampleError as error:
            reason = str(error) if count == 0 else reason
            continue
        n, here = pixels.shape[1], pixels.mean(1)
        gap, total = here - mean, count + n
        squares += (pixels - here[:, None]).square().sum(1) + gap.square() * (count * n / total)
        mean += gap * (n / total)
        count = total
    if count == 0:
        raise ValueError(f"mean and std: no training picture with {channels} channels to learn from ({reason})")
    std = (squares / count).sqrt()
    write(folder, tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist()))


def write(folder: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Write the statistics into ``folder``."""
    (folder / FILE).write_text(json.dumps({"mean": mean, "std": std}, indent=1) + "\n", encoding="utf-8")


def read(folder: Path | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation of each channel as `write` left them; None if it did not."""
    if folder is None or not (folder / FILE).is_file():
        return None
    saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return tuple(saved["mean"]), tuple(saved["std"])


def standardize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Float32 [C, H, W] in its own range to mean 0 and deviation 1 per channel.

    Raises:
        BadSampleError: ``value range``: a pixel a million deviations away, or not finite after resizing.
    """
    out = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    far = float(out.abs().max())
    if not far <= _FARTHEST:
        raise BadSampleError(
            "value range", f"a pixel {far:.2g} standard deviations from the mean; is it a mark for missing data?"
        )
    return out
