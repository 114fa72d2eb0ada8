"""The audio part of Perception Encoder's audio and audio-video models (PE-AV), as transformers has it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmrep.modalities.audio._hf_wave import additive
from mmrep.modalities.audio._mel import refuse_masks
from mmrep.tokens import Encoding, Grid, Inputs, Tokens

KINDS = ("pe_audio", "pe_audio_video")


@cache
def _part() -> Any:
    from transformers.models.pe_audio import modeling_pe_audio as library

    class PEAudioPart(library.PeAudioPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.audio_encoder = library.PeAudioEncoder(config.audio_config)
            self.audio_head = library.PeAudioContrastiveHead(
                config.audio_config.hidden_size, config.text_config.hidden_size
            )
            self.post_init()

    return PEAudioPart


def pe_class(config: Any, source: str) -> tuple[Any, Any]:
    """A class that takes the audio part alone out of a whole checkpoint, and its config.

    Raises:
        ValueError: a checkpoint whose space is of single frames.
    """
    if (config.architectures or [""])[0] == "PeAudioFrameLevelModel":
        raise ValueError(
            f"path {source!r} is a PeAudioFrameLevelModel, which compares texts with every frame of a clip: it has no "
            "embedding of a whole clip, so it is no tower. PeAudioModel and PeAudioVideoModel have one"
        )
    return _part(), config.audio_config if config.model_type == "pe_audio_video" else config


class PETrunk(nn.Module):
    """A codec's encoder (DAC), a convolution over its frames, and a transformer.

    The codec is never trained, as in the library. Clips of one length go through it together, so that a clip in a
    padded batch is what the library makes of it alone. Tokens are the class token and then the frames; ``pooled`` is
    the class token's embedding, which the library does not bring to unit length.
    """

    supports = frozenset({"tokens", "layers"})
    shortest = 1
    waves = True

    def __init__(self, model: Any, config: Any, extractor: Any, projection: bool) -> None:
        super().__init__()
        encoder, own = model.audio_encoder, config.audio_config
        self.model, self.config, self.extractor = model, config, extractor
        self.rate, self.hop = extractor.sampling_rate, own.dac_config.hop_length
        if extractor.hop_length % self.hop:
            raise ValueError(
                f"the extractor fills clips up to a multiple of {extractor.hop_length} samples, and a frame of the "
                f"model is {self.hop}: they do not belong together"
            )
        encoder.embedder.dac_encoder.requires_grad_(False)
        encoder.embedder.bottleneck.requires_grad_(False)
        if not projection:
            model.audio_head = None
        self.width, self.depth = own.hidden_size, own.num_hidden_layers
        self.pooled_width = config.text_config.hidden_size if projection else own.hidden_size
        self.max_seconds = own.max_position_embeddings * self.hop / self.rate

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of the transformer."""
        return list(self.model.audio_encoder.layers)

    def prepared(self, wave: Tensor) -> Tensor:
        """Float32 [1, T], the end mirrored to fill the last frame."""
        return torch.from_numpy(np.ascontiguousarray(self.extractor._reflect_pad(wave[0].numpy())))[None]

    def length(self, item: Inputs) -> int:
        """The number of frames."""
        return -(-item["wave"].shape[1] // self.hop)

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``wave`` [B, 1, T] and ``lengths`` [B] to the class token and frames, [B, 1 + N, D]."""
        refuse_masks(inputs, "PE")
        encoder = self.model.audio_encoder
        counts = (inputs["lengths"] // self.hop).clamp_min(1)
        codes = self._codes(inputs["wave"], counts)
        valid = torch.arange(codes.shape[1], device=codes.device) < counts[:, None]
        values, _ = encoder.patch_embedder(
            encoder.embedder.data_proj(codes), padding_mask=None if bool(valid.all()) else valid
        )
        seconds = (torch.arange(codes.shape[1], device=codes.device) + 0.5) * self.hop / self.rate
        coords = torch.cat([seconds.new_zeros(1), seconds])[:, None].expand(len(values), -1, -1)
        special = torch.zeros_like(valid[:, :1])
        return Tokens(values, Grid(
            coords, torch.cat([~special, valid], 1), torch.cat([~special, torch.zeros_like(valid)], 1),
            (codes.shape[1],) if bool(valid.all()) else None,
        ))  # fmt: skip

    def encode(self, tokens: Tokens, keep: Tensor | None, layers: Sequence[int]) -> Encoding:
        """The layers, the last norm and what is behind it."""
        encoder, values, valid = self.model.audio_encoder, tokens.values, tokens.grid.valid
        mask = None if bool(valid.all()) else additive(valid | ~valid.any(1, keepdim=True), values.dtype)
        turns = encoder.rotary_emb(values, torch.arange(values.shape[1], device=values.device)[None])
        asked: dict[int, Tensor] = {}
        for number, layer in enumerate(encoder.layers, start=1):
            values = layer(values, attention_mask=mask, position_embeddings=turns)
            if number in layers:
                asked[number] = values
        values = encoder.output(encoder.norm(values))
        head = self.model.audio_head
        pooled = values[:, 0] if head is None else head(values[:, 0])
        return Encoding(Tokens(values, tokens.grid), pooled, tuple(asked[number] for number in layers))

    @torch.no_grad()
    def _codes(self, wave: Tensor, counts: Tensor) -> Tensor:
        """What the codec gives, [B, N, C], zeros at padding."""
        embedder = self.model.audio_encoder.embedder
        wave = wave.to(embedder.bottleneck.weight.dtype)
        missing = int(counts.max()) * self.hop - wave.shape[2]
        wave = nn.functional.pad(wave, (0, max(missing, 0)))
        codes = wave.new_zeros(len(wave), int(counts.max()), embedder.bottleneck.out_channels)
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            found = embedder.bottleneck(embedder.dac_encoder(wave[rows, :, : count * self.hop]))
            codes[rows, :count] = found.mT.to(codes.dtype)  # autocast gives another
        return codes
