"""What every series encoder shares: reading, cutting and padding a series, its picture, and example series."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmrep.encoder import BadSampleError, Encoder
from mmrep.modalities.time_series._plot import plot
from mmrep.modalities.time_series.decode import LARGEST, Series, decode
from mmrep.tokens import Inputs
from mmrep.views import View

Cut = Literal["start", "end", "refuse"]
Channels = int | Literal["any"]


class SeriesEncoder(Encoder):
    """Reads time series; subclasses add ``tokenize`` and ``encode``.

    `prepare` gives ``{"values": float32 [L, C], "observed": bool [L, C], "times": float32 [L]}``; values are in the raw
    unit, 0 where not observed; times begin at 0. A batch pads L (and C, where it may differ) on the right and adds
    ``"valid": bool [B, L]``, the steps that are not padding.

    Attributes:
        channels: how many channels a series must have, or "any".
        max_channels: most channels if any are allowed.
        max_length: most steps.
        cut: what to keep of a longer series.
        largest: most that an absolute value may be.
    """

    modality = "time_series"
    channels: Channels
    max_channels: int = 64
    max_length: int
    cut: Cut
    largest: float = LARGEST

    def preview(self, raw: Any) -> Image.Image:
        """A line for each channel (the first eight), each scaled to its own range; gaps are gaps."""
        series = decode(raw)
        return plot(series.values, series.times)

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One series to values, observed and times; see `decode` for what a series may be.

        A view's ``sample`` gets the decoded `Series`, before it is cut.

        Raises:
            BadSampleError: the series cannot be read; besides `decode`'s causes ``wrong channels`` and ``too long``.
        """
        series = decode(raw)
        self._check_channels(*series.values.shape)
        if view is not None:
            series = view.sample(series, seed)
        series = self._cut(series)
        observed = ~np.isnan(series.values)
        if not observed.any():
            raise BadSampleError("all missing", f"nothing is observed in the {len(observed)} steps that are read")
        values = np.where(observed, series.values, np.float32(0))
        if np.abs(values).max() > self.largest:
            raise BadSampleError("value range", f"{np.abs(values).max():g} is beyond {self.largest:g}; rescale")
        times = (series.times - series.times[0]).astype(np.float32)
        return {
            "values": torch.from_numpy(values),
            "observed": torch.from_numpy(observed),
            "times": torch.from_numpy(times),
        }

    def _check_channels(self, length: int, channels: int) -> None:
        wanted = self.channels
        if channels == wanted or (wanted == "any" and channels <= self.max_channels):
            return
        allowed = f"at most {self.max_channels}" if wanted == "any" else str(wanted)
        turned = length == wanted or (wanted == "any" and length < channels)
        hint = "; time stands first in a series: transpose it, if these are its steps" if turned else ""
        detail = f"{channels} channels (over {length} steps), where this encoder reads {allowed}{hint}"
        raise BadSampleError("wrong channels", detail)

    def _cut(self, series: Series) -> Series:
        length = len(series.values)
        if length <= self.max_length:
            return series
        if self.cut == "refuse":
            detail = f"{length} steps are more than max_length={self.max_length}; raise it, or set cut: start or end"
            raise BadSampleError("too long", detail)
        kept = slice(0, self.max_length) if self.cut == "start" else slice(length - self.max_length, length)
        return Series(series.values[kept], series.times[kept])

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad on the right: ``values`` and ``observed`` [B, L, C], ``times`` and ``valid`` [B, L]."""
        return pad(items, max((len(item["times"]) for item in items), default=1))

    def length(self, item: Inputs) -> int:
        """The number of steps."""
        return len(item["times"])

    def summary(self, item: Inputs) -> Tensor:
        """The mean of the channels at 64 evenly spaced steps, in the raw unit; gaps are bridged: float32 [64]."""
        observed = item["observed"].any(1).nonzero()[:, 0].numpy()
        weight = item["observed"].float()
        mean = ((item["values"] * weight).sum(1) / weight.sum(1).clamp_min(1)).numpy()
        at = np.linspace(0, len(mean) - 1, 64)
        return torch.from_numpy(np.interp(at, observed, mean[observed])).float()

    def examples(self, n: int, seed: int) -> list[Any]:
        """Ragged series of several kinds: array, list with None, irregular times, tensor with gaps, integers."""
        made = []
        for i in range(n):
            channels = 1 + (seed + i) % 3 if self.channels == "any" else self.channels
            length = 5 + (i * 37 + seed * 11) % 90
            length = min(length, self.max_length) if self.cut == "refuse" else length
            made.append(_EXAMPLES[i % len(_EXAMPLES)](_waves(length, channels, seed * 31 + i)))
        return made

    def oddities(self, seed: int) -> dict[str, Any]:
        """Empty, single, constant, missing, infinite, foreign, turned, unsorted, huge, tiny and integer series."""
        channels = 2 if self.channels == "any" else self.channels
        wave = _waves(min(24, self.max_length), channels, seed)
        steps = np.arange(len(wave))
        holes = np.where(steps[:, None] < len(wave) - 1, np.nan, wave)
        return {
            "empty": wave[:0],
            "one step": wave[:1],
            "constant": np.full_like(wave, 1e6 / 3),
            "all missing": np.full_like(wave, np.nan),
            "all but one missing": holes,
            "one channel missing": np.where(np.arange(channels) == 0, np.nan, wave),
            "one infinite": np.where(wave == wave.max(), np.inf, wave),
            "strings": [["1"] * channels] * 3,
            "complex": wave * 1j,
            "one channel too many": np.concatenate([wave, wave[:, :1]], 1),
            "channels first": wave.T,
            "three axes": wave[None],
            "unsorted times": {"values": wave, "times": steps[::-1]},
            "endless times": {"values": wave, "times": steps * 1e300},
            "equal times": {"values": wave, "times": steps * 0},
            "huge times": {"values": wave, "times": steps * 1e28},
            "huge": wave * 1e30,
            "largest": np.sign(wave) * LARGEST,
            "denormal": wave * 1e-42,
            "int64": (wave * 1e6).astype(np.int64) << 32,
            "longer than max_length": _waves(self.max_length + 1, channels, seed) if self.max_length < 10_000 else wave,
        }


def pad(items: Sequence[Inputs], length: int, *, left: bool = False) -> Inputs:
    """Stack prepared series into one batch of ``length`` steps; padding is zero, neither valid nor observed."""
    widest = max((item["values"].shape[1] for item in items), default=1)
    batch = {
        "values": torch.zeros(len(items), length, widest),
        "observed": torch.zeros(len(items), length, widest, dtype=torch.bool),
        "times": torch.zeros(len(items), length),
        "valid": torch.zeros(len(items), length, dtype=torch.bool),
    }
    for row, item in enumerate(items):
        steps, channels = item["values"].shape
        place = slice(length - steps, length) if left else slice(0, steps)
        batch["values"][row, place, :channels] = item["values"]
        batch["observed"][row, place, :channels] = item["observed"]
        batch["times"][row, place] = item["times"]
        batch["valid"][row, place] = True
    return batch


def _waves(length: int, channels: int, seed: int) -> np.ndarray:
    """Triangle waves on a slope, float64 [length, channels], by integer arithmetic: the same on every machine."""
    step, channel = np.mgrid[:length, :channels].astype(np.int64)
    period = 6 + (seed * 5 + channel * 7) % 23
    saw = (step * 64 + seed * 97 + channel * 61) % (period * 64)
    wave = np.minimum(saw, period * 64 - saw) - period * 16
    return wave / 256 + (seed % 5 - 2) * step / 16 + (seed + channel) % 3


def _gaps(wave: np.ndarray) -> np.ndarray:
    """NaN for about a fifth of the values, in runs; the first value stays."""
    step, channel = np.mgrid[: wave.shape[0], : wave.shape[1]]
    return np.where((step + 3 * channel) % 11 < 9, wave, np.nan) if len(wave) > 9 else wave


_EXAMPLES: tuple[Callable[[np.ndarray], Any], ...] = (
    lambda wave: wave,
    lambda wave: [[None if np.isnan(v) else float(v) for v in row] for row in _gaps(wave)],
    lambda wave: {"values": wave, "times": np.cumsum(1 + np.arange(len(wave)) * 7 % 4) / 8},
    lambda wave: torch.from_numpy(_gaps(wave)).float(),
    lambda wave: np.rint(wave * 100).astype(np.int64),
)
