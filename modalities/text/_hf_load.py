"""Finding and building the text part of a Hugging Face model."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmrep.hub.fetch import ModelFolderError
from mmrep.hub.pretrained import load_pretrained
from mmrep.hub.pretrained import rebuild as rebuild_model
from mmrep.hub.remote_code import refusal
from mmrep.modalities.text import _hf_pe as pe

_PARTS = {
    "clip": "CLIPTextModelWithProjection",
    "metaclip_2": "MetaClip2TextModelWithProjection",
    "siglip": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
    "clap": "ClapTextModelWithProjection",
}
"""Composite model type to the class of its text part, with its projection if it has one."""
_WHOLE = {
    "altclip": ("AltCLIPModel", "AltCLIPTextModel"),
    "chinese_clip": ("ChineseCLIPModel", "ChineseCLIPTextModel"),
    "align": ("AlignModel", "AlignTextModel"),
    "xclip": ("XCLIPModel", "XCLIPTextModel"),
}
"""Composites whose text part transformers can load with the rest alone: the class of both, and of the part."""
_IDLE = ("decoder.", "vision_model.", "visual_projection.", "logit_scale", "temperature")
FULL_LENGTH = frozenset({"siglip", "siglip2", "siglip_text_model", "siglip2_text_model"})
"""Model types that were trained without an attention mask on texts padded to full length, and read the padding."""


def load(
    source: str, *, revision: str | None, local_files_only: bool, projection: bool, code: bool, space: str | None = None
) -> tuple[nn.Module, Any, set[str]]:
    """Load a pretrained text model in float32; see `mmrep.hub.pretrained.load_pretrained`.

    Args:
        source: folder or hub id, from `mmrep.hub.pretrained.locate`.
        revision: branch, tag or commit on the hub.
        local_files_only: never touch the network.
        projection: keep the text projection into a joint space, where the checkpoint has one.
        space: which, where the checkpoint has several.
        code: run the checkpoint's own code.

    Returns:
        The model, its config, and the names of parameters that the checkpoint has no values for (pooling layer only).
    """
    model, config, missing = load_pretrained(
        source, partial(_class, projection=projection, source=source, space=space), noun="text", revision=revision,
        local_files_only=local_files_only, may_lack=("pooler.", "text_model.pooler."), ignore=_IDLE, code=code,
    )  # fmt: skip
    if config.model_type in _WHOLE:
        part = config.text_config
        part.projection_dim, part.architectures = config.projection_dim, config.architectures
        return TextPart(model.text_model, model.text_projection if projection else None), part, missing
    if config.model_type in pe.SPACES:
        part = config.text_config
        part.projection_dim, part.architectures = part.hidden_size, [pe.CLASS]
        head = getattr(model, next(name for name, _ in model.named_children() if name.endswith("_head")))
        return TextPart(model.text_model, pooled_projection=head if projection else None), part, missing
    if missing and config.model_type == "clap_text_model" and projection:
        raise ValueError(f"path {source!r}: the checkpoint has no values for the pooling layer before its projection")
    return _encoder_part(model, projection), config, missing


def rebuild(folder: Path, *, projection: bool, code: bool) -> tuple[nn.Module, Any]:
    """The architecture that ``folder/config.json`` describes, with random weights (the saved state fills them)."""
    model, config = rebuild_model(folder, partial(_class, projection=projection, source=str(folder)), code=code)
    for kind, (whole, _) in _WHOLE.items():
        if config.model_type == f"{kind}_text_model" and config.architectures == [whole]:
            width = getattr(config, "project_dim", config.hidden_size)
            head = nn.Linear(width, config.projection_dim, bias=kind == "align") if projection else None
            if kind == "chinese_clip":
                model.pooler = None  # the whole model has none
            return TextPart(model, head), config
    if config.architectures == [pe.CLASS]:
        return TextPart(model, pooled_projection=pe.pe_head(config.hidden_size) if projection else None), config
    return _encoder_part(model, projection), config


class TextPart(nn.Module):
    """The text part of a composite, and the projection that the composite puts on it.

    Args:
        text_model: the library's text model.
        text_projection: linear, of any token, into the joint space; None for none.
        pooled_projection: of the pooled vector alone (CLAP's has a layer between); None for none.
    """

    def __init__(
        self, text_model: Any, text_projection: nn.Module | None = None, pooled_projection: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.text_model = text_model
        self.text_projection, self.pooled_projection = text_projection, pooled_projection

    def get_input_embeddings(self) -> nn.Module:
        """The table of input embeddings."""
        return self.text_model.get_input_embeddings()

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **options: Any) -> Any:
        """What the text model gives, the pooled vector projected; projecting tokens is the encoder's affair."""
        if inputs_embeds is not None:  # X-CLIP's text model does not know the name
            options["inputs_embeds"] = inputs_embeds
        out = self.text_model(input_ids=input_ids, **options)
        if self.pooled_projection is not None:
            pooled = getattr(out, "pooler_output", None)  # PE's text model has no pooling layer
            out.pooler_output = self.pooled_projection(out.last_hidden_state[:, 0] if pooled is None else pooled)
        return out


def without_pooler(model: Any) -> None:
    """Take off a pooling layer that is not asked for, nor projected: it would get no gradient."""
    if getattr(model, "pooled_projection", None) is not None:
        return
    inner = model.text_model if isinstance(model, TextPart) else model
    if getattr(inner, "pooler", None) is not None and "add_pooling_layer" in inspect.signature(type(inner)).parameters:
        inner.pooler = None


def max_length(model: Any, config: Any, tokenizer: Any) -> int:
    """The most tokens that both the positions and the tokenizer allow."""
    limits = [int(tokenizer.model_max_length)]
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        limits.append(int(positions) - first_place(model))
    smallest = min(limits)
    return smallest if smallest < 1_000_000 else 512  # "no limit" is a huge number in some tokenizers


def load_tokenizer(source: str, *, code: bool, **options: Any) -> Any:
    """The checkpoint's tokenizer.

    Args:
        source: folder or hub id.
        code: run the checkpoint's own code.
        **options: ``revision`` and ``local_files_only``.

    Raises:
        ModelFolderError: it has none; of many kinds transformers then makes an empty one, which knows no word.
    """
    from transformers import AutoTokenizer

    advice = (
        "a model of text needs its tokenizer.json and tokenizer_config.json (or a vocabulary such as vocab.txt or "
        "spiece.model) beside its config.json. Copy them from where the model came from, or write them there by "
        "transformers: AutoTokenizer.from_pretrained(the base model).save_pretrained(the folder)"
    )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=code, **options)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if not code and "trust_remote_code" in str(error):
            raise ValueError(f"path {refusal(source, 'auto_map in its tokenizer_config.json')}") from error
        raise ModelFolderError(f"path {source!r}: its tokenizer cannot be read: {advice} ({error})") from error
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if len(words) < 2:
        raise ModelFolderError(f"path {source!r} has no tokenizer, or one without a word: {advice}")
    return tokenizer


def first_place(model: Any) -> int:
    """The position of a text's first token: RoBERTa's begin after the padding id, so that 514 hold 512 tokens."""
    inner = getattr(model, "text_model", model)
    inner = getattr(inner, "roberta", inner)
    table = getattr(getattr(inner, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def _class(config: Any, *, projection: bool, source: str, space: str | None = None) -> tuple[Any, Any]:
    """The transformers class to build, and the config that is its own."""
    import transformers

    named = (getattr(config, "architectures", None) or [""])[0]
    kind = config.model_type
    if kind in _WHOLE:
        return getattr(transformers, _WHOLE[kind][0]), config
    if kind in pe.SPACES:
        found = pe.space_of(kind, space, source)
        return pe.pe_class(found), pe.pe_config(config, found)
    if space is not None:
        raise ValueError(f"space={space!r}: {source!r} is a {kind!r} model, whose texts have one space at most")
    if kind in _PARTS:
        if hasattr(config, "projection_dim"):
            config.text_config.projection_dim = config.projection_dim  # the whole model goes by its own value
        config = config.text_config
    kind = kind.removesuffix("_text_model")
    if kind in _WHOLE:
        return getattr(transformers, _WHOLE[kind][1]), config
    if kind in _PARTS:
        plain = _PARTS[kind].removesuffix("WithProjection")
        # A whole CLAP cannot be loaded as the plain class: transformers finds none of its names.
        without = named == plain or (not projection and kind != "clap")
        return getattr(transformers, plain if without else _PARTS[kind]), config
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        raise ValueError(
            f"path {source!r} is a {kind!r} model of several modalities; hf-text knows the text part of "
            f"{', '.join((*_PARTS, *_WHOLE, *pe.SPACES))} only: save the text part as a model of its own and name that"
        )
    return transformers.AutoModel, config


def _encoder_part(model: Any, projection: bool) -> nn.Module:
    """The encoder of an encoder-decoder, the text part of CLAP; anything else as it is."""
    model.config.use_cache = False
    if model.config.model_type == "clap_text_model" and hasattr(model, "text_projection"):
        return TextPart(model.text_model, pooled_projection=model.text_projection if projection else None)
    # Not by config.is_encoder_decoder: a saved T5EncoderModel denies it, and AutoModel builds the decoder all the same.
    both = all(isinstance(getattr(model, part, None), nn.Module) for part in ("encoder", "decoder"))
    return model.get_encoder() if both else model
