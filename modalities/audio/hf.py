"""Pretrained audio models of Hugging Face: AST, wav2vec 2.0, HuBERT, WavLM, Whisper's encoder, and CLAP's audio part.

In a recipe::

    encoder: {type: hf-audio, path: facebook/wav2vec2-base}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.encoder import BadSampleError
from mmrep.hub.pretrained import locate
from mmrep.modalities.audio._base import AudioEncoder, Preprocess
from mmrep.modalities.audio._hf_load import load, rebuild
from mmrep.modalities.audio._hf_wave import WaveTrunk
from mmrep.modalities.audio.decode import MAX_DURATION
from mmrep.tokens import Encoding, Grid, Inputs, Tokens
from mmrep.views import View


@config
class HFAudioConfig:
    """path: a folder, a hub id, or `package:name/folder` for a folder inside an installed Python package.

    revision: hub branch, tag or commit. local_files_only: never touch the network. projection: go through the
    projection into the joint space that a CLAP checkpoint has. count_padding: tokens of the padding that AST and
    Whisper read count as valid, in pools too, as in transformers' own classifiers. int16: round samples to 16 bits
    first, as CLAP's authors do and transformers does not. max_seconds: longer clips keep their first part; None = as
    much as the model reads, and 30 s for wav2vec 2.0, HuBERT and WavLM, which read any length. normalize: level of the
    clip, as in our own encoders. max_duration: longer audio is refused unread, in seconds.
    """

    path: str
    revision: str | None = None
    local_files_only: bool = False
    projection: bool = True
    count_padding: bool = False
    int16: bool = False
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    normalize: Literal["none", "peak", "rms"] = "none"
    max_duration: Annotated[float, Field(gt=0)] = MAX_DURATION


class HFAudio(AudioEncoder):
    """A Hugging Face audio model with its feature extractor; audio is mixed to mono and resampled to its rate.

    AST, Whisper and CLAP get the spectrogram of transformers' own extractor, made in the loader: the inputs are
    ``features`` and ``seconds``. wav2vec 2.0, HuBERT and WavLM get waveforms, standardised on the device: the inputs
    are those of our own encoders, and `AudioAugment` may act on them. Their tokens carry no position before `encode`.
    """

    Config = HFAudioConfig

    def __init__(self, config: HFAudioConfig, files: Path | None = None) -> None:
        options = {"projection": config.projection, "count_padding": config.count_padding}
        if files is not None and (files / "config.json").is_file():
            trunk, self_config, extractor = rebuild(files, **options)
        else:
            trunk, self_config, extractor = load(
                locate(config.path), revision=config.revision, local_files_only=config.local_files_only, **options
            )
        most = trunk.max_seconds
        if config.max_seconds is not None:
            most = config.max_seconds if most is None or isinstance(trunk, WaveTrunk) else min(most, config.max_seconds)
        preprocess = Preprocess(
            sampling_rate=extractor.sampling_rate, channels="mono", max_seconds=most, normalize=config.normalize,
            max_duration=config.max_duration,
        )  # fmt: skip
        super().__init__(config, files, preprocess=preprocess)
        self.trunk, self.hf_config, self.extractor = trunk, self_config, extractor
        self.width, self.depth, self.pooled_width = trunk.width, trunk.depth, trunk.pooled_width
        self.supports = trunk.supports

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One clip to the model's inputs; see `decode` for what audio may be.

        Raises:
            BadSampleError: the audio cannot be read, or (``too short``) is less than one frame of the model.
        """
        values = self.read(raw, view, seed).values
        if values.shape[1] < self.trunk.shortest:
            raise BadSampleError(
                "too short", f"{values.shape[1]} samples; the model reads {self.trunk.shortest} or more"
            )
        if self.config.int16:
            values = (values.clamp(-1, 1) * 32767).trunc() / 32767
        if isinstance(self.trunk, WaveTrunk):
            return {"wave": values}
        return {**self.trunk.features(values[0].numpy()), "seconds": torch.tensor(values.shape[1] / self.trunk.rate)}

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Stack spectrograms; pad waveforms."""
        if isinstance(self.trunk, WaveTrunk):
            return super().collate(items)
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}

    def length(self, item: Inputs) -> int:
        """The number of frames of a waveform; spectrograms are all of one length."""
        return self.trunk.length(item)

    def tokenize(self, inputs: Inputs) -> Tokens:
        """Inputs to tokens; see the network."""
        if not len(inputs["seconds"]):  # most of the library's layers cannot run on no rows
            one = self.trunk.tokenize({key: value.new_ones(1, *value.shape[1:]) for key, value in inputs.items()})
            return Tokens(one.values[:0], _no_rows(one.grid))
        return self.trunk.tokenize(inputs)

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Run the transformer over the kept tokens; layers are block outputs, before a final norm."""
        self.check_request(keep, layers)
        if len(tokens.values):
            return self.trunk.encode(tokens, keep, layers)
        first = None if keep is None else keep.new_zeros(1, keep.shape[1])
        return _empty(self.trunk.encode(_one_blank(tokens), first, layers))

    def layer_modules(self) -> list[nn.Module]:
        """See `Encoder.layer_modules`."""
        network = self.trunk.model.encoder if isinstance(self.trunk, WaveTrunk) else self.trunk.model
        return list(network.layers) if self.depth else []

    def save_files(self, folder: Path) -> None:
        """Write the model's own config.json and its feature extractor's preprocessor_config.json."""
        self.hf_config.save_pretrained(folder)
        self.extractor.save_pretrained(folder)


def _no_rows(grid: Grid) -> Grid:
    return Grid(grid.coords[:0], grid.valid[:0], grid.special[:0], grid.shape)


def _one_blank(tokens: Tokens) -> Tokens:
    """One row of zeros in place of a batch without rows; what made the batch keeps its gradient path."""
    values, grid = tokens.values, tokens.grid
    N, C = grid.coords.shape[1:]
    flags = torch.ones(1, N, dtype=torch.bool, device=values.device)
    special = torch.zeros_like(flags)
    return Tokens(
        values.new_zeros(1, N, values.shape[2]) + values.sum(), Grid(grid.coords.new_zeros(1, N, C), flags, special)
    )


def _empty(encoding: Encoding) -> Encoding:
    """An encoding without its rows."""
    return Encoding(
        Tokens(encoding.tokens.values[:0], _no_rows(encoding.tokens.grid)),
        None if encoding.pooled is None else encoding.pooled[:0],
        tuple(layer[:0] for layer in encoding.layers),
    )
