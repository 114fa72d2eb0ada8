"""Dropping tokens of Hugging Face text models: those that can be told where each of the kept ones stood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrep.tokens import Grid


@dataclass(frozen=True)
class Placing:
    """How one architecture goes by places; all take ``position_ids`` and a mask of attention [B, 1, K, K].

    Attributes:
        causal: a token sees itself and what stands before it.
        window: layers may see near tokens alone: "all" layers, or "some" (``config.layer_types`` says which).
    """

    causal: bool = False
    window: str = "none"


_BOTH, _CAUSAL = Placing(), Placing(causal=True)
_KINDS = {
    **dict.fromkeys((
        "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "eurobert", "nomic_bert",
        "jina_embeddings_v3", "altclip_text_model", "chinese_clip_text_model", "align_text_model", "clap_text_model",
    ), _BOTH),
    "modernbert": Placing(window="some"),
    **dict.fromkeys((
        "gpt2", "gpt_neox", "opt", "llama", "gemma", "granite", "clip_text_model", "metaclip_2_text_model",
    ), _CAUSAL),
    **dict.fromkeys(("mistral", "phi3"), Placing(causal=True, window="all")),
    **dict.fromkeys(("qwen2", "qwen3", "gemma2", "gemma3_text"), Placing(causal=True, window="some")),
}  # fmt: skip
"""By ``model_type``; each was compared with the whole text whose other tokens are masked. Of others, T5 and MPNet weigh
attention by distances in what they are given, and BLOOM and MPT by its length; SigLIP reads the last of all places."""


def placing(config: Any) -> Placing | None:
    """How a model goes by places, None if its tokens cannot be dropped."""
    found = _KINDS.get(config.model_type)
    if found is None or _stretched(config) or (not found.causal and getattr(config, "is_decoder", False)):
        return None
    if found.causal and getattr(config, "use_bidirectional_attention", False):
        return Placing(window=found.window)
    return found


def _stretched(config: Any) -> bool:
    """Whether rotary angles depend on how long the text is."""
    rope: Any = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return any(part.get("rope_type") in ("dynamic", "longrope") for part in parts)


def mask(how: Placing, config: Any, grid: Grid, dtype: torch.dtype) -> Any:
    """What the attention of kept tokens is masked by, as the library's layers take it: added to the scores.

    Args:
        how: from `placing`.
        config: the model's.
        grid: of the kept tokens, in whatever order; a coordinate is a place in the whole text.
        dtype: of the model.

    Returns:
        [B, 1, K, K], or a dict of two such where layers differ.
    """
    place = grid.coords[..., 0]
    ahead = place[:, None, :] - place[:, :, None]
    seen = grid.valid[:, None, :].expand_as(ahead)
    if how.causal:
        seen = seen & (ahead <= 0)
    full = _additive(seen, dtype)
    size = getattr(config, "sliding_window", None)
    if how.window == "none" or (how.window == "all" and size is None):
        return full
    if size is None:
        return {"full_attention": full}
    # ModernBERT counts the tokens on each side, the others all that are seen on one side and the token itself.
    reach = size if config.model_type == "modernbert" else size - 1
    near = _additive(seen & (ahead.abs() <= reach), dtype)
    return near if how.window == "all" else {"full_attention": full, "sliding_attention": near}


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool [B, K, K] to what is added to scores; empty slots see themselves: a softmax of nothing is no number."""
    seen = seen | torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
