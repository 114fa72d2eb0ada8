"""wav2vec 2.0, HuBERT and WavLM as torchaudio has them, and the bundles of architecture and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from mmrep.hub.torch_file import read_weights
from mmrep.modalities.audio._hf_wave import WaveTrunk, additive, group_norm
from mmrep.registry import near
from mmrep.tokens import Grid, Tokens


@dataclass(frozen=True)
class MadeOf:
    """What a bundle says of its network, without its weights; it can be written as JSON.

    kind: "Wav2Vec2" or "WavLM". options: arguments of torchaudio's function of that name. sampling_rate: in Hz.
    normalize: each clip is brought to mean 0 and variance 1.
    """

    kind: str
    options: dict[str, Any]
    sampling_rate: int
    normalize: bool


class BundleTrunk(WaveTrunk):
    """A network of torchaudio without the layer over it that spells out letters.

    It is taken apart as those of transformers are, see `WaveTrunk`: a clip in a padded batch is what the library makes
    of it alone. The library itself would standardise a batch as a whole, padding and all, and cannot mask WavLM's.
    """

    epsilon = 1e-5  # of torch's layer_norm

    def __init__(self, made_of: MadeOf) -> None:
        models, options = import_module("torchaudio.models"), made_of.options
        factory = {"Wav2Vec2": models.wav2vec2_model, "WavLM": models.wavlm_model}[made_of.kind]
        layers = options["extractor_conv_layer_config"]
        shape = SimpleNamespace(
            model_type=made_of.kind.lower(), hidden_size=options["encoder_embed_dim"],
            num_hidden_layers=options["encoder_num_layers"], do_stable_layer_norm=options["encoder_layer_norm_first"],
            conv_kernel=[kernel for _, kernel, _ in layers], conv_stride=[stride for _, _, stride in layers],
        )  # fmt: skip
        reading = SimpleNamespace(do_normalize=made_of.normalize, sampling_rate=made_of.sampling_rate)
        super().__init__(factory(**{**options, "aux_num_out": None}), shape, reading)

    @property
    def _encoder(self) -> Any:
        return self.model.encoder.transformer

    def _project(self, values: Tensor) -> Tensor:
        return self.model.encoder.feature_projection(values)

    def _convolve(self, values: Tensor, lengths: Tensor) -> Tensor:
        for number, layer in enumerate(self.model.feature_extractor.conv_layers, start=1):
            if isinstance(layer.layer_norm, nn.GroupNorm):
                values = group_norm(layer.conv(values), self.frames(lengths, number), layer.layer_norm)
                values = nn.functional.gelu(values)
            else:
                values, _ = layer(values, None)
        return values

    def _layers(
        self, values: Tensor, grid: Grid, full: Tokens, keep: Tensor | None, layers: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        visible = grid.valid | ~grid.valid.any(1, keepdim=True)
        mask = None if bool(visible.all()) else additive(visible, values.dtype)
        told: dict[str, Any] = {"attention_mask": mask}
        if self.config.model_type == "wavlm":
            padding = None if mask is None else mask[:, 0, 0]
            told = {"position_bias": self._relative_positions(full, keep), "key_padding_mask": padding}
        asked: dict[int, Tensor] = {}
        for number, layer in enumerate(self._encoder.layers, start=1):
            values, _ = layer(values, **told)
            asked[number] = values
        return values, tuple(asked[number] for number in layers)


def bundle_of(name: str) -> Any:
    """The bundle called ``torchaudio.pipelines.<name>``.

    Raises:
        ValueError: there is none of these networks by that name.
    """
    pipelines = import_module("torchaudio.pipelines")
    known = [n for n in dir(pipelines) if isinstance(getattr(pipelines, n), pipelines.Wav2Vec2Bundle)]
    if name not in known:
        raise ValueError(
            f"bundle {name!r}: torchaudio.pipelines of this version has no wav2vec 2.0, HuBERT or WavLM of that name"
            f"{near(name, known)}; it has {', '.join(known)}"
        )
    return getattr(pipelines, name)


def made_of_bundle(bundle: Any) -> MadeOf:
    """Its architecture, sampling rate and normalisation; nothing is downloaded."""
    options = {**bundle._params, "aux_num_out": None}
    return MadeOf(bundle._model_type, options, int(bundle.sample_rate), bool(bundle._normalize_waveform))


def load_weights(model: nn.Module, name: str, weights: str | None, download: bool) -> None:
    """Fill ``model`` from a local file, or by torchaudio's own download if that is asked for.

    Raises:
        ValueError: neither is given, or the weights cannot be read or do not fit.
    """
    bundle = bundle_of(name)
    if weights is not None:
        state = read_weights(weights)
    elif download:
        state = bundle._get_state_dict({"map_location": "cpu", "weights_only": True, "progress": False})
    else:
        raise ValueError(
            f"bundle {name!r} has its weights in a file that torchaudio downloads ({bundle._path}), and nothing is "
            "downloaded unasked: set weights to a local copy, or download: true"
        )
    state = {key: value for key, value in state.items() if not key.startswith("aux.")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit bundle {name!r}: {error}") from error
