"""What every audio encoder shares: reading, resampling, mixing, cutting and levelling a clip, and padding a batch."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.encoder import BadSampleError, Encoder
from mmrep.modalities.audio._signals import examples, oddities
from mmrep.modalities.audio.decode import MAX_DURATION, MAX_LEVEL, MAX_RATE, MIN_RATE, Waveform, decode, mix
from mmrep.tokens import Inputs
from mmrep.views import View

_LEVELS = {"peak": 1.0, "rms": 0.1}  # 0 and -20 dB of full scale
MAX_GAIN = 1000.0  # 60 dB: what is quieter is noise
_MAX_RATIO = 2000


@config
class Preprocess:
    """How decoded audio becomes the network's input. It is part of the encoder and saved with it.

    sampling_rate: in Hz, 8000 to 192000; audio of other rates is resampled. channels: "mono" is the mean of all
    channels; "stereo" repeats a mono clip, and the mean of more than two. max_seconds: longer clips keep their first
    part only (a view may choose another); None keeps all. normalize: scale each clip so that its largest sample is 1
    ("peak") or its root mean square is 0.1 ("rms"), by 60 dB at most; "none" leaves the recording's level.
    max_duration: longer audio is refused unread, in seconds.
    """

    sampling_rate: Annotated[int, Field(ge=MIN_RATE, le=MAX_RATE)] = 16_000
    channels: Literal["mono", "stereo"] = "mono"
    max_seconds: Annotated[float, Field(gt=0)] | None = 10.0
    normalize: Literal["none", "peak", "rms"] = "none"
    max_duration: Annotated[float, Field(gt=0)] = MAX_DURATION


class AudioEncoder(Encoder):
    """Reads audio; subclasses add ``tokenize`` and ``encode``.

    `prepare` gives ``{"wave": float32 [C, T]}`` at the encoder's own rate, so that clips of any rates share a batch.
    `collate` gives ``{"wave": float32 [B, C, T], "lengths": int64 [B], "seconds": float32 [B]}``, zeros behind each
    clip's ``lengths`` samples.

    Args:
        config: the encoder's config.
        files: see `Encoder`.
        preprocess: the preprocessing; may be the config itself.
    """

    modality = "audio"

    def __init__(self, config: Any, files: Path | None = None, *, preprocess: Preprocess) -> None:
        super().__init__(config, files)
        self.preprocess = preprocess
        self.channels = 2 if preprocess.channels == "stereo" else 1

    def preview(self, raw: Any) -> str:
        """Such as ``"1.20 s, 44.1 kHz, stereo"``."""
        clip = decode(raw, max_duration=self.preprocess.max_duration)
        count = len(clip.values)
        kind = {1: "mono", 2: "stereo"}.get(count, f"{count} channels")
        return f"{clip.seconds:.2f} s, {clip.sampling_rate / 1000:g} kHz, {kind}"

    def read(self, raw: Any, view: View | None = None, seed: int = 0) -> Waveform:
        """Decode, resample, mix, apply the view, cut to ``max_seconds`` and level.

        Raises:
            BadSampleError: see `decode`; also a clip that the view left without samples or not finite.
        """
        how = self.preprocess
        # A view that looks at the waveform gets all of it.
        looks = view is not None and type(view).sample is not View.sample
        at_most = None if looks or how.max_seconds is None else how.max_seconds + 0.1  # the resampler looks ahead
        clip = decode(raw, max_duration=how.max_duration, at_most=at_most)
        # Resampling is linear, so mixing first gives the same and costs less.
        values = resample(mix(clip.values, self.channels), clip.sampling_rate, how.sampling_rate)
        clip = Waveform(values, how.sampling_rate)
        if view is not None:
            clip = view.sample(clip, seed)
            check_wave(clip.values)
        values = clip.values
        if how.max_seconds is not None:
            values = values[:, : max(1, round(how.max_seconds * how.sampling_rate))]
        return Waveform(level(values, how.normalize), how.sampling_rate)

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One clip to ``{"wave": float32 [C, T]}``; see `decode` for what audio may be.

        Raises:
            BadSampleError: the audio cannot be read.
        """
        return {"wave": self.read(raw, view, seed).values}

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad with zeros to the longest clip: ``wave`` [B, C, T], ``lengths`` [B] and ``seconds`` [B]."""
        inputs = pad_waves([item["wave"] for item in items], self.channels)
        return {**inputs, "seconds": inputs["lengths"] / self.preprocess.sampling_rate}

    def summary(self, item: Inputs) -> Tensor:
        """Mean and standard deviation over time of the log power of 257 frequencies: float32 [514]."""
        if "wave" not in item:
            return super().summary(item)
        wave = item["wave"].mean(0)
        wave = nn.functional.pad(wave, (0, max(0, 512 - len(wave))))
        window = torch.hann_window(512, device=wave.device)
        power = torch.stft(wave, 512, 256, window=window, center=False, return_complex=True).abs().square()
        log = (power + 1e-8).log()
        return torch.cat([log.mean(1), log.std(1, correction=0)])

    def examples(self, n: int, seed: int) -> list[Any]:
        """Tones, chirps, clicks, noise and silence of odd lengths, rates, formats and channels."""
        return examples(n, seed)

    def oddities(self, seed: int) -> dict[str, Any]:
        """Audio at and past the edge of what can be read."""
        return oddities(seed, self.preprocess.max_duration)


def pad_waves(waves: Sequence[Tensor], channels: int) -> Inputs:
    """Float32 [C, T] each, of any T, to ``wave`` [B, C, longest T] and ``lengths`` int64 [B]."""
    lengths = torch.tensor([wave.shape[1] for wave in waves], dtype=torch.long)
    longest = int(lengths.max()) if len(waves) else 1
    batch = torch.zeros(len(waves), channels, longest)
    for row, wave in zip(batch, waves, strict=True):
        row[:, : wave.shape[1]] = wave
    return {"wave": batch, "lengths": lengths}


def resample(values: Tensor, old: int, new: int) -> Tensor:
    """Change the sampling rate of float32 [C, T], by torchaudio's windowed sinc.

    The ratio of the rates is rounded to a fraction whose denominator is at most 2000, which is exact for every common
    pair and off by less than 1 in 10,000 for others: the exact filter of 44101 to 16000 Hz would take gigabytes.
    """
    ratio = Fraction(old, new).limit_denominator(_MAX_RATIO)
    return values if ratio == 1 else _resampler(ratio.numerator, ratio.denominator)(values)


@lru_cache(maxsize=32)
def _resampler(old: int, new: int) -> nn.Module:
    from torchaudio.transforms import Resample

    return Resample(old, new)


def level(values: Tensor, kind: Literal["none", "peak", "rms"]) -> Tensor:
    """Scale float [C, T] to the level of ``kind``; silence stays silence."""
    if kind == "none":
        return values
    measured = float(values.abs().max() if kind == "peak" else values.double().square().mean().sqrt())
    return values * min(_LEVELS[kind] / max(measured, 1e-30), MAX_GAIN)


def check_wave(values: Tensor) -> None:
    """Refuse what a view must not leave behind.

    Raises:
        BadSampleError: no samples, or not finite or out of range.
    """
    if not values.shape[1]:
        raise BadSampleError("empty audio", "the view left no samples")
    if not bool((values.abs() <= MAX_LEVEL).all()):
        raise BadSampleError("not finite", "the view left NaN, infinity or values out of range")
