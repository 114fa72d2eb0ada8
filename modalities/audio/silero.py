"""Silero VAD: in which stretches of a clip somebody speaks (github.com/snakers4/silero-vad, MIT).

In a recipe::

    encoder: {type: silero, checkpoint: "package:silero_vad/data/silero_vad_16k.safetensors"}  # pip install silero-vad
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import config
from mmrep.modalities.audio._base import Preprocess
from mmrep.modalities.audio._checkpoint import Checkpointed
from mmrep.modalities.audio._mel import refuse_masks
from mmrep.modalities.audio.decode import MAX_DURATION
from mmrep.modalities.audio.lstm import LSTMLayer
from mmrep.tokens import Encoding, Grid, Inputs, Tokens

CHUNK, CONTEXT = 512, 64
"""Samples of a chunk, and how many of those before it are read again."""
_FOURIER, _HOP = 256, 128


class Silero(Checkpointed):
    """Chunks of 32 ms to tokens: magnitudes of a Fourier transform, four convolutions, and an LSTM over the chunks.

    Tokens are the LSTM's states, which have seen all of the clip up to their chunk and begin with zero. ``pooled`` is
    their mean, each weighed by the probability that it is speech. That probability, float [B, N], is in
    ``extra["speech"]``: what the package's network gives, chunk by chunk. The last chunk is filled with zeros, and
    coordinates are the middle of a chunk, in seconds. It reads mono at 16 kHz; the package's network for 8 kHz is
    another. The Fourier transform is computed, not learned: the file's filters are that, to rounding.

    Version 6.2.3 of the package has two sets of weights of this one network: those of its TorchScript and ONNX models,
    and others in ``silero_vad_16k.safetensors``, the file that is read here. Probabilities of single chunks differ.
    """

    @config
    class Config:
        """Fields of a ``silero``; the defaults are the package's network.

        width: D, even; of the first and last convolution and the LSTM. checkpoint: a file of weights to begin with, in
        safetensors or torch's format (of which tensors alone are read), or ``package:name/file`` inside an installed
        Python package. max_seconds: longer clips keep their first part; None keeps all. normalize: level of the clip,
        as in our own encoders. max_duration: longer audio is refused unread, in seconds.
        """

        width: Annotated[int, Field(ge=2, multiple_of=2)] = 128
        checkpoint: str | None = None
        max_seconds: Annotated[float, Field(gt=0)] | None = 10.0
        normalize: Literal["none", "peak", "rms"] = "none"
        max_duration: Annotated[float, Field(gt=0)] = MAX_DURATION

    def __init__(self, config: Config, files: Path | None = None) -> None:
        preprocess = Preprocess(
            max_seconds=config.max_seconds, normalize=config.normalize, max_duration=config.max_duration
        )
        super().__init__(config, files, preprocess=preprocess)
        self.width = D = config.width
        self.register_buffer("fourier", _fourier(), persistent=False)
        self.fourier: Tensor
        self.convolutions = nn.ModuleList([
            nn.Conv1d(_FOURIER // 2 + 1, D, 3, padding=1),
            nn.Conv1d(D, D // 2, 3, stride=2, padding=1),
            nn.Conv1d(D // 2, D // 2, 3, stride=2, padding=1),
            nn.Conv1d(D // 2, D, 3, padding=1),
        ])  # fmt: skip
        self.recurrent = LSTMLayer(D, D)
        self.speech = nn.Conv1d(D, 1, 1)
        self.begin(files)

    def own_name(self, key: str) -> str | None:
        """See `Checkpointed.own_name`."""
        part, _, name = key.partition(".")
        if part == "stft_conv":
            return None
        if part == "lstm_cell":
            return f"recurrent.lstm.{name}_l0"
        if part == "final_conv":
            return f"speech.{name}"
        number = part.removeprefix("conv")
        return f"convolutions.{int(number) - 1}.{name}" if number.isdecimal() else key

    def chunks(self, lengths: Tensor) -> Tensor:
        """How many chunks clips of ``lengths`` samples have: int64 [B]."""
        return (lengths + CHUNK - 1) // CHUNK

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``{"wave": [B, 1, T], "lengths": [B]}`` to what is heard in each chunk [B, N, D]."""
        refuse_masks(inputs, "silero")
        wave, counts = inputs["wave"][:, 0], self.chunks(inputs["lengths"])
        wave = F.pad(wave, (CONTEXT, -wave.shape[1] % CHUNK)).unfold(1, CHUNK + CONTEXT, CHUNK)
        at = torch.arange(wave.shape[1], device=wave.device)
        valid = at < counts[:, None]
        with torch.autocast(wave.device.type, enabled=False):
            rows = wave[valid].float()
            rows = torch.cat([rows, rows[:, -1 - CONTEXT : -1].flip(1)], dim=1)  # reflected, as F.pad cannot no rows
            parts = F.conv1d(rows[:, None], self.fourier.float(), stride=_HOP)
            heard = parts.unflatten(1, (2, -1)).square().sum(1).sqrt()  # [R, frequencies, 4]
        heard = heard.to(self.speech.weight.dtype)
        for convolution in self.convolutions:
            heard = F.relu(convolution(heard))
        values = heard.new_zeros(*valid.shape, self.width)
        values[valid] = heard[:, :, 0]
        grid = Grid(
            coords=((at + 0.5) * CHUNK / self.preprocess.sampling_rate)[:, None].expand(len(values), -1, -1),
            valid=valid,
            special=torch.zeros_like(valid),
            shape=(len(at),) if bool(valid.all()) else None,
        )
        return Tokens(values, grid)

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Chunks to an encoding: states [B, N, D], ``pooled`` [B, D] and ``extra["speech"]`` [B, N], 0 to 1."""
        self.check_request(keep, layers)
        states = self.recurrent(tokens.values)
        speech = self.speech(F.relu(states).mT)[:, 0].sigmoid()
        weights = (speech * tokens.grid.valid)[:, :, None]
        pooled = (weights * states).sum(1) / weights.sum(1).clamp_min(1e-6)
        return Encoding(Tokens(states, tokens.grid), pooled, extra={"speech": speech})

    def length(self, item: Inputs) -> int:
        """The number of chunks."""
        return int(self.chunks(torch.tensor(item["wave"].shape[1])))


def _fourier() -> Tensor:
    """Real and imaginary parts of 129 frequencies under a Hann window, as filters: float32 [258, 1, 256]."""
    angle = 2 * math.pi / _FOURIER * torch.outer(torch.arange(_FOURIER // 2 + 1), torch.arange(_FOURIER)).double()
    parts = torch.cat([angle.cos(), -angle.sin()]) * torch.hann_window(_FOURIER, dtype=torch.float64)
    return parts.float()[:, None]
