"""Finding and building the text part of a Hugging Face model."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mmrep.hub.pretrained import load_pretrained
from mmrep.hub.pretrained import rebuild as rebuild_model

_PARTS = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}
"""Composite model type to the class of its text part."""
FULL_LENGTH = frozenset({"siglip", "siglip2", "siglip_text_model", "siglip2_text_model"})
"""Model types that were trained without an attention mask on texts padded to full length, and read the padding."""


def load(
    source: str, *, revision: str | None, local_files_only: bool, projection: bool
) -> tuple[nn.Module, Any, set[str]]:
    """Load a pretrained text model in float32; see `mmrep.hub.pretrained.load_pretrained`.

    Args:
        source: folder or hub id, from `mmrep.hub.pretrained.locate`.
        revision: branch, tag or commit on the hub.
        local_files_only: never touch the network.
        projection: keep a CLIP checkpoint's text projection.

    Returns:
        The model, its config, and the names of parameters that the checkpoint has no values for (pooling layer only).
    """
    model, config, missing = load_pretrained(
        source, partial(_class, projection=projection, source=source), noun="text", revision=revision,
        local_files_only=local_files_only, may_lack=("pooler.",), ignore=("decoder.",),
    )  # fmt: skip
    return _encoder_part(model), config, missing


def rebuild(folder: Path, *, projection: bool) -> tuple[nn.Module, Any]:
    """The architecture that ``folder/config.json`` describes, with random weights (the saved state fills them)."""
    model, config = rebuild_model(folder, partial(_class, projection=projection, source=str(folder)))
    return _encoder_part(model), config


def without_pooler(model: Any) -> None:
    """Take off a pooling layer that is not asked for: it would get no gradient."""
    if getattr(model, "pooler", None) is not None and "add_pooling_layer" in inspect.signature(type(model)).parameters:
        model.pooler = None


def max_length(model: Any, config: Any, tokenizer: Any) -> int:
    """The most tokens that both the positions and the tokenizer allow."""
    limits = [int(tokenizer.model_max_length)]
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        # RoBERTa's positions begin after the padding id: 514 of them hold 512 tokens.
        limits.append(int(positions) - (0 if padding is None else padding + 1))
    smallest = min(limits)
    return smallest if smallest < 1_000_000 else 512  # "no limit" is a huge number in some tokenizers


def _class(config: Any, *, projection: bool, source: str) -> tuple[Any, Any]:
    """The transformers class to build, and the config that is its own."""
    import transformers

    projected = (getattr(config, "architectures", None) or [""])[0] != "CLIPTextModel"
    kind = config.model_type
    if kind == "clip":
        config.text_config.projection_dim = config.projection_dim  # the whole model goes by its own value
    if kind in _PARTS:
        config = config.text_config
    kind = kind.removesuffix("_text_model")
    if kind in _PARTS:
        name = "CLIPTextModel" if kind == "clip" and not (projection and projected) else _PARTS[kind]
        return getattr(transformers, name), config
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        raise ValueError(
            f"path {source!r} is a {kind!r} model of several modalities; hf-text knows the text part of "
            f"{', '.join(_PARTS)} only: save the text part as a model of its own and name that"
        )
    return transformers.AutoModel, config


def _encoder_part(model: Any) -> nn.Module:
    """The encoder of an encoder-decoder; anything else as it is."""
    model.config.use_cache = False
    # Not by config.is_encoder_decoder: a saved T5EncoderModel denies it, and AutoModel builds the decoder all the same.
    both = all(isinstance(getattr(model, part, None), nn.Module) for part in ("encoder", "decoder"))
    return model.get_encoder() if both else model
