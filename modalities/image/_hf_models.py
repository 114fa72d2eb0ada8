"""The Hugging Face vision transformers that are known: how each is taken apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """How one architecture is taken apart; what all have in common is in `mmrep.modalities.image._hf_vit`.

    Attributes:
        cls: name of the transformers class.
        pool: from the model, its last tokens [B, N, D] and which of them are valid (bool [B, N], None = all) to the
            pooled vector, or None.
        norm: name of the last norm that the tokens go through, None where they go through none.
        special: from the config to the number of leading class, distillation and register tokens.
        registers: from the config to how many of those have no position (the last ones).
        projected: name of the class that has a projection on top, if there is one.
        any_size: positions are fitted to the picture unasked; others are told when it has not the trained size.
        relation: what blocks must be told of the places of tokens: "rotary" angles, a "bias" of attention, or None.
        embed: from the model's embeddings, normalised pixels and options (sizes other than the trained) to tokens.
        native: reads pictures of their own shape, as padded patches.
    """

    cls: str
    pool: Callable[[Any, Tensor, Tensor | None], Tensor | None]
    norm: str | None = "layernorm"
    special: Callable[[Any], int] = lambda config: 1
    registers: Callable[[Any], int] = lambda config: 0
    projected: str | None = None
    any_size: bool = False
    relation: str | None = None
    native: bool = False
    embed: Callable[..., Tensor] = lambda embeddings, pixels, **told: embeddings(pixels, **told)


def _nothing(model: Any, values: Tensor, valid: Tensor | None) -> None:
    return None


def _first(model: Any, values: Tensor, valid: Tensor | None) -> Tensor:
    return values[:, 0]


def _normed_first(model: Any, values: Tensor, valid: Tensor | None) -> Tensor:
    return model.post_layernorm(values[:, 0])


def _layer(model: Any, values: Tensor, valid: Tensor | None) -> Tensor | None:
    """The pooling layer, which reads the first token alone."""
    return None if model.pooler is None else model.pooler(values)


def _attention(model: Any, values: Tensor, valid: Tensor | None) -> Tensor | None:
    """SigLIP's head: attention by one learned query, among valid tokens, then an MLP."""
    head = getattr(model, "head", None)
    if head is None:
        return None
    hidden = None if valid is None else ~(valid | ~valid.any(1, keepdim=True))
    seen = head.attention(head.probe.expand(len(values), -1, -1), values, values, key_padding_mask=hidden)[0]
    return (seen + head.mlp(head.layernorm(seen)))[:, 0]


def _beit(model: Any, values: Tensor, valid: Tensor | None) -> Tensor | None:
    """The normed mean of the patches, or the class token; as the checkpoint says."""
    norm = None if model.pooler is None else model.pooler.layernorm
    if norm is None or valid is None:
        return _layer(model, values, valid)
    marks = valid[:, 1:, None].to(values.dtype)
    return norm((values[:, 1:] * marks).sum(1) / marks.sum(1).clamp_min(1))


def _whole_mae(embeddings: Any, pixels: Tensor, **told: Any) -> Tensor:
    """All patches in raster order: the trunk sets the masked share to nothing, and noise is what orders them."""
    patches = (pixels.shape[2] // embeddings.patch_size) * (pixels.shape[3] // embeddings.patch_size)
    order = torch.arange(patches, dtype=torch.float32, device=pixels.device)
    return embeddings(pixels, noise=order.expand(len(pixels), -1), **told)[0]


def _clip(name: str, projected: str | None = None) -> Family:
    return Family(cls=name, pool=_normed_first, norm=None, projected=projected)


FAMILIES = {
    "vit": Family(cls="ViTModel", pool=_layer),
    "deit": Family(cls="DeiTModel", pool=_layer, special=lambda config: 2),
    "vit_msn": Family(cls="ViTMSNModel", pool=_nothing),
    "ijepa": Family(cls="IJepaModel", pool=_layer, special=lambda config: 0),
    "dinov2": Family(cls="Dinov2Model", pool=_first, any_size=True),
    "dinov2_with_registers": Family(
        cls="Dinov2WithRegistersModel",
        pool=_first,
        any_size=True,
        special=lambda config: 1 + config.num_register_tokens,
        registers=lambda config: config.num_register_tokens,
    ),
    "dinov3_vit": Family(
        cls="DINOv3ViTModel",
        pool=_first,
        norm="norm",
        any_size=True,
        special=lambda config: 1 + config.num_register_tokens,
        relation="rotary",
    ),
    "vit_mae": Family(cls="ViTMAEModel", pool=_nothing, embed=_whole_mae),
    "data2vec-vision": Family(
        cls="Data2VecVisionModel",
        pool=_nothing,
        any_size=True,
        relation="bias",
        embed=lambda embeddings, pixels: embeddings(pixels)[0],
    ),
    "beit": Family(cls="BeitModel", pool=_beit, any_size=True, relation="bias"),
    "clip_vision_model": _clip("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "metaclip_2_vision_model": _clip("MetaClip2VisionModel", "MetaClip2VisionModelWithProjection"),
    "altclip_vision_model": _clip("AltCLIPVisionModel"),
    "chinese_clip_vision_model": _clip("ChineseCLIPVisionModel"),
    "siglip_vision_model": Family(
        cls="SiglipVisionModel", pool=_attention, norm="post_layernorm", special=lambda config: 0
    ),
    "siglip2_vision_model": Family(
        cls="Siglip2VisionModel", pool=_attention, norm="post_layernorm", special=lambda config: 0, native=True
    ),
}
"""By ``model_type`` of the config of the vision part."""
