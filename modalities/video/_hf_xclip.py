"""X-CLIP's video part (arXiv:2208.02816): frames that send each other messages, and a transformer over the frames.

Its tokens are the class tokens of all frames, then the patches, time first.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@cache
def xclip_class() -> Any:
    """A class that takes only the video part out of a whole checkpoint, with what leads to its space."""
    from transformers.models.x_clip import modeling_x_clip as library

    class XCLIPVideoPart(library.XCLIPPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            own = config.vision_config
            self.vision_model = library.XCLIPVisionModel(own)
            self.visual_projection = nn.Linear(own.hidden_size, config.projection_dim, bias=False)
            small = copy.copy(own)
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
                setattr(small, name, getattr(own, f"mit_{name}"))
            self.mit = library.XCLIPMultiframeIntegrationTransformer(small)
            self.post_init()

    return XCLIPVideoPart


def without_head(model: Any) -> None:
    """Take off what leads to the joint space."""
    model.visual_projection = model.mit = None
    model.vision_model.post_layernorm = nn.Identity()


def embed(model: Any, frames: Tensor) -> Tensor:
    """Normalised frames [B, T, 3, H, W] to tokens [B, T + T * n, D]."""
    values = model.vision_model.pre_layernorm(model.vision_model.embeddings(frames.flatten(0, 1)))
    return _together(values.unflatten(0, frames.shape[:2]))


def block(block: Any, values: Tensor, places: Tensor | None) -> Tensor:
    """One block, to which frames of a clip are neighbours in the batch."""
    T = block.num_frames
    frames = torch.cat([values[:, :T, None], values[:, T:].unflatten(1, (T, -1))], 2)
    return _together(block(frames.flatten(0, 1), None).unflatten(0, frames.shape[:2]))


def pool(model: Any, values: Tensor) -> Tensor | None:
    """The last tokens to what ``get_video_features`` gives, [B, projection_dim]."""
    if model.mit is None:
        return None
    classes = model.vision_model.post_layernorm(values[:, : model.config.vision_config.num_frames])
    return model.mit(model.visual_projection(classes)).pooler_output


def _together(values: Tensor) -> Tensor:
    """[B, T, 1 + n, D] to [B, T + T * n, D]."""
    return torch.cat([values[:, :, 0], values[:, :, 1:].flatten(1, 2)], 1)
