"""What is learned about series before training: each channel's mean and spread, and the usual interval of time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrep.encoder import BadSampleError
from mmrep.modalities.time_series.decode import decode

FILE = "normalization.json"


@dataclass(frozen=True)
class Normalization:
    """Statistics of the training split.

    Attributes:
        mean: of the observed values, by channel; one number if any number of channels is read.
        std: biased standard deviation likewise; 1 for a channel that does not vary.
        interval: median time from one step to the next.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interval: float

    def save(self, folder: Path) -> None:
        """Write ``folder/normalization.json``."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Normalization:
        """Read what `save` wrote."""
        saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(tuple(saved["mean"]), tuple(saved["std"]), saved["interval"])


def learn(samples: Iterable[Any], channels: int | None) -> Normalization:
    """Statistics of the raw series ``samples``, in one pass and in float64 (Chan, Golub and LeVeque 1979).

    Args:
        samples: raw values as `decode` takes them. Missing and unreadable ones are left out, and so are those with
            another number of channels than ``channels``.
        channels: C; None pools all channels of all series.

    Raises:
        ValueError: there is no readable series, or a channel that is never observed.
    """
    width = channels or 1
    count, mean, squares = np.zeros(width), np.zeros(width), np.zeros(width)
    intervals: list[float] = []
    for sample in samples:
        try:
            series = decode(sample)
        except BadSampleError:
            continue
        values = series.values.astype(np.float64)
        values = values.reshape(-1, 1) if channels is None else values
        if values.shape[1] != width:
            continue
        here = (~np.isnan(values)).sum(0)
        seen = here > 0
        own = np.divide(np.nansum(values, 0), here, out=np.zeros(width), where=seen)
        total = count + here
        share = np.divide(here, total, out=np.zeros(width), where=total > 0)
        squares += np.nansum((values - own) ** 2, 0) + (own - mean) ** 2 * count * share
        mean += (own - mean) * share
        count = total
        if len(series.times) > 1:
            intervals.append(float(np.median(np.diff(series.times))))
    if not count.all():
        which = "no readable series" if not count.any() else f"no value for channel {int(np.argmin(count))}"
        raise ValueError(f"normalize: the training samples hold {which} to learn from")
    std = np.sqrt(squares / count)
    interval = float(np.median(intervals)) if intervals else 1.0
    return Normalization(tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist()), interval or 1.0)
