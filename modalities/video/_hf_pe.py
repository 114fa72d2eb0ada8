"""The video part of Perception Encoder's video and audio-video models (PE-AV), as transformers has it.

A picture model reads each frame, a convolution and a transformer read the frames. Its tokens are a class token and the
frames.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def pe_class() -> Any:
    """A class that takes only the video part out of a whole checkpoint, with its head."""
    from transformers.models.pe_video import modeling_pe_video as library

    class PEVideoPart(library.PeVideoPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.video_encoder = library.PeVideoEncoder(config.video_config)
            self.video_head = library.PeVideoContrastiveHead(
                config.video_config.hidden_size, config.text_config.hidden_size
            )
            self.post_init()

    return PEVideoPart


def without_head(model: Any) -> None:
    """Take off what leads to the joint space."""
    model.video_head = None


def embed(model: Any, frames: Tensor) -> Tensor:
    """Normalised frames [B, T, 3, H, W] to tokens [B, 1 + T, D]."""
    encoder = model.video_encoder
    return encoder.patch_embedder(encoder.embedder(frames.contiguous())[0])[0]


def turns(model: Any, values: Tensor) -> Any:
    """What blocks are told: cosines and sines by the place of the frame."""
    return model.video_encoder.rotary_emb(values, torch.arange(values.shape[1], device=values.device)[None])


def norm(model: Any) -> Callable[[Tensor], Tensor]:
    """The last norm and the linear layer behind it."""
    return lambda values: model.video_encoder.output(model.video_encoder.norm(values))


def pool(model: Any, values: Tensor) -> Tensor | None:
    """The last tokens to the embedding that the library does not bring to unit length, [B, dim]."""
    return None if model.video_head is None else model.video_head(values[:, 0])
