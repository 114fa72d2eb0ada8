"""Tiny random Hugging Face video models with their processors, saved as a user's folder would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}


def make(kind: str) -> tuple[Any, Any]:
    """A random model of one architecture, and a processor that suits it."""
    import transformers as hf

    torch.manual_seed(0)
    common = {**SIZES, "image_size": 16, "patch_size": 8, "intermediate_size": 32, "num_frames": 4}
    if kind in ("videomae", "videomae-norm"):
        config = hf.VideoMAEConfig(**common, tubelet_size=2, use_mean_pooling=kind == "videomae")
        return hf.VideoMAEModel(config), hf.VideoMAEVideoProcessor(**SQUARE)
    if kind == "vjepa2":
        config = hf.VJEPA2Config(
            **SIZES, crop_size=16, patch_size=8, frames_per_clip=4, tubelet_size=2, mlp_ratio=1.5, pred_hidden_size=24,
            pred_num_attention_heads=2, pred_num_hidden_layers=1,
        )  # fmt: skip
        return hf.VJEPA2Model(config), hf.VJEPA2VideoProcessor(crop_size=16)
    if kind == "timesformer":
        return hf.TimesformerModel(hf.TimesformerConfig(**common)), hf.TimesformerVideoProcessor(**SQUARE)
    if kind == "vivit":
        config = hf.VivitConfig(**{k: v for k, v in common.items() if k != "patch_size"}, tubelet_size=[2, 8, 8])
        return hf.VivitModel(config), hf.VivitVideoProcessor(**SQUARE)
    raise ValueError(kind)


KINDS = ("videomae", "videomae-norm", "vjepa2", "timesformer", "vivit")


def save(kind: str, folder: Path) -> tuple[Any, Any]:
    """Random values everywhere (some start at zero), saved."""
    model, processor = make(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor
