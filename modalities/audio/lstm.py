"""Recurrent layers over short windows of a mel spectrogram: the speaker encoder of GE2E (arXiv:1710.10467).

In a recipe::

    encoder: {type: audio-lstm, checkpoint: "package:resemblyzer/pretrained.pt"}  # pip install --no-deps Resemblyzer
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import config
from mmrep.modalities.audio._base import MAX_GAIN
from mmrep.modalities.audio._checkpoint import Checkpointed
from mmrep.modalities.audio._mel import LogMel, Mel, refuse_masks
from mmrep.modalities.audio.decode import Waveform
from mmrep.tokens import Encoding, Grid, Inputs, Tokens
from mmrep.views import View

Size = Annotated[int, Field(ge=1)]


class AudioLSTM(Checkpointed):
    """A clip is cut into overlapping windows, its tokens; each is read by itself, and its last state is what it says.

    A token is that state of the last layer, through a linear map and a ReLU, of length 1 (Wan et al. 2018, section 2;
    the ReLU is Resemblyzer's); ``pooled`` is the mean of a clip's tokens, of length 1 again: the *d-vector* of who
    speaks. Layers are the last states of each. Tokens carry no position, and their coordinate is the middle of a
    window, in seconds.

    With the weights of Resemblyzer (Apache-2.0; trained on LibriSpeech, VoxCeleb 1 and 2) an embedding is that of its
    ``VoiceEncoder.embed_utterance`` with ``rate=1.25``; ``stride: 77`` is its default rate of 1.3. Two things in front
    of that differ from its ``preprocess_wav``: silence is not cut out, for which it asks WebRTC's detector of speech,
    and other rates are resampled by torchaudio. Such a file also holds the scale of its loss, which is not read.
    """

    @config
    class Config(Mel):
        """Fields of an ``audio-lstm``, beside those of its spectrogram, whose Fourier transform is as long as a window.

        The defaults are Resemblyzer's. log: read the logarithm of the power (of at least ``floor``), as the paper has
        it. loudness: a clip with a lower root mean square is raised to this, in dB of full scale, by 60 dB at most;
        None leaves it. frames: length of a window; stride: from one to the next, at most ``frames``. coverage: a last
        window of which the clip fills less is left out, unless it is the only one. hidden: width of the layers. depth:
        how many. width: D, of the tokens. checkpoint: a file of weights to begin with, in safetensors or torch's format
        (of which tensors alone are read), or ``package:name/file`` inside an installed Python package.
        """

        mels: Size = 40
        low: Annotated[float, Field(ge=0)] = 0.0
        mel_scale: Literal["htk", "slaney"] = "slaney"
        mel_norm: Literal["slaney"] | None = "slaney"
        log: bool = False
        loudness: Annotated[float, Field(le=0)] | None = -30.0
        frames: Size = 160
        stride: Size = 80
        coverage: Annotated[float, Field(gt=0, le=1)] = 0.75
        hidden: Size = 256
        depth: Size = 3
        width: Size = 256
        checkpoint: str | None = None

        def __post_init__(self) -> None:
            Mel.__post_init__(self)
            if self.stride > self.frames:
                raise ValueError(f"stride={self.stride} would leave frames unread between windows of {self.frames}")

        @property
        def fft(self) -> int:
            """Length of the Fourier transform."""
            return self.samples(self.window)

    supports = frozenset({"tokens", "layers"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, preprocess=config)
        self.width, self.depth = config.width, config.depth
        self.mel = LogMel(config)
        incoming = self.channels * config.mels
        self.layers = nn.ModuleList(
            LSTMLayer(config.hidden if number else incoming, config.hidden) for number in range(config.depth)
        )
        self.linear = nn.Linear(config.hidden, config.width)
        self.begin(files)

    def own_name(self, key: str) -> str | None:
        """See `Checkpointed.own_name`: ``lstm.weight_ih_l2`` is ``layers.2.lstm.weight_ih_l0``."""
        part, _, name = key.partition(".")
        if part == "lstm":
            kind, _, number = name.rpartition("_l")
            return f"layers.{number}.lstm.{kind}_l0"
        return None if part in ("similarity_weight", "similarity_bias") else key

    def read(self, raw: object, view: View | None = None, seed: int = 0) -> Waveform:
        """See `AudioEncoder.read`; then a quiet clip is raised to ``loudness``."""
        clip = super().read(raw, view, seed)
        if self.config.loudness is None:
            return clip
        target, found = 10 ** (self.config.loudness / 20), float(clip.values.double().square().mean().sqrt())
        gain = min(max(1.0, target / max(found, 1e-30)), MAX_GAIN)
        return Waveform(clip.values * gain, clip.sampling_rate)

    def windows(self, lengths: Tensor) -> Tensor:
        """How many windows clips of ``lengths`` samples have: int64 [B], 1 or more."""
        long, stride, hop = self.config.frames, self.config.stride, self.mel.hop
        count = (self.mel.frames(lengths) - long + stride).clamp_min(0) // stride + 1
        filled = (lengths - (count - 1) * stride * hop) / (long * hop)
        return (count - (filled < self.config.coverage).long()).clamp_min(1)

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``{"wave": [B, C, T], "lengths": [B]}`` to windows of the spectrogram [B, W, frames * C * mels].

        What a window has beyond the end of its clip is silence.
        """
        refuse_masks(inputs, "audio-lstm")
        long, stride, hop = self.config.frames, self.config.stride, self.mel.hop
        wave, counts = inputs["wave"], self.windows(inputs["lengths"])
        W = int(counts.max()) if len(counts) else 1
        wave = F.pad(wave, (0, max(0, ((W - 1) * stride + long) * hop - wave.shape[2])))
        mel = self.mel(wave) if self.config.log else self.mel.power(wave)
        mel = mel.transpose(1, 2).flatten(2).to(self.linear.weight.dtype)  # [B, frames, C * mels]
        values = mel.unfold(1, long, stride)[:, :W].mT.flatten(2)
        at = torch.arange(W, device=values.device)
        valid = at < counts[:, None]
        seconds = (at * stride + (long - 1) / 2) * hop / self.config.sampling_rate
        grid = Grid(
            coords=seconds[:, None].expand(len(values), -1, -1),
            valid=valid,
            special=torch.zeros_like(valid),
            shape=(W,) if bool(valid.all()) else None,
        )
        return Tokens(values, grid)

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Windows to an encoding: tokens [B, W, D] and ``pooled`` [B, D]; layers are [B, W, hidden]."""
        self.check_request(keep, layers)
        valid, asked = tokens.grid.valid, dict[int, Tensor]()
        values = tokens.values[valid].unflatten(1, (self.config.frames, -1))
        for number, layer in enumerate(self.layers, start=1):
            values = layer(values)
            asked[number] = _in_place(values[:, -1], valid)
        found = _in_place(F.normalize(F.relu(self.linear(values[:, -1])), dim=1), valid)
        return Encoding(Tokens(found, tokens.grid), F.normalize(found.sum(1), dim=1), tuple(asked[n] for n in layers))

    def length(self, item: Inputs) -> int:
        """The number of windows."""
        return int(self.windows(torch.tensor(item["wave"].shape[1])))


class LSTMLayer(nn.Module):
    """One recurrent layer, from a state of zero; not in bfloat16 under autocast, which not every processor's can."""

    def __init__(self, incoming: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(incoming, width, batch_first=True)

    def forward(self, values: Tensor) -> Tensor:
        """[B, T, incoming] to the states [B, T, width]."""
        with torch.autocast(values.device.type, enabled=False):
            return self.lstm(values.to(next(self.parameters()).dtype))[0]


def _in_place(rows: Tensor, valid: Tensor) -> Tensor:
    """Rows [R, K] of the R valid places of bool [B, W] to [B, W, K], zeros elsewhere."""
    values = rows.new_zeros(*valid.shape, rows.shape[1])
    values[valid] = rows
    return values
