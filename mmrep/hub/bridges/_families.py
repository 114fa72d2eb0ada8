"""Which encoder reads a checkpoint of transformers, by the model type of its config, and how it is pooled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Part:
    """One tower: its encoder's registered type, its pool, and other fields of the encoder."""

    encoder: str
    pool: str | dict[str, Any] = "native"
    fields: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Scale:
    """Another temperature of a checkpoint: the parameters of a scale that is no logarithm, and of its bias."""

    scale: str
    bias: str


@dataclass(frozen=True)
class Joint:
    """A checkpoint of two modalities in one space.

    Attributes:
        towers: by name.
        scale: parameter of the logit scale.
        bias: parameter of the bias, None = no bias.
        holds: what ``scale`` is: the logarithm of the logit scale, that itself, or a temperature to divide by.
        highest: upper bound of the scale in the family's training, where there is a lower one, too; None = none.
        unit: embeddings have unit length.
        others: of several pairs of towers, the temperatures of the rest, by name.
    """

    towers: dict[str, Part]
    scale: str = "logit_scale"
    bias: str | None = None
    holds: Literal["log", "scale", "temperature"] = "log"
    highest: float | None = 100.0
    unit: bool = True
    others: dict[str, Scale] = field(default_factory=dict[str, Scale])


_IMAGE_TEXT = {"image": Part("hf-image"), "text": Part("hf-text")}
JOINT = {
    "clip": Joint(_IMAGE_TEXT),
    "metaclip_2": Joint(_IMAGE_TEXT),
    "chinese_clip": Joint(_IMAGE_TEXT),
    "altclip": Joint(_IMAGE_TEXT),
    "siglip": Joint(_IMAGE_TEXT, bias="logit_bias", highest=None),
    "siglip2": Joint(_IMAGE_TEXT, bias="logit_bias", highest=None),
    "align": Joint(_IMAGE_TEXT, scale="temperature", holds="temperature", highest=None),
    "clap": Joint({"audio": Part("hf-audio"), "text": Part("hf-text")}, scale="logit_scale_a"),
    "xclip": Joint({"video": Part("hf-video"), "text": Part("hf-text")}, highest=None),
    "pe_audio": Joint(
        {"audio": Part("hf-audio"), "text": Part("hf-text")}, scale="text_audio_logit_scale",
        bias="text_audio_logit_bias", holds="scale", highest=None, unit=False,
    ),
    "pe_video": Joint(
        {"video": Part("hf-video", fields={"sampling": "ends"}), "text": Part("hf-text")},
        scale="text_video_logit_scale", bias="text_video_logit_bias", holds="scale", highest=None, unit=False,
    ),
    "pe_audio_video": Joint(
        {"audio": Part("hf-audio"), "video": Part("hf-video", fields={"sampling": "ends"}),
         "text_audio": Part("hf-text", fields={"space": "audio"}),
         "text_video": Part("hf-text", fields={"space": "video"})},
        scale="audio_video_logit_scale", bias="audio_video_logit_bias", holds="scale", highest=None, unit=False,
        others={"text_audio": Scale("audio_model.text_audio_logit_scale", "audio_model.text_audio_logit_bias"),
                "text_video": Scale("video_model.text_video_logit_scale", "video_model.text_video_logit_bias")},
    ),
}  # fmt: skip
"""Model types of two towers; the pools are what the library's ``get_…_features`` return."""

ELSEWHERE = {
    "LanguageBind": "its code is a package of its own, which transformers does not have. A tower of LanguageBind is a "
    "CLIP's, in videos with attention over time besides, which no encoder here has. One without (add_time_attn: false "
    "in its vision_config; and the text) can be read where its weights are saved again as transformers' "
    "CLIPVisionModelWithProjection or CLIPTextModelWithProjection, each in a folder of its own",
}
"""By how model types begin that no version of transformers knows, what to do about them."""

_PATCHES = {"type": "mean", "special": False}
"""What the library's pooling layers of BEiT and data2vec read, and so their classifiers: no class token."""

_POOLS: dict[str, str | dict[str, Any]] = {
    "vit": "cls", "beit": _PATCHES, "deit": "cls", "vit_mae": "cls", "data2vec-vision": _PATCHES,
    "dinov3_convnext": "native", "timesformer": "cls", "vivit": "cls", "audio-spectrogram-transformer": "native",
}  # fmt: skip
"""Of single models, where it is not the default of the modality."""
_DEFAULTS = {"image": "native", "text": "mean", "audio": "mean", "video": "mean", "time_series": "mean"}
_ENCODERS = {"image": "hf-image", "text": "hf-text", "audio": "hf-audio", "video": "hf-video",
             "time_series": "hf-series"}  # fmt: skip
_TASKS = {
    "video": ("VIDEO_CLASSIFICATION",),
    "audio": ("AUDIO_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ"),
    "time_series": ("TIME_SERIES_PREDICTION", "TIME_SERIES_CLASSIFICATION", "TIME_SERIES_REGRESSION"),
    "image": ("IMAGE_CLASSIFICATION", "IMAGE", "MASKED_IMAGE_MODELING", "BACKBONE"),
    "text": ("MASKED_LM", "CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "TEXT_ENCODING", "SEQ_TO_SEQ_CAUSAL_LM"),
}
"""transformers lists its model types by task; the first modality that has the type is the model's."""


def single(kind: str) -> tuple[str, Part] | None:
    """Modality and tower of a model type that is not in `JOINT`, None if transformers lists it nowhere we know."""
    modality = _parts_modality(kind) or next((m for m, tasks in _TASKS.items() if kind in _listed(tasks)), None)
    if modality is None:
        return None
    decoder = modality == "text" and kind in _listed(("CAUSAL_LM",)) and kind not in _listed(("MASKED_LM",))
    pool = "last" if decoder else _POOLS.get(kind, _DEFAULTS[modality])
    if kind.endswith(("_vision_model", "_text_model", "_audio_model")):
        pool = "native"
    return modality, Part(_ENCODERS[modality], pool)


def _parts_modality(kind: str) -> str | None:
    """Of the part of a joint model that was saved alone."""
    ends = {"_text_model": "text", "_vision_model": "image", "_audio_model": "audio"}
    return next((modality for end, modality in ends.items() if kind.endswith(end)), None)


def _listed(tasks: tuple[str, ...]) -> set[str]:
    from transformers.models.auto import modeling_auto

    names: Any = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in tasks]
    return {kind for mapping in names for kind in mapping}
