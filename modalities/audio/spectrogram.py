"""A patch transformer over log-mel spectrograms, as AST (arXiv:2104.01778) and AudioMAE (arXiv:2207.06405), for clips
of any length and with the whole token contract.

In a recipe::

    encoder: {type: audio-spectrogram, mels: 64, patch: [8, 16], width: 192, depth: 6, heads: 3, standardize: band}
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.modalities.audio._base import AudioEncoder
from mmrep.modalities.audio._mel import LogMel, Mel, masked_frames
from mmrep.modalities.audio._positions import sincos
from mmrep.modalities.audio._statistics import learn, read_statistics, write_statistics
from mmrep.tokens import Content, Grid, Inputs, Tokens
from mmrep.transformer_encoder import TransformerEncoder

Side = Annotated[int, Field(ge=1)]


class AudioSpectrogram(TransformerEncoder, AudioEncoder):
    """Patches of the log-mel spectrogram to tokens; only the tokens that are kept are computed.

    Tokens are the class token (if any), then the patches by time and, within one time, from low to high bands.
    Coordinates are the centre of a patch: (seconds, mel band). A clip of L samples has 1 + L // hop frames; what its
    last patch has beyond them is filled with the mean. Positions are added to patches before any is dropped.
    """

    @config
    class Config(Mel):
        """Fields of an ``audio-spectrogram``, beside those of its spectrogram and preprocessing.

        patch: frames and mel bands of a patch; the second must divide ``mels``. standardize: where the mean and
        standard deviation come from that log-mel values are standardised by: "given" are ``mean`` and ``std``;
        "global" (one pair) and "band" (one pair a band) are learned from the training samples when a recipe runs.
        width: D. depth: number of blocks. heads: attention heads; must divide ``width``. mlp_ratio: hidden width of the
        MLPs over ``width``. class_token: put a class token in front. frequency: positions along the mel axis are fixed
        sines and cosines (``width`` must then be a multiple of 4), or a learned table; along time they are always
        sines and cosines, so that clips may have any length. dropout, drop_path: probabilities; drop_path rises
        linearly with depth. layer_scale: initial value, or None for none.
        """

        patch: tuple[Side, Side] = (8, 16)
        standardize: Literal["given", "global", "band"] = "given"
        mean: float = -4.0
        std: Annotated[float, Field(gt=0)] = 4.0
        width: Annotated[int, Field(ge=2)] = 192
        depth: Annotated[int, Field(ge=1)] = 6
        heads: Annotated[int, Field(ge=1)] = 3
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
        class_token: bool = True
        frequency: Literal["sincos", "learned"] = "sincos"
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
        layer_scale: Annotated[float, Field(gt=0)] | None = None

        def __post_init__(self) -> None:
            Mel.__post_init__(self)
            if self.mels % self.patch[1]:
                raise ValueError(f"patch={self.patch} of {self.patch[1]} bands does not divide mels={self.mels}")
            if self.width % self.heads:
                raise ValueError(f"heads={self.heads} does not divide width={self.width}")
            parts = 4 if self.frequency == "sincos" else 2
            if self.width % parts:
                raise ValueError(
                    f"frequency={self.frequency!r} needs a width that is a multiple of {parts}, got {self.width}"
                )

    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, preprocess=config)
        self.width, self.depth = config.width, config.depth
        self.patch, self.bands = config.patch, config.mels // config.patch[1]
        self.mel = LogMel(config)
        mean, std = read_statistics(config, files)
        # Not in the state: they belong to config and files.
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.patches = nn.Conv2d(self.channels, config.width, config.patch, stride=config.patch)
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
        self.frequency = None
        if config.frequency == "learned":
            self.frequency = nn.Parameter(0.02 * torch.randn(self.bands, config.width))
        self.special = nn.Parameter(0.02 * torch.randn(1, 1, config.width)) if config.class_token else None

    @classmethod
    def fit(cls, config: Any, samples: Iterable[Any], folder: Path) -> None:
        """Learn mean and standard deviation of the log-mel values of the training samples, into ``folder``.

        Raises:
            ValueError: no sample can be read.
        """
        if config.standardize != "given":
            learn(config, AudioEncoder(config, preprocess=config), samples, folder)

    def spectrogram(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Standardised log-mel frames float32 [B, C, F, mels], zero in padding and masks; and counts int64 [B]."""
        counts = self.mel.frames(inputs["lengths"])
        mel = (self.mel(inputs["wave"]) - self.mean.float()) / self.std.float()
        F = mel.shape[2]
        hidden = (torch.arange(F, device=mel.device) >= counts[:, None])[:, :, None]
        masked = masked_frames(inputs, F, counts, self.config.mels)
        if masked is not None:
            hidden = hidden | masked
        return mel.masked_fill(hidden[:, None], 0.0), counts

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``{"wave": [B, C, T], "lengths": [B]}`` to tokens [B, special + time * bands, D].

        ``mask_time`` and ``mask_mel``, which `SpecAugment` adds, blot out parts of the spectrogram.
        """
        mel, counts = self.spectrogram(inputs)
        long = self.patch[0]
        mel = nn.functional.pad(mel, (0, 0, 0, -mel.shape[2] % long))
        values = self.patches(mel.to(self.patches.weight.dtype))
        B, _, T, M = values.shape
        values = values.permute(0, 2, 3, 1).reshape(B, T * M, self.width)
        places = self._positions(T).to(values.dtype).expand(B, -1, -1)
        values = values + places
        valid = torch.arange(T, device=values.device) * long < counts[:, None]
        grid = self._grid(valid.repeat_interleave(M, dim=1), T)
        return Tokens(self._behind_special(values), grid, self._behind_special(places))

    def content(self, inputs: Inputs) -> Content:
        """See `Encoder.content`: the standardised log-mel values of each patch, [B, N, C * frames * bands of a patch].

        A value of a patch is observed where its frame is one of the clip's; one that a view blotted out is zero.
        """
        mel, counts = self.spectrogram(inputs)
        mel = nn.functional.pad(mel, (0, 0, 0, -mel.shape[2] % self.patch[0]))
        real = torch.arange(mel.shape[2], device=mel.device) < counts[:, None]
        observed = real[:, None, :, None].expand_as(mel)
        return Content(self._behind_special(self._cut(mel), 0.0), self._behind_special(self._cut(observed), False))

    def _cut(self, mel: Tensor) -> Tensor:
        """[B, C, F, mels] to patches [B, times * bands, C * frames * bands of a patch], in the order of the tokens."""
        long, high = self.patch
        cut = mel.unfold(2, long, long).unfold(3, high, high)
        return cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def _behind_special(self, values: Tensor, fill: float | None = None) -> Tensor:
        """Values of patches [B, N, K] behind the class token, or behind ``fill`` in its place."""
        if self.special is None:
            return values
        if fill is not None:
            return nn.functional.pad(values, (0, 0, 1, 0), value=fill)
        return torch.cat([self.special.to(values.dtype).expand(values.shape[0], -1, -1), values], dim=1)

    def length(self, item: Inputs) -> int:
        """The number of patches."""
        frames = 1 + item["wave"].shape[1] // self.mel.hop
        return -(-frames // self.patch[0]) * self.bands

    def save_files(self, folder: Path) -> None:
        """Write the learned statistics, if there are any."""
        if self.config.standardize != "given":
            write_statistics(self.mean, self.std, folder)

    def no_weight_decay(self) -> set[str]:
        """The learned positions and the class token."""
        return {name for name in ("frequency", "special") if getattr(self, name) is not None}

    def _positions(self, times: int) -> Tensor:
        """[times * bands, D]."""
        device, D = self.patches.weight.device, self.width
        at, band = torch.arange(times, device=device), torch.arange(self.bands, device=device)
        if self.frequency is not None:
            return (sincos(at, D)[:, None] + self.frequency).reshape(-1, D)
        parts = [sincos(at, D // 2)[:, None].expand(-1, self.bands, -1), sincos(band, D // 2).expand(times, -1, -1)]
        return torch.cat(parts, dim=2).reshape(-1, D)

    def _grid(self, valid: Tensor, times: int) -> Grid:
        B, device = valid.shape[0], valid.device
        hop, (long, high) = self.mel.hop / self.config.sampling_rate, self.patch
        seconds = (torch.arange(times, device=device) * long + (long - 1) / 2) * hop
        bands = torch.arange(self.bands, device=device) * high + (high - 1) / 2
        coords = torch.stack(torch.meshgrid(seconds, bands, indexing="ij"), -1).reshape(-1, 2)
        count = 0 if self.special is None else 1
        coords = torch.cat([coords.new_zeros(count, 2), coords])
        special = torch.arange(len(coords), device=device) < count
        return Grid(
            coords=coords.expand(B, -1, -1),
            valid=torch.cat([valid.new_ones(B, count), valid], dim=1),
            special=special.expand(B, -1),
            shape=(times, self.bands) if bool(valid.all()) else None,
        )
