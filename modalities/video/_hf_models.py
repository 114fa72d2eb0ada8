"""The Hugging Face video models that are known, cut into what the encoder contract asks for: embed, blocks, norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmrep.modalities.video import _hf_pe as pe
from mmrep.modalities.video import _hf_xclip as xclip


@dataclass(frozen=True)
class Family:
    """How one architecture is taken apart.

    Attributes:
        cls: name of the transformers class, or what gives a class of ours for a part of it.
        frames: the field of its config that says how many frames it was trained with; None = its processor's affair.
        tubelet: from its config to (frames, rows, columns) of a tubelet; 0 rows and columns: the whole frame.
        embed: from the model and normalised frames [B, T, 3, H, W] to embeddings with positions.
        blocks: from the model to its blocks.
        block: from a block, tokens, and their places in the full grid (int64 [B, N], None = all, in order), or what
            ``told`` gives, to tokens.
        norm: from the model to its last norm, if it has one.
        part: the attribute of the model that is its encoder, if it is not the model itself.
        special: from its config to how many leading class tokens there are.
        drops: whether tokens may be dropped.
        any_length: whether it reads other numbers of frames than it was trained with.
        own: the field of the checkpoint's config that is the video model's, if that is a part of it.
        pool: from the model and its last tokens to a vector in the checkpoint's joint space, if it has one.
        pooled_width: from its config to the size of that space.
        told: from the model and embeddings to what all blocks are told.
        unpool: takes what leads to the joint space off the model.
        images: frames are prepared by an image processor.
        side: from its config to the tokens in a row, where its blocks must be told the places of tokens.
        time_last: its tokens run through time at each place, rather than through places at each time.
    """

    cls: str | Callable[[], Any]
    frames: str | None
    tubelet: Callable[[Any], tuple[int, int, int]]
    embed: Callable[[Any, Tensor], Tensor]
    blocks: Callable[[Any], Sequence[nn.Module]]
    block: Callable[[Any, Tensor, Any], Tensor]
    norm: Callable[[Any], Callable[[Tensor], Tensor] | None]
    part: str | None = None
    special: Callable[[Any], int] = lambda config: 0
    drops: bool = True
    any_length: bool = False
    side: Callable[[Any], int] | None = None
    time_last: bool = False
    own: str | None = None
    pool: Callable[[Any, Tensor], Tensor | None] | None = None
    pooled_width: Callable[[Any], int] = lambda config: config.projection_dim
    told: Callable[[Any, Tensor], Any] | None = None
    unpool: Callable[[Any], None] | None = None
    images: bool = False


def _cube(config: Any) -> tuple[int, int, int]:
    return config.tubelet_size, config.patch_size, config.patch_size


FAMILIES = {
    "videomae": Family(
        cls="VideoMAEModel",
        frames="num_frames",
        tubelet=_cube,
        embed=lambda model, frames: model.embeddings(frames, None),
        blocks=lambda model: model.encoder.layer,
        block=lambda block, values, _: block(values),
        norm=lambda model: model.layernorm,
    ),
    "vjepa2": Family(
        cls="VJEPA2Model",
        part="encoder",
        frames="frames_per_clip",
        tubelet=_cube,
        embed=lambda model, frames: model.embeddings(frames),
        blocks=lambda model: model.layer,
        block=lambda block, values, places: block(values, places)[0],
        norm=lambda model: model.layernorm,
        any_length=True,
        side=lambda config: config.crop_size // config.patch_size,
    ),
    "timesformer": Family(
        cls="TimesformerModel",
        frames="num_frames",
        tubelet=lambda config: (1, config.patch_size, config.patch_size),
        embed=lambda model, frames: model.embeddings(frames),
        blocks=lambda model: model.encoder.layer,
        block=lambda block, values, _: block(values)[0],
        norm=lambda model: model.layernorm,
        special=lambda config: 1,
        drops=False,
        time_last=True,
    ),
    "vivit": Family(
        cls="VivitModel",
        frames="num_frames",
        tubelet=lambda config: tuple(config.tubelet_size),
        embed=lambda model, frames: model.embeddings(frames),
        blocks=lambda model: model.layers,
        block=lambda block, values, _: block(values, None),
        norm=lambda model: model.layernorm,
        special=lambda config: 1,
    ),
    "xclip": Family(
        cls=xclip.xclip_class,
        own="vision_config",
        frames="num_frames",
        tubelet=lambda config: (1, config.patch_size, config.patch_size),
        embed=xclip.embed,
        blocks=lambda model: model.vision_model.encoder.layers,
        block=xclip.block,
        norm=lambda model: None,
        special=lambda config: config.num_frames,
        drops=False,
        pool=xclip.pool,
        unpool=xclip.without_head,
        images=True,
    ),
    "pe_video": Family(
        cls=pe.pe_class,
        own="video_config",
        frames=None,
        tubelet=lambda config: (1, 0, 0),
        embed=pe.embed,
        blocks=lambda model: model.video_encoder.layers,
        block=lambda block, values, told: block(values, attention_mask=None, position_embeddings=told),
        told=pe.turns,
        norm=pe.norm,
        special=lambda config: 1,
        drops=False,
        any_length=True,
        pool=pe.pool,
        pooled_width=lambda config: config.text_config.hidden_size,
        unpool=pe.without_head,
    ),
}
"""By ``model_type`` of the checkpoint's config."""


def choose(config: Any) -> tuple[Any, Any]:
    """The transformers class to build, and its config.

    Raises:
        ValueError: a model of another kind.
    """
    import transformers

    if config.model_type == "pe_audio_video":
        config = config.video_config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"a {config.model_type!r} model is no video model that hf-video knows: {', '.join(FAMILIES)}")
    if getattr(config, "attention_type", "") == "space_only":
        raise ValueError(
            "a TimeSformer of attention type 'space_only' averages frames inside: use video-frames instead"
        )
    return getattr(transformers, family.cls) if isinstance(family.cls, str) else family.cls(), config
