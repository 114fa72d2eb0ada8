"""AST, Whisper's encoder and CLAP: networks of transformers that read a spectrogram of fixed length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmrep.modalities.audio._hf_wave import additive
from mmrep.modalities.audio._mel import masked_frames, refuse_masks
from mmrep.tokens import Encoding, Grid, Inputs, Tokens


class MelTrunk(nn.Module):
    """What the three share: ``features`` makes one clip's spectrogram in the loader, with transformers' own extractor.

    The clip is followed by padding up to the model's window, which the network reads as it reads the clip. Tokens of
    padding are marked as not valid, so that pools leave them out, unless ``count_padding``.
    """

    supports = frozenset({"tokens", "drop_tokens", "layers"})
    shortest = 1
    waves = False

    def __init__(self, model: Any, config: Any, extractor: Any, count_padding: bool) -> None:
        super().__init__()
        self.model, self.config, self.extractor, self.count_padding = model, config, extractor, count_padding
        self.rate = extractor.sampling_rate
        self.pooled_width: int | None = None

    def features(self, wave: np.ndarray) -> Inputs:
        """One clip, float32 [T], to ``features`` and the number of ``frames`` that are not padding."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of the transformer."""
        return list(self.model.layers) if self.supports >= {"layers"} else []

    def length(self, item: Inputs) -> int:
        """Every clip costs the same."""
        return 1

    def _extracted(self, wave: np.ndarray) -> Any:
        return self.extractor(wave, sampling_rate=self.rate, return_tensors="pt")

    def _run(self, kept: Tokens, layers: Sequence[int], dropped: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The transformer's layers; every token attends to all, padding too, unless some were dropped."""
        mask = None
        values, valid = kept.values, kept.grid.valid
        if dropped and not bool(valid.all()):
            mask = additive(valid | ~valid.any(1, keepdim=True), values.dtype)
        asked: dict[int, Tensor] = {}
        for number, layer in enumerate(self.model.layers, start=1):
            values = layer(values, attention_mask=mask)
            if number in layers:
                asked[number] = values
        return values, tuple(asked[number] for number in layers)


class ASTTrunk(MelTrunk):
    """The Audio Spectrogram Transformer (arXiv:2104.01778).

    Two special tokens, then the patches band by band; the grid's shape is (bands, times), and so are its coordinates:
    mel band and seconds. ``pooled`` is the mean of the two special tokens.
    """

    def __init__(self, model: Any, config: Any, extractor: Any, count_padding: bool) -> None:
        super().__init__(model, config, extractor, count_padding)
        self.width = self.pooled_width = config.hidden_size
        self.depth = config.num_hidden_layers
        self.shortest = 400  # Kaldi's frames of 25 ms at 16 kHz, without padding
        self.max_seconds = extractor.max_length * 0.010 + 0.015
        if extractor.max_length != config.max_length or extractor.num_mel_bins != config.num_mel_bins:
            raise ValueError(
                f"the extractor makes {extractor.max_length} frames of {extractor.num_mel_bins} bands, and the model "
                f"reads {config.max_length} of {config.num_mel_bins}"
            )

    def features(self, wave: np.ndarray) -> Inputs:
        """``features`` float32 [frames of the window, mels] and ``frames`` int64 []."""
        count = min(1 + (len(wave) - self._samples(0.025)) // self._samples(0.010), self.extractor.max_length)
        return {"features": self._extracted(wave)["input_values"][0], "frames": torch.tensor(count)}

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``features`` [B, frames, mels] to tokens, with positions."""
        features = inputs["features"]
        masked = masked_frames(inputs, features.shape[1], inputs["frames"], features.shape[2])
        if masked is not None:
            features = features.masked_fill(masked, 0.0)  # the mean, after the extractor's normalisation
        projection = self.model.embeddings.patch_embeddings.projection
        values = self.model.embeddings(features.to(projection.weight.dtype))
        return Tokens(values, self._grid(inputs["frames"]))

    def encode(self, tokens: Tokens, keep: Tensor | None, layers: Sequence[int]) -> Encoding:
        """The layers over the kept tokens, then the final norm."""
        kept = tokens.keep(keep)
        values, asked = self._run(kept, layers, keep is not None)
        values = self.model.layernorm(values)
        return Encoding(Tokens(values, kept.grid), (values[:, 0] + values[:, 1]) / 2, asked)

    def _samples(self, seconds: float) -> int:
        return int(seconds * self.rate)

    def _grid(self, frames: Tensor) -> Grid:
        c, device = self.config, frames.device
        bands, times = self.model.embeddings.get_shape(c)
        first = torch.arange(times, device=device) * c.time_stride
        valid = (first < frames[:, None]) | self.count_padding
        band = torch.arange(bands, device=device) * c.frequency_stride + (c.patch_size - 1) / 2
        second = (first + (c.patch_size - 1) / 2) * 0.010 + 0.0125
        coords = torch.stack(torch.meshgrid(band, second, indexing="ij"), -1).reshape(-1, 2)
        coords = torch.cat([coords.new_zeros(2, 2), coords])
        special = torch.arange(len(coords), device=device) < 2
        B = len(frames)
        return Grid(
            coords.expand(B, -1, -1), torch.cat([valid.new_ones(B, 2), valid.repeat(1, bands)], dim=1),
            special.expand(B, -1), (bands, times) if bool(valid.all()) else None,
        )  # fmt: skip


class WhisperTrunk(MelTrunk):
    """The encoder of Whisper (arXiv:2212.04356). Coordinates are seconds; a window is 30 s in all its checkpoints."""

    def __init__(self, model: Any, config: Any, extractor: Any, count_padding: bool) -> None:
        super().__init__(model, config, extractor, count_padding)
        self.width, self.depth = config.d_model, config.encoder_layers
        self.max_seconds = float(extractor.n_samples / self.rate)

    def features(self, wave: np.ndarray) -> Inputs:
        """``features`` float32 [mels, frames of the window] and ``frames`` int64 []."""
        count = min(-(-len(wave) // self.extractor.hop_length), self.extractor.nb_max_frames)
        return {"features": self._extracted(wave)["input_features"][0], "frames": torch.tensor(count)}

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``features`` [B, mels, frames] to tokens [B, frames / 2, D], with positions."""
        features, model = inputs["features"], self.model
        masked = masked_frames(inputs, features.shape[2], inputs["frames"], features.shape[1])
        if masked is not None:
            features = features.masked_fill(masked.mT, 0.0)
        values = nn.functional.gelu(model.conv1(features.to(model.conv1.weight.dtype)))
        values = nn.functional.gelu(model.conv2(values)).mT
        B, N, _ = values.shape
        at = torch.arange(N, device=values.device)
        values = values + model.embed_positions(at)
        values = nn.functional.dropout(values, p=model.dropout, training=self.training)
        valid = (at < ((inputs["frames"] - 1) // 2 + 1)[:, None]) | self.count_padding
        coords = (at * 2 * self.extractor.hop_length / self.rate)[:, None].expand(B, -1, -1)
        return Tokens(values, Grid(coords, valid, torch.zeros_like(valid), (N,) if bool(valid.all()) else None))

    def encode(self, tokens: Tokens, keep: Tensor | None, layers: Sequence[int]) -> Encoding:
        """The layers over the kept tokens, then the final norm."""
        kept = tokens.keep(keep)
        values, asked = self._run(kept, layers, keep is not None)
        return Encoding(Tokens(self.model.layer_norm(values), kept.grid), layers=asked)


class CLAPTrunk(MelTrunk):
    """The audio part of CLAP (arXiv:2211.06687): a Swin transformer whose stages merge tokens, so none can be dropped.

    A short clip is repeated to fill the window of 10 s, so every token is valid; the grid's shape and coordinates are
    (band, time), in cells. ``pooled`` is the mean token, through the projection into CLAP's joint space if asked for.

    Two things of transformers' extractor are random, and are not here. Of a long clip "rand_trunc" models read the
    beginning (a view may choose another part), and "fusion" models the middle of each third beside the whole. And the
    extractor marks one short clip of every batch as long; here a clip is long if it is longer than the window.
    """

    supports = frozenset({"tokens"})
    depth = 0

    def __init__(self, model: Any, config: Any, extractor: Any, count_padding: bool) -> None:
        super().__init__(model, config, extractor, count_padding)
        self.width = int(config.patch_embeds_hidden_size * 2 ** (len(config.depths) - 1))
        self.pooled_width = self.width if model.audio_projection is None else config.projection_dim
        self.fusion = bool(config.enable_fusion)
        if self.fusion != (extractor.truncation == "fusion"):
            raise ValueError(
                f"the model has enable_fusion={self.fusion} and the extractor truncation={extractor.truncation!r}: "
                "they do not belong together"
            )
        self.max_seconds = None if self.fusion else float(extractor.nb_max_samples / self.rate)

    def features(self, wave: np.ndarray) -> Inputs:
        """``features`` float32 [1 or 4, frames, mels] and ``longer`` bool [1]."""
        longest = self.extractor.nb_max_samples
        frames = longest // self.extractor.hop_length + 1
        if self.fusion and 1 + len(wave) // self.extractor.hop_length > frames:
            return {"features": self._fused(wave, frames), "longer": torch.tensor([True])}
        # Not the extractor's own call, which draws a random number to mark a short clip as long.
        mel, _ = self.extractor._get_input_mel(
            wave.astype(np.float64), longest, self.extractor.truncation, self.extractor.padding
        )
        return {"features": torch.from_numpy(mel).float(), "longer": torch.tensor([False])}

    def _fused(self, wave: np.ndarray, frames: int) -> Tensor:
        """A long clip: its spectrogram shrunk to the window, and the middle of each third of where a window fits."""
        mel = self.extractor._np_extract_fbank_features(wave.astype(np.float64), self.extractor.mel_filters)
        mel = torch.from_numpy(mel).float()
        thirds = np.array_split(np.arange(len(mel) - frames + 1), 3)
        starts = [int(third[len(third) // 2]) if len(third) else 0 for third in thirds]
        shrunk = nn.functional.interpolate(
            mel[None, None], (frames, mel.shape[1]), mode="bilinear", align_corners=False
        )[0, 0]
        return torch.stack([shrunk, *(mel[start : start + frames] for start in starts)])

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``features`` [B, 1 or 4, frames, mels] to the tokens of the last stage: here the whole network runs."""
        refuse_masks(inputs, "CLAP, which repeats short clips,")
        network = self.model.audio_model.audio_encoder
        features = inputs["features"].to(network.batch_norm.weight.dtype)
        maps = network(features, is_longer=inputs["longer"], return_dict=True).last_hidden_state
        grid = Grid.regular(len(maps), tuple(maps.shape[2:]), device=maps.device)
        values = maps.flatten(2).mT
        if self.fusion and self.training and not bool(inputs["longer"].any()):
            # Without a long clip, what fuses has no part in the result; processes that share gradients wait for it.
            patches = network.patch_embed
            idle = (*patches.fusion_model.parameters(), *patches.mel_conv2d.parameters())
            values = values + 0 * torch.stack([parameter.sum() for parameter in idle]).sum()
        return Tokens(values, grid)

    def encode(self, tokens: Tokens, keep: Tensor | None, layers: Sequence[int]) -> Encoding:
        """The pooled vector."""
        pooled = tokens.values.mean(1)
        projection = self.model.audio_projection
        return Encoding(tokens, pooled if projection is None else projection(pooled))
