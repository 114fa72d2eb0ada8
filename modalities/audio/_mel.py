"""Log-mel spectrograms of padded batches, and the masks that SpecAugment puts on them."""

from __future__ import annotations

import warnings
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.modalities.audio._base import Preprocess
from mmrep.tokens import Inputs

MASK_TIME, MASK_MEL = "mask_time", "mask_mel"
"""Keys that `SpecAugment` adds to the inputs."""


@config
class Mel(Preprocess):
    """Fields of a log-mel spectrogram, beside the preprocessing of its waveform.

    window: in seconds; the Fourier transform is as long as the next power of two. hop: from frame to frame, in
    seconds; at most ``window``. mels: number of mel bands. low, high: their outer edges, in Hz; high None is half the
    sampling rate. mel_scale, mel_norm: as in torchaudio. floor: power below which the logarithm (natural) is cut off;
    a full-scale sine has about (window in samples)^2 / 16.
    """

    window: Annotated[float, Field(gt=0)] = 0.025
    hop: Annotated[float, Field(gt=0)] = 0.010
    mels: Annotated[int, Field(ge=1)] = 64
    low: Annotated[float, Field(ge=0)] = 20.0
    high: Annotated[float, Field(gt=0)] | None = None
    mel_scale: Literal["htk", "slaney"] = "htk"
    mel_norm: Literal["slaney"] | None = None
    floor: Annotated[float, Field(gt=0)] = 1e-5

    def __post_init__(self) -> None:
        top = self.sampling_rate / 2
        if not self.low < (self.high or top) <= top:
            raise ValueError(f"low={self.low} and high={self.high} are no band within 0 to {top:g} Hz")
        if self.samples(self.hop) < 1 or self.hop > self.window:
            raise ValueError(f"hop={self.hop} must be at least one sample and at most window={self.window}")
        # Every band must hold a bin, or it is the same constant for every sound.
        if bool((filters(self).sum(0) == 0).any()):
            raise ValueError(
                f"mels={self.mels} are more bands than a window of {self.window} s resolves between {self.low:g} and "
                f"{self.high or top:g} Hz: use fewer bands or a longer window"
            )

    def samples(self, seconds: float) -> int:
        """A duration in samples."""
        return round(seconds * self.sampling_rate)

    @property
    def fft(self) -> int:
        """Length of the Fourier transform."""
        return 1 << (self.samples(self.window) - 1).bit_length()


def filters(how: Mel) -> Tensor:
    """The mel filter bank, float32 [bins, mels]."""
    from torchaudio.functional import melscale_fbanks

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty bands, which `Mel` refuses
        return melscale_fbanks(
            how.fft // 2 + 1, how.low, how.high or how.sampling_rate / 2, how.mels, how.sampling_rate, how.mel_norm,
            how.mel_scale,
        )  # fmt: skip


class LogMel(nn.Module):
    """A padded batch of waveforms to log-mel frames, equal to torchaudio's ``MelSpectrogram`` with zeros outside.

    Frames are centred: frame f looks half a window to either side of sample f * hop. What lies outside a clip is
    zero, whether it is the end of the batch or padding; so a clip has the same frames alone and in any batch.
    """

    def __init__(self, how: Mel) -> None:
        super().__init__()
        self.how = how
        self.hop = how.samples(how.hop)
        # Not in the state: they follow from the config.
        self.register_buffer("window", torch.hann_window(how.samples(how.window)), persistent=False)
        self.register_buffer("filters", filters(how), persistent=False)
        self.window: Tensor
        self.filters: Tensor

    def forward(self, wave: Tensor) -> Tensor:
        """Float [B, C, T] to float32 [B, C, 1 + T // hop, mels], under autocast too."""
        return self.power(wave).clamp_min(self.how.floor).log()

    def power(self, wave: Tensor) -> Tensor:
        """The same without the logarithm, at least 0."""
        from torchaudio.functional import spectrogram

        with torch.autocast(wave.device.type, enabled=False):
            window = self.window.float()
            if not len(wave):
                return wave.new_zeros(
                    *wave.shape[:2], 1 + wave.shape[2] // self.hop, self.how.mels, dtype=torch.float32
                )
            power = spectrogram(
                wave.float(), 0, window, self.how.fft, self.hop, len(window), 2.0, False, pad_mode="constant"
            )
            return power.mT @ self.filters.float()

    def frames(self, lengths: Tensor) -> Tensor:
        """How many frames clips of ``lengths`` samples have: int64 [B]."""
        return 1 + lengths // self.hop


def masked_frames(inputs: Inputs, frames: int, counts: Tensor, mels: int) -> Tensor | None:
    """Where `SpecAugment` masks a spectrogram: bool [B, frames, mels], True is masked; None if it was not asked to.

    Args:
        inputs: may hold ``mask_time`` float [B, n, 2] and ``mask_mel`` float [B, m, 2]: beginnings and ends, as shares
            0..1 of the clip's frames and of the bands. A frame or band is masked if its middle lies between the two.
        frames: number of frames of the batch.
        counts: int64 [B], frames of each clip.
        mels: number of bands.
    """
    if MASK_TIME not in inputs:
        return None
    time, mel = inputs[MASK_TIME], inputs[MASK_MEL]
    at = (torch.arange(frames, device=time.device) + 0.5) / counts[:, None]
    band = (torch.arange(mels, device=time.device)[None] + 0.5) / mels
    return _within(at, time)[:, :, None] | _within(band, mel)[:, None, :]


def _within(places: Tensor, spans: Tensor) -> Tensor:
    """[B, N] and [B, n, 2] to bool [B, N]: which places lie in any of the spans."""
    places = places[:, None]
    return ((places >= spans[:, :, :1]) & (places < spans[:, :, 1:])).any(1)


def refuse_masks(inputs: Inputs, name: str) -> None:
    """Refuse the masks of `SpecAugment` where there is no spectrogram to put them on.

    Raises:
        ValueError: the inputs hold masks.
    """
    if MASK_TIME in inputs:
        raise ValueError(
            f"spec-augment masks a spectrogram, and {name} has none; use audio-augment or audio-spectrogram"
        )
