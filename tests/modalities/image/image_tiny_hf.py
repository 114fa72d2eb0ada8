"""Tiny random Hugging Face vision models with their image processors, saved as a user's folder would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {**SIZES, "image_size": 16, "patch_size": 4}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 59,
        "pad_token_id": 0}  # fmt: skip
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
ALIGN = {"hidden_dim": 32, "image_size": 40, "depthwise_padding": [], "in_channels": [32, 8], "out_channels": [8, 16],
         "kernel_sizes": [3, 5], "strides": [1, 2], "num_block_repeats": [1, 1], "expand_ratios": [1, 2],
         "width_coefficient": 1.0, "depth_coefficient": 1.0}  # fmt: skip
HIERA = {"embed_dim": 8, "image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1],
         "depths": [1, 1, 1], "num_heads": [1, 2, 4], "num_query_pool": 2, "masked_unit_size": [4, 4],
         "masked_unit_attention": [True, True, False]}  # fmt: skip
WIDE = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
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
        "vit-msn": lambda: (hf.ViTMSNModel(hf.ViTMSNConfig(**VIT)), hf.ViTImageProcessor(**SQUARE)),
        "ijepa": lambda: (hf.IJepaModel(hf.IJepaConfig(**VIT)), hf.ViTImageProcessor(**SQUARE)),
        "beit": lambda: (
            hf.BeitModel(hf.BeitConfig(**VIT, use_relative_position_bias=True, use_shared_relative_position_bias=True,
                                       use_mean_pooling=True)),
            hf.BeitImageProcessor(**SQUARE),
        ),
        "beit-absolute": lambda: (
            hf.BeitModel(hf.BeitConfig(**VIT, use_absolute_position_embeddings=True, use_mask_token=True,
                                       use_mean_pooling=False)),
            hf.BeitImageProcessor(**SQUARE),
        ),
        "data2vec": lambda: (
            hf.Data2VecVisionModel(hf.Data2VecVisionConfig(
                **VIT, use_relative_position_bias=True, use_shared_relative_position_bias=True, use_mask_token=True,
                use_mean_pooling=False,
            )),
            hf.BeitImageProcessor(**SQUARE),
        ),
        "data2vec-absolute": lambda: (
            hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**VIT, use_absolute_position_embeddings=True)),
            hf.BeitImageProcessor(**SQUARE),
        ),
        "mae": lambda: (hf.ViTMAEModel(hf.ViTMAEConfig(**VIT)), hf.ViTImageProcessor(**SQUARE)),
        "mae-pretraining": lambda: (
            hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**VIT, decoder_hidden_size=8, decoder_num_hidden_layers=1,
                                                    decoder_num_attention_heads=1, decoder_intermediate_size=8)),
            hf.ViTImageProcessor(**SQUARE),
        ),
        "hiera": lambda: (hf.HieraModel(hf.HieraConfig(**HIERA)), hf.BitImageProcessor(**WIDE)),
        "hiera-pretraining": lambda: (
            hf.HieraForPreTraining(hf.HieraConfig(**HIERA, decoder_hidden_size=8, decoder_depth=1,
                                                  decoder_num_heads=1)),
            hf.BitImageProcessor(**WIDE),
        ),
        "swin": lambda: (hf.SwinModel(hf.SwinConfig(**SWIN)), hf.ViTImageProcessor(**SQUARE)),
        "swin-absolute": lambda: (
            hf.SwinModel(hf.SwinConfig(**SWIN, use_absolute_embeddings=True)), hf.ViTImageProcessor(**SQUARE)
        ),
        "swinv2": lambda: (hf.Swinv2Model(hf.Swinv2Config(**SWIN)), hf.ViTImageProcessor(**SQUARE)),
        "convnext": lambda: (
            hf.ConvNextModel(hf.ConvNextConfig(**STAGES, num_stages=2)),
            hf.ConvNextImageProcessor(size={"shortest_edge": 40}),
        ),
        "convnextv2": lambda: (
            hf.ConvNextV2Model(hf.ConvNextV2Config(**STAGES, num_stages=2)),
            hf.ConvNextImageProcessor(size={"shortest_edge": 40}),
        ),
        "dinov3-convnext": lambda: (
            hf.DINOv3ConvNextModel(hf.DINOv3ConvNextConfig(**STAGES)),
            hf.DINOv3ViTImageProcessor(size={"height": 40, "width": 40}),
        ),
        "resnet": lambda: (
            hf.ResNetModel(hf.ResNetConfig(embedding_size=8, layer_type="basic", **STAGES)),
            hf.ConvNextImageProcessor(size={"shortest_edge": 40}),
        ),
        "regnet": lambda: (
            hf.RegNetModel(hf.RegNetConfig(embedding_size=8, groups_width=4, hidden_sizes=[16, 32], depths=[1, 1])),
            hf.ConvNextImageProcessor(size={"shortest_edge": 40}),
        ),
        "bit": lambda: (
            hf.BitModel(hf.BitConfig(embedding_size=8, num_groups=2, **STAGES)), hf.BitImageProcessor(**CROP)
        ),
        "efficientnet": lambda: (
            hf.EfficientNetModel(hf.EfficientNetConfig(**{**ALIGN, "hidden_dim": 1280})),
            hf.EfficientNetImageProcessor(size={"height": 40, "width": 40}),
        ),
        "mobilenetv2": lambda: (
            hf.MobileNetV2Model(hf.MobileNetV2Config(depth_multiplier=0.1, finegrained_output=False)),
            hf.MobileNetV2ImageProcessor(size={"shortest_edge": 44}, crop_size={"height": 40, "width": 40}),
        ),
        "align": lambda: (
            hf.AlignModel(hf.AlignConfig(text_config=TEXT, projection_dim=12, vision_config=ALIGN)),
            hf.EfficientNetImageProcessor(size={"height": 40, "width": 40}, rescale_offset=True, include_top=False,
                                          rescale_factor=1 / 127.5, do_normalize=False),
        ),
    }  # fmt: skip
    return models[kind]()


VITS = ("vit", "vit-classifier", "deit", "dinov2", "dinov2-swiglu", "dinov2-registers", "dinov3", "clip",
        "clip-vision", "clip-projected", "metaclip2", "altclip", "chinese-clip", "siglip", "siglip2", "beit",
        "beit-absolute", "vit-msn", "ijepa", "data2vec", "data2vec-absolute")  # fmt: skip
UNPOOLED = ("vit-classifier", "vit-msn", "ijepa", "data2vec", "data2vec-absolute")
MAPS = ("swin", "swin-absolute", "swinv2", "convnext", "convnextv2", "dinov3-convnext", "resnet", "mobilenetv2",
        "align", "regnet", "bit", "efficientnet")  # fmt: skip
KINDS = (*VITS, *MAPS)


def save(kind: str, folder: Path) -> tuple[Any, Any]:
    """Random values everywhere (some start at zero), saved."""
    torch.manual_seed(0)
    model, processor = make(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():  # of BatchNorm
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.2 * torch.rand(buffer.shape, generator=generator)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor
