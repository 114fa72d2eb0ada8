"""Finding and building the vision part of a Hugging Face model, and its image processor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mmrep.hub.pretrained import load_pretrained, load_processor
from mmrep.hub.pretrained import rebuild as rebuild_model
from mmrep.modalities.image._hf_maps import MAPS, MapTrunk
from mmrep.modalities.image._hf_models import FAMILIES
from mmrep.modalities.image._hf_vit import ViTTrunk

_WHOLE = {"altclip": "AltCLIPModel", "chinese_clip": "ChineseCLIPModel", "align": "AlignModel"}
"""Composites whose vision part transformers can load with the rest alone."""
_IDLE = ("text_model.", "text_projection.", "logit_scale", "temperature")
Trunk = ViTTrunk | MapTrunk


def load(
    source: str, *, revision: str | None, local_files_only: bool, projection: bool, pooler: bool | None
) -> tuple[Trunk, Any, Any]:
    """Load a pretrained vision model in float32; see `mmrep.hub.pretrained.load_pretrained`.

    Args:
        source: folder or hub id, from `mmrep.hub.pretrained.locate`.
        revision: branch, tag or commit on the hub.
        local_files_only: never touch the network.
        projection: keep the projection into a joint space, where the checkpoint has one.
        pooler: keep the pooling layer; None = if the checkpoint has values for it.

    Returns:
        The network around the model, the config of the vision part, and the checkpoint's image processor.

    Raises:
        ValueError: no safetensors, no image processor, a model of another kind, or no values for ``pooler``.
    """
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    model, config, missing = load_pretrained(
        source, partial(_class, source=source, projection=projection), noun="image", may_lack=("pooler.",),
        ignore=_IDLE, **options,
    )  # fmt: skip
    if config.model_type in _WHOLE:
        part = config.vision_config
        part.projection_dim, part.architectures = config.projection_dim, config.architectures
        config = part
    head, model = getattr(model, "visual_projection", None), getattr(model, "vision_model", model)
    lacks = any(key.startswith("pooler.") for key in missing)
    if pooler and (lacks or getattr(model, "pooler", None) is None):
        raise ValueError(f"path {source!r}: pooler is asked for, but the checkpoint has no values for one")
    config.add_pooling_layer = pooler is not False and not lacks
    return _trunk(model, config, head if projection else None), config, _processor(source, **options)


def rebuild(folder: Path, *, projection: bool) -> tuple[Trunk, Any, Any]:
    """The architecture that ``folder/config.json`` describes, with random weights (the saved state fills them)."""
    model, config = rebuild_model(folder, partial(_class, source=str(folder), projection=projection))
    head = getattr(model, "visual_projection", None)
    if projection and config.model_type in FAMILIES and (config.architectures or [""])[0] in _WHOLE.values():
        head = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
    return (
        _trunk(getattr(model, "vision_model", model), config, head),
        config,
        _processor(str(folder), local_files_only=True),
    )


def _class(config: Any, *, source: str, projection: bool) -> tuple[Any, Any]:
    """The transformers class to build, and the config that is its own."""
    import transformers

    kind = config.model_type
    if kind in _WHOLE:
        return getattr(transformers, _WHOLE[kind]), config
    part = getattr(config, "vision_config", None)
    if part is not None:
        if hasattr(config, "projection_dim"):
            part.projection_dim = config.projection_dim  # the whole model goes by its own value
        config = part
    if config.model_type in MAPS:
        return getattr(transformers, MAPS[config.model_type].cls), config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"path {source!r} is a {kind!r} model, which hf-image does not know; it knows "
            f"{', '.join(name.removesuffix('_vision_model') for name in (*FAMILIES, *MAPS))}"
        )
    plain = (getattr(config, "architectures", None) or [""])[0] == family.cls
    name = family.projected if family.projected and projection and not plain else family.cls
    return getattr(transformers, name), config


def _trunk(model: Any, config: Any, head: nn.Module | None) -> Trunk:
    if config.model_type in MAPS:
        return MapTrunk(model, config, MAPS[config.model_type])
    return ViTTrunk(model, config, FAMILIES[config.model_type], head)


def _processor(source: str, **options: Any) -> Any:
    says = "how the model's pictures are prepared: size, crop, mean and deviation"
    files = ("preprocessor_config.json", "processor_config.json")
    return load_processor("AutoImageProcessor", source, noun="image processor", files=files, says=says, **options)
