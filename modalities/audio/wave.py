"""A transformer over a convolved waveform, as wav2vec 2.0 (arXiv:2006.11477), with the whole token contract.

In a recipe::

    encoder: {type: audio-wave, conv_width: 128, width: 192, depth: 6, heads: 3, normalize: rms}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.modalities.audio._base import AudioEncoder, Preprocess
from mmrep.modalities.audio._mel import refuse_masks
from mmrep.modalities.audio._positions import sincos
from mmrep.tokens import Content, Grid, Inputs, Tokens
from mmrep.transformer_encoder import TransformerEncoder

Size = Annotated[int, Field(ge=1)]


class AudioWave(TransformerEncoder, AudioEncoder):
    """Strided convolutions make frames of the waveform; each frame is a token.

    It departs from wav2vec 2.0 in two things, so that a clip alone gives what it gives in a batch and a dropped token
    leaves no trace in others: every convolution is followed by a LayerNorm over the channels of each frame (as in its
    larger models; the GroupNorm of its base model sees the padding), and positions are fixed sines and cosines rather
    than a convolution over neighbours. A frame that reaches past the end of its clip does not count, except where a
    clip is shorter than the first. Coordinates are the centre of a frame, in seconds.
    """

    @config
    class Config(Preprocess):
        """Fields of an ``audio-wave``, beside its preprocessing.

        kernels, strides: of the convolutions, in frames of the one before; by default a frame is 25 ms at 16 kHz, and
        one begins every 20 ms. conv_width: their channels. width: D, even. depth: number of blocks. heads: attention
        heads; must divide ``width``. mlp_ratio: hidden width of the MLPs over ``width``. class_token: put a class token
        in front. dropout, drop_path: probabilities; drop_path rises linearly with depth. layer_scale: initial value, or
        None for none.
        """

        kernels: tuple[Size, ...] = (10, 3, 3, 3, 3, 2, 2)
        strides: tuple[Size, ...] = (5, 2, 2, 2, 2, 2, 2)
        conv_width: Size = 128
        width: Annotated[int, Field(ge=2)] = 192
        depth: Size = 6
        heads: Size = 3
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
        class_token: bool = True
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
        layer_scale: Annotated[float, Field(gt=0)] | None = None

        def __post_init__(self) -> None:
            if not self.kernels or len(self.kernels) != len(self.strides):
                raise ValueError(
                    f"{len(self.kernels)} kernels and {len(self.strides)} strides: give one of each a layer"
                )
            if self.width % self.heads:
                raise ValueError(f"heads={self.heads} does not divide width={self.width}")
            if self.width % 2:
                raise ValueError(f"width={self.width} must be even, for the sines and cosines of the positions")

    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, preprocess=config)
        self.width, self.depth = config.width, config.depth
        self.stride, self.field = 1, 1  # of one frame, in samples
        layers: list[nn.Module] = []
        for kernel, stride in zip(config.kernels, config.strides, strict=True):
            layers.append(ConvLayer(config.conv_width if layers else self.channels, config.conv_width, kernel, stride))
            self.field += (kernel - 1) * self.stride
            self.stride *= stride
        self.convolutions = nn.Sequential(*layers)
        self.projection = nn.Linear(config.conv_width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = Transformer(
            config.width,
            config.depth,
            config.heads,
            mlp_ratio=config.mlp_ratio,
            dropout=config.dropout,
            drop_path=config.drop_path,
            layer_scale=config.layer_scale,
        )
        self.norm = nn.LayerNorm(config.width)
        self.special = nn.Parameter(0.02 * torch.randn(1, 1, config.width)) if config.class_token else None

    def frames(self, lengths: Tensor) -> Tensor:
        """How many frames clips of ``lengths`` samples have: int64 [B], at least 1."""
        count = lengths.clamp_min(self.field)
        for kernel, stride in zip(self.config.kernels, self.config.strides, strict=True):
            count = (count - kernel) // stride + 1
        return count

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``{"wave": [B, C, T], "lengths": [B]}`` to tokens [B, special + frames, D]."""
        refuse_masks(inputs, "audio-wave")
        wave = inputs["wave"].to(self.projection.weight.dtype)
        wave = nn.functional.pad(wave, (0, max(0, self.field - wave.shape[2])))
        values = self.projection(self.convolutions(wave).mT)
        B, N, _ = values.shape
        at = torch.arange(N, device=values.device)
        places = sincos(at, self.width).to(values.dtype).expand(B, -1, -1)
        values = self.dropout(values + places)
        valid = at < self.frames(inputs["lengths"])[:, None]
        coords = ((at * self.stride + (self.field - 1) / 2) / self.config.sampling_rate)[:, None]
        special = torch.zeros_like(at, dtype=torch.bool)
        shape = (N,) if bool(valid.all()) else None
        if self.special is not None:
            front = self.special.to(values.dtype).expand(B, -1, -1)
            values, places = (torch.cat([front, t], dim=1) for t in (values, places))
            valid = torch.cat([valid.new_ones(B, 1), valid], dim=1)
            coords, special = (nn.functional.pad(t, (0,) * (2 * t.ndim - 2) + (1, 0)) for t in (coords, special))
            special[0] = True
        return Tokens(values, Grid(coords.expand(B, -1, -1), valid, special.expand(B, -1), shape), places)

    def content(self, inputs: Inputs) -> Content:
        """See `Encoder.content`: the samples that are a frame's alone, [B, N, C * stride].

        Frames overlap; of each it is the ``stride`` samples in its middle, so that one frame's follow another's. A
        sample beyond the end of the clip is not observed.
        """
        wave, lengths = inputs["wave"].to(self.projection.weight.dtype), inputs["lengths"]
        wave = nn.functional.pad(wave, (0, max(0, self.field - wave.shape[2])))
        first = max(0, self.field - self.stride) // 2
        at = torch.arange(wave.shape[2], device=wave.device)
        parts = [wave, (at < lengths[:, None])[:, None].expand_as(wave)]
        N = int(self.frames(lengths.new_tensor([wave.shape[2]])))
        short = max(0, first + N * self.stride - wave.shape[2])
        front = 0 if self.special is None else 1
        values, observed = (
            nn.functional.pad(
                nn.functional.pad(part, (0, short))[:, :, first:].unfold(2, self.stride, self.stride)[:, :, :N]
                .transpose(1, 2).flatten(2),
                (0, 0, front, 0),
            )
            for part in parts
        )  # fmt: skip
        return Content(values, observed)

    def length(self, item: Inputs) -> int:
        """The number of frames."""
        return int(self.frames(torch.tensor(item["wave"].shape[1])))

    def no_weight_decay(self) -> set[str]:
        """The class token."""
        return set() if self.special is None else {"special"}


class ConvLayer(nn.Module):
    """A convolution without padding, a LayerNorm over the channels of each frame, a GELU."""

    def __init__(self, incoming: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(incoming, width, kernel, stride=stride)
        self.norm = nn.LayerNorm(width)

    def forward(self, values: Tensor) -> Tensor:
        """[B, C, T] to [B, width, (T - kernel) // stride + 1]."""
        return nn.functional.gelu(self.norm(self.conv(values).mT).mT)
