"""torchaudio's bundles of wav2vec 2.0, HuBERT and WavLM (``torchaudio.pipelines``).

In a recipe::

    encoder: {type: torchaudio, bundle: WAV2VEC2_BASE, download: true}
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mmrep.config import config
from mmrep.modalities.audio._base import Preprocess
from mmrep.modalities.audio._torchaudio_wave import BundleTrunk, MadeOf, bundle_of, load_weights, made_of_bundle
from mmrep.modalities.audio._trunks import TrunkEncoder
from mmrep.modalities.audio.decode import MAX_DURATION

_FILE = "torchaudio.json"


@config
class TorchaudioConfig:
    """bundle: a name of ``torchaudio.pipelines``, of the wav2vec 2.0, HuBERT and WavLM models; see `bundle_of`.

    weights: a file with the bundle's state dict: .safetensors, or .pt and .pth, of which tensors alone are read.
    download: let torchaudio download the weights into torch's hub cache, if no file is given. max_seconds: longer clips
    keep their first part. normalize: level of the clip, as in our own encoders. max_duration: longer audio is refused
    unread, in seconds.
    """

    bundle: str
    weights: str | None = None
    download: bool = False
    max_seconds: Annotated[float, Field(gt=0)] = BundleTrunk.max_seconds
    normalize: Literal["none", "peak", "rms"] = "none"
    max_duration: Annotated[float, Field(gt=0)] = MAX_DURATION

    def __post_init__(self) -> None:
        if self.weights is not None and self.download:
            raise ValueError("give either weights or download: true, not both")


class TorchaudioEncoder(TrunkEncoder):
    """A bundle's network without its letters; audio is mixed to mono and resampled to the bundle's rate.

    Tokens are the transformer's output, behind its last norm if it has one there: what the library's model gives
    without its ``aux`` layer. Layers are those of ``extract_features``. A bundle that standardises its input does so
    here for each clip, on the device. Inputs are waveforms, so `AudioAugment` may act on them. Tokens carry no position
    before `encode`. LayerDrop is off.
    """

    Config = TorchaudioConfig
    supports = BundleTrunk.supports

    def __init__(self, config: TorchaudioConfig, files: Path | None = None) -> None:
        saved = files is not None and (files / _FILE).is_file()
        if files is not None and saved:
            made_of = MadeOf(**json.loads((files / _FILE).read_text(encoding="utf-8")))
        else:
            made_of = made_of_bundle(bundle_of(config.bundle))
        trunk = BundleTrunk(made_of)
        if not saved:
            load_weights(trunk.model, config.bundle, config.weights, config.download)
        preprocess = Preprocess(
            sampling_rate=made_of.sampling_rate, channels="mono", max_seconds=config.max_seconds,
            normalize=config.normalize, max_duration=config.max_duration,
        )  # fmt: skip
        super().__init__(config, files, trunk=trunk, preprocess=preprocess)
        self._made_of = made_of

    def save_files(self, folder: Path) -> None:
        """Write the architecture: another version of torchaudio may not know the name."""
        document = json.dumps(dataclasses.asdict(self._made_of), indent=1)
        (folder / _FILE).write_text(document + "\n", encoding="utf-8")
