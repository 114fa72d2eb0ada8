"""Pretrained audio models of Hugging Face: AST, wav2vec 2.0, HuBERT, WavLM, Whisper, and the audio of CLAP and PE-AV.

In a recipe::

    encoder: {type: hf-audio, path: facebook/wav2vec2-base}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from mmrep.config import config
from mmrep.hub.pretrained import locate
from mmrep.modalities.audio._base import Preprocess
from mmrep.modalities.audio._hf_load import load, rebuild
from mmrep.modalities.audio._hf_wave import WaveTrunk
from mmrep.modalities.audio._trunks import TrunkEncoder
from mmrep.modalities.audio.decode import MAX_DURATION
from mmrep.tokens import Inputs
from mmrep.views import View


@config
class HFAudioConfig:
    """path: a folder, a hub id, or `package:name/folder` for a folder inside an installed Python package.

    revision: hub branch, tag or commit. local_files_only: never touch the network. projection: go through the
    projection into the joint space that a checkpoint of CLAP or PE has. count_padding: tokens of the padding that AST
    and Whisper read count as valid, in pools too, as in transformers' own classifiers. int16: round samples to 16 bits
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


class HFAudio(TrunkEncoder):
    """A Hugging Face audio model with its feature extractor; audio is mixed to mono and resampled to its rate.

    AST, Whisper and CLAP get the spectrogram of transformers' own extractor, made in the loader: the inputs are
    ``features`` and ``seconds``. wav2vec 2.0, HuBERT and WavLM get waveforms, standardised on the device: the inputs
    are those of our own encoders, and `AudioAugment` may act on them. Their tokens carry no position before `encode`.
    PE's audio gets waveforms, too, mirrored at the end up to a whole frame.
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
        super().__init__(config, files, trunk=trunk, preprocess=preprocess)
        self.hf_config, self.extractor = self_config, extractor

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One clip to the model's inputs; see `decode` for what audio may be.

        Raises:
            BadSampleError: the audio cannot be read, or (``too short``) is less than one frame of the model.
        """
        values = self.read_enough(raw, view, seed)
        if self.config.int16:
            values = (values.clamp(-1, 1) * 32767).trunc() / 32767
        if self.trunk.waves:
            return {"wave": self.trunk.prepared(values)}
        return {**self.trunk.features(values[0].numpy()), "seconds": torch.tensor(values.shape[1] / self.trunk.rate)}

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Stack spectrograms; pad waveforms."""
        if self.trunk.waves:
            return super().collate(items)
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}

    def layer_modules(self) -> list[nn.Module]:
        """See `Encoder.layer_modules`."""
        return self.trunk.blocks

    def save_files(self, folder: Path) -> None:
        """Write the model's own config.json and its feature extractor's preprocessor_config.json."""
        self.hf_config.save_pretrained(folder)
        self.extractor.save_pretrained(folder)
