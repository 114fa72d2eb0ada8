"""Random readings of audio: of the waveform, and masks on the spectrogram (SpecAugment).

In a recipe::

    views: {audio: [{type: audio-augment, crop_seconds: 2, speed: [0.9, 1.1], masks: {time_masks: 2}}]}
    views: {audio: [{type: spec-augment, time_masks: 2, mel_masks: 2}]}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.modalities.audio._base import resample
from mmrep.modalities.audio._mel import MASK_MEL, MASK_TIME
from mmrep.modalities.audio.decode import Waveform
from mmrep.tokens import Inputs
from mmrep.views.view import Params, View, uniform

Share = Annotated[float, Field(ge=0, le=1)]
Role = Literal["global", "local", "context", "target", "corrupt"]
_SPEED_STEPS = 100  # per unit of speed, so that there are few resampling filters
# Streams of random numbers; noise takes one for each channel, from its own upwards.
_SAMPLE, _BATCH, _MASKS, _ECHO, _NOISE = range(5)


class SpecAugment(View):
    """Masks over times and mel bands of the spectrogram (arXiv:1904.08779, without the warp of time).

    It adds the places of the masks to the inputs; the encoder puts its mean there, having made its spectrogram. For
    encoders that see a spectrogram; others refuse it.
    """

    @config
    class Config:
        """time_masks, mel_masks: how many masks along each axis; 0 = none.

        time: greatest width of a time mask, in seconds. time_share: its greatest share of the clip. mel: greatest width
        of a mel mask, as a share of the bands. Widths are uniform from 0 to the greatest, and so is the place. role:
        what the reading is for.
        """

        time_masks: Annotated[int, Field(ge=0)] = 2
        time: Annotated[float, Field(gt=0)] = 0.4
        time_share: Share = 0.3
        mel_masks: Annotated[int, Field(ge=0)] = 2
        mel: Share = 0.25
        role: Role = "global"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config: SpecAugment.Config = config
        self.role = config.role

    def batch(self, inputs: Inputs, seeds: Tensor) -> tuple[Inputs, Params]:
        """Draw the masks; ``inputs["seconds"]`` float [B] is how long each clip is.

        Returns:
            The inputs with ``mask_time`` [B, time_masks, 2] and ``mask_mel`` [B, mel_masks, 2], float32, beginnings and
            ends in 0..1 of the clip's frames and of the bands; and the same two as parameters.
        """
        c, seconds = self.config, inputs["seconds"]
        count = c.time_masks + c.mel_masks
        u = uniform(seeds.to(seconds.device), 2 * count, _MASKS).unflatten(1, (count, 2))
        greatest = (c.time / seconds).clamp_max(c.time_share)
        masks = {
            MASK_TIME: _spans(u[:, : c.time_masks], greatest[:, None]),
            MASK_MEL: _spans(u[:, c.time_masks :], torch.full_like(greatest, c.mel)[:, None]),
        }
        return {**inputs, **masks}, masks


class AudioAugment(View):
    """Random speed, crop, reverberation, gain, polarity, shift and noise of a waveform.

    Speed, crop and reverberation act on one clip in the loader, before the encoder cuts it to ``max_seconds`` and
    levels it; gain, polarity, shift and noise act afterwards, on the batch and its device. Every number is drawn from
    the sample's seed alone, so a clip is changed in the same way alone or in any batch.
    """

    @config
    class Config:
        """Ranges; with every range at its neutral value the view changes nothing.

        crop_seconds: a random part of this length of longer clips, None = all. speed: factor, lowest and highest, in
        steps of 0.01; pitch changes with it. reverb: probability of adding a synthetic echo, noise that decays
        exponentially. reverb_seconds: time in which it falls by 60 dB, lowest and highest. gain: in dB, lowest and
        highest. polarity: probability of turning the sign. shift: up to this share of the clip either way; what leaves
        at one end comes in at the other. noise: probability of adding white noise. snr: signal to noise ratio in dB,
        lowest and highest. level: where gain, polarity, shift and noise act: on the "device", whose parameters are
        returned, or on the "sample" in the loader, for encoders whose inputs are no waveforms. masks: fields of a
        `SpecAugment` that follows, None = none. role: what the reading is for.
        """

        crop_seconds: Annotated[float, Field(gt=0)] | None = None
        speed: tuple[Annotated[float, Field(ge=0.25)], Annotated[float, Field(le=4)]] = (0.9, 1.1)
        reverb: Share = 0.0
        reverb_seconds: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0, le=10)]] = (0.1, 0.6)
        gain: tuple[float, float] = (-6.0, 6.0)
        polarity: Share = 0.5
        shift: Share = 0.0
        noise: Share = 0.5
        snr: tuple[float, float] = (15.0, 40.0)
        level: Literal["device", "sample"] = "device"
        masks: SpecAugment.Config | None = None
        role: Role = "global"

        def __post_init__(self) -> None:
            for name in ("speed", "reverb_seconds", "gain", "snr"):
                low, high = getattr(self, name)
                if low > high:
                    raise ValueError(f"{name}: the lowest, {low}, is above the highest, {high}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config: AudioAugment.Config = config
        self.role = config.role
        self.masks = None if config.masks is None else SpecAugment(config.masks)

    def sample(self, decoded: Waveform, seed: int) -> Waveform:
        """Speed, crop and reverberation of one clip, float32 [C, T]; all the rest too if ``level`` is "sample"."""
        c, (values, rate) = self.config, decoded
        seeds = torch.tensor([seed])
        u = uniform(seeds, 5, _SAMPLE)[0].tolist()
        factor = round(_between(c.speed, u[0]) * _SPEED_STEPS)
        values = resample(values, factor, _SPEED_STEPS)
        if c.crop_seconds is not None:
            wanted = max(1, round(c.crop_seconds * rate))
            start = int(u[1] * (max(values.shape[1] - wanted, 0) + 1))
            values = values[:, start : start + wanted]
        if u[2] < c.reverb:
            values = reverberate(values, _between(c.reverb_seconds, u[3]), rate, seeds)
        if c.level == "sample":
            lengths = torch.tensor([values.shape[1]])
            values = self._change(values[None], lengths, seeds)[0][0]
        return Waveform(values, rate)

    def batch(self, inputs: Inputs, seeds: Tensor) -> tuple[Inputs, Params]:
        """Change ``wave`` float32 [B, C, T], of ``lengths`` [B].

        Returns:
            The inputs, and ``gain`` [B], in dB; ``polarity`` bool [B], True where the sign is turned; ``shift`` int64
            [B], in samples, to later; ``snr`` [B], in dB, infinite without noise (not if ``level`` is "sample"); and
            those of `SpecAugment.batch`, if ``masks`` are asked for.

        Raises:
            ValueError: the encoder's inputs are no waveforms.
        """
        params: Params = {}
        if self.config.level == "device":
            if "wave" not in inputs:
                raise ValueError(
                    "audio-augment needs waveforms on the device, and this encoder's inputs are "
                    f"{', '.join(inputs)}: set level: sample"
                )
            wave = inputs["wave"]
            changed, params = self._change(wave, inputs["lengths"], seeds.to(wave.device))
            inputs = {**inputs, "wave": changed}
        if self.masks is not None:
            inputs, masks = self.masks.batch(inputs, seeds)
            params = {**params, **masks}
        return inputs, params

    def _change(self, wave: Tensor, lengths: Tensor, seeds: Tensor) -> tuple[Tensor, Params]:
        c = self.config
        u = uniform(seeds, 6, _BATCH)
        gain, polarity = _between(c.gain, u[:, 0]), u[:, 1] < c.polarity
        shift = ((2 * u[:, 2] - 1) * c.shift * lengths).round().long()
        snr = torch.where(u[:, 3] < c.noise, _between(c.snr, u[:, 4]), torch.inf)
        if c.shift:
            wave = _rolled(wave, lengths, shift)
        factor = torch.where(polarity, -1.0, 1.0) * 10 ** (gain / 20)
        wave = wave * factor[:, None, None]
        if c.noise and len(wave):
            wave = _noisy(wave, lengths, snr, seeds)
        return wave, {"gain": gain, "polarity": polarity, "shift": shift, "snr": snr}


def reverberate(values: Tensor, seconds: float, rate: int, seeds: Tensor) -> Tensor:
    """Add to float [C, T] an echo: white noise that falls by 60 dB in ``seconds``, as strong as the direct sound."""
    from torchaudio.functional import fftconvolve

    n = max(2, round(seconds * rate))
    echo = (2 * uniform(seeds, n, _ECHO) - 1) * 10 ** (-3 * torch.arange(n) / n)
    echo[:, 0] = 0
    response = echo / echo.norm()
    response[:, 0] = 1
    return fftconvolve(values, response.expand(len(values), -1))[:, : values.shape[1]] / 2**0.5


def _rolled(wave: Tensor, lengths: Tensor, shift: Tensor) -> Tensor:
    """Each clip [C, T] turned round by ``shift`` samples within its own length; padding stays."""
    t = torch.arange(wave.shape[2], device=wave.device)[None]
    n = lengths[:, None]
    source = torch.where(t < n, (t - shift[:, None]) % n, t)
    return wave.gather(2, source[:, None].expand_as(wave))


def _noisy(wave: Tensor, lengths: Tensor, snr: Tensor, seeds: Tensor) -> Tensor:
    """Add white noise at ``snr`` dB to each channel of [B, C, T], up to each clip's length."""
    from torchaudio.functional import add_noise

    C, T = wave.shape[1:]
    noise = torch.stack([2 * uniform(seeds, T, _NOISE + c) - 1 for c in range(C)], dim=1)
    inside = torch.arange(T, device=wave.device) < lengths[:, None, None]
    mixed = add_noise(wave, noise, snr[:, None].expand(-1, C), lengths[:, None].expand(-1, C))
    return torch.where(inside, mixed, wave)


def _spans(u: Tensor, greatest: Tensor) -> Tensor:
    """Two numbers a span, float [B, n, 2] in 0..1, to beginnings and ends [B, n, 2]."""
    width = u[..., 0] * greatest
    start = u[..., 1] * (1 - width)
    return torch.stack([start, start + width], dim=-1)


def _between(bounds: tuple[float, float], u: Any) -> Any:
    return bounds[0] + (bounds[1] - bounds[0]) * u
