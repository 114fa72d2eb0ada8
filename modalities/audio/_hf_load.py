"""Finding and building the audio part of a Hugging Face model, and its feature extractor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mmrep.hub.pretrained import load_pretrained, load_processor
from mmrep.hub.pretrained import rebuild as rebuild_model
from mmrep.modalities.audio._hf_mel import ASTTrunk, CLAPTrunk, WhisperTrunk
from mmrep.modalities.audio._hf_pe import KINDS as PE
from mmrep.modalities.audio._hf_pe import PETrunk, pe_class
from mmrep.modalities.audio._hf_wave import KINDS, WaveTrunk

_MEL = {
    "audio-spectrogram-transformer": ASTTrunk,
    "whisper": WhisperTrunk,
    "clap": CLAPTrunk,
    "clap_audio_model": CLAPTrunk,
}
Trunk = ASTTrunk | WhisperTrunk | CLAPTrunk | WaveTrunk | PETrunk


def load(
    source: str, *, revision: str | None, local_files_only: bool, projection: bool, count_padding: bool
) -> tuple[Trunk, Any, Any]:
    """Load a pretrained audio model in float32; see `mmrep.hub.pretrained.load_pretrained`.

    Args:
        source: folder or hub id, from `mmrep.hub.pretrained.locate`.
        revision: branch, tag or commit on the hub.
        local_files_only: never touch the network.
        projection: keep the projection into a joint space, of CLAP and PE.
        count_padding: tokens of padding are valid.

    Returns:
        The network around the model, the model's config, and its feature extractor.

    Raises:
        ValueError: no safetensors, no feature extractor, or a model of another kind.
    """
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    model, config, _ = load_pretrained(
        source, partial(_class, source=source, whole=True), noun="audio", may_lack=("masked_spec_embed",),
        ignore=("decoder.", "audio_projection.") if not projection else ("decoder.",), **options,
    )  # fmt: skip
    extractor = _extractor(source, **options)
    return _trunk(model, config, extractor, projection, count_padding), config, extractor


def rebuild(folder: Path, *, projection: bool, count_padding: bool) -> tuple[Trunk, Any, Any]:
    """The architecture that ``folder/config.json`` describes, with random weights (the saved state fills them)."""
    model, config = rebuild_model(folder, partial(_class, source=str(folder), whole=False))
    extractor = _extractor(str(folder), local_files_only=True)
    return _trunk(model, config, extractor, projection, count_padding), config, extractor


def _class(config: Any, *, source: str, whole: bool) -> tuple[Any, Any]:
    """The transformers class to build, and the config that is its own."""
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    kind = config.model_type
    if kind in ("clap", "clap_audio_model"):
        return transformers.ClapAudioModelWithProjection, getattr(config, "audio_config", config)
    if kind in PE:
        return pe_class(config, source)
    if kind == "whisper":
        return (transformers.WhisperModel if whole else WhisperEncoder), config
    if kind in KINDS or kind in _MEL:
        return transformers.AutoModel, config
    raise ValueError(
        f"path {source!r} is a {kind!r} model; hf-audio knows {', '.join((*KINDS, *PE, 'whisper', 'clap'))} and "
        "audio-spectrogram-transformer"
    )


def _extractor(source: str, **options: Any) -> Any:
    says = "how the model's audio is prepared: sampling rate, normalisation, spectrogram"
    files = ("preprocessor_config.json", "processor_config.json")
    return load_processor("AutoFeatureExtractor", source, noun="feature extractor", files=files, says=says, **options)


def _trunk(model: Any, config: Any, extractor: Any, projection: bool, count_padding: bool) -> Trunk:
    if config.model_type in PE:
        return PETrunk(model, config, extractor, projection)
    if config.model_type in KINDS:
        return WaveTrunk(model, config, extractor)
    if config.model_type == "whisper" and hasattr(model, "get_encoder"):
        model = model.get_encoder() if hasattr(model, "decoder") else model
    if hasattr(model, "audio_projection") and not projection:
        model.audio_projection = None
    return _MEL[config.model_type](model, config, extractor, count_padding)
