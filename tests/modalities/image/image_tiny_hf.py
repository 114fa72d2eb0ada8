"""Tiny random Hugging Face vision models with their image processors, saved as a user's folder would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {**SIZES, "image_size": 16, "patch_size": 4}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 59,
        "pad_token_id": 0}  # fmt: skip
SQUARE = {"size": {"height": 16, "width": 16}}
CROP = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}


def make(kind: str) -> tuple[Any, Any]:
    """A random model of one architecture, and a processor that suits it."""
    import transformers as hf

    both = {"text_config": TEXT, "vision_config": VIT, "projection_dim": 12}
    dino = {"image_size": 24, "patch_size": 4, "mlp_ratio": 2, **SIZES}
    dino.pop("intermediate_size")
    siglip_text = {**TEXT, "projection_size": 16}
    models = {
        "vit": lambda: (hf.ViTModel(hf.ViTConfig(**VIT)), hf.ViTImageProcessor(**SQUARE)),
        "vit-classifier": lambda: (hf.ViTForImageClassification(hf.ViTConfig(**VIT)), hf.ViTImageProcessor(**SQUARE)),
        "deit": lambda: (hf.DeiTModel(hf.DeiTConfig(**VIT)), hf.DeiTImageProcessor(**CROP)),
        "dinov2": lambda: (hf.Dinov2Model(hf.Dinov2Config(**dino)), hf.BitImageProcessor(**CROP)),
        "dinov2-swiglu": lambda: (
            hf.Dinov2Model(hf.Dinov2Config(**dino, use_swiglu_ffn=True)), hf.BitImageProcessor(**CROP)
        ),
        "dinov2-registers": lambda: (
            hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**dino, num_register_tokens=3)),
            hf.BitImageProcessor(**CROP),
        ),
        "dinov3": lambda: (
            hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VIT, num_register_tokens=2)), hf.DINOv3ViTImageProcessor(**SQUARE)
        ),
        "clip": lambda: (hf.CLIPModel(hf.CLIPConfig(**both)), hf.CLIPImageProcessor(**CROP)),
        "clip-vision": lambda: (hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)), hf.CLIPImageProcessor(**CROP)),
        "clip-projected": lambda: (
            hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**VIT, projection_dim=12)),
            hf.CLIPImageProcessor(**CROP),
        ),
        "metaclip2": lambda: (hf.MetaClip2Model(hf.MetaClip2Config(**both)), hf.CLIPImageProcessor(**CROP)),
        "altclip": lambda: (
            hf.AltCLIPModel(hf.AltCLIPConfig(**{**both, "text_config": {**TEXT, "project_dim": 16}})),
            hf.CLIPImageProcessor(**CROP),
        ),
        "chinese-clip": lambda: (
            hf.ChineseCLIPModel(hf.ChineseCLIPConfig(**both)), hf.ChineseCLIPImageProcessor(**CROP)
        ),
        "siglip": lambda: (
            hf.SiglipModel(hf.SiglipConfig(text_config=siglip_text, vision_config=VIT)),
            hf.SiglipImageProcessor(**SQUARE),
        ),
        "siglip2": lambda: (
            hf.Siglip2Model(hf.Siglip2Config(
                text_config=siglip_text, vision_config={**SIZES, "num_patches": 16, "patch_size": 4}
            )),
            hf.Siglip2ImageProcessor(patch_size=4, max_num_patches=20),
        ),
    }  # fmt: skip
    return models[kind]()


VITS = ("vit", "vit-classifier", "deit", "dinov2", "dinov2-swiglu", "dinov2-registers", "dinov3", "clip",
        "clip-vision", "clip-projected", "metaclip2", "altclip", "chinese-clip", "siglip", "siglip2")  # fmt: skip
KINDS = VITS


def save(kind: str, folder: Path) -> tuple[Any, Any]:
    """Random values everywhere (some start at zero), saved."""
    torch.manual_seed(0)
    model, processor = make(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor
