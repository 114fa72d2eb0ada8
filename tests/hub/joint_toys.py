"""Tiny random joint models of transformers with their whole processor, saved as the library itself saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.modalities.audio.audio_tiny_hf import CLAP_AUDIO
from tests.modalities.image import image_tiny_hf
from tests.modalities.text import tiny_hf

IMAGE_TEXT = ("metaclip2", "altclip", "chinese-clip", "siglip2", "align")
WORDS = {"metaclip2": "clip", "altclip": "altclip", "chinese-clip": "bert", "siglip2": "siglip2", "align": "bert"}
"""The tokenizer of `tiny_hf` that each has."""


def image_text(kind: str, folder: Path) -> tuple[Any, Any]:
    """Model and processor; random values everywhere, saved."""
    import transformers as hf

    torch.manual_seed(0)
    model, pictures = image_tiny_hf.make(kind)
    if kind == "align":  # whose pictures have no projection: their width is the joint space's
        model = hf.AlignModel(hf.AlignConfig(
            text_config=image_tiny_hf.TEXT, projection_dim=16, vision_config=image_tiny_hf.ALIGN
        ))  # fmt: skip
    if kind == "altclip":  # its positions begin after the padding: 17 hold 16 tokens
        text = {**image_tiny_hf.TEXT, "max_position_embeddings": 17, "project_dim": 16}
        model = hf.AltCLIPModel(hf.AltCLIPConfig(
            text_config=text, vision_config=image_tiny_hf.VIT, projection_dim=12
        ))  # fmt: skip
    stir(model.eval())
    model.save_pretrained(folder)
    tokenizer = tiny_hf.make(WORDS[kind])[1]
    named = {"metaclip2": "CLIP", "altclip": "AltCLIP", "chinese-clip": "ChineseCLIP", "siglip2": "Siglip2",
             "align": "Align"}[kind]  # fmt: skip
    processor = getattr(hf, f"{named}Processor")(image_processor=pictures, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    return model, processor


def clap(folder: Path, *, fusion: bool = False) -> tuple[Any, Any]:
    """A CLAP; its two logit scales differ."""
    import transformers as hf

    torch.manual_seed(0)
    audio = {**CLAP_AUDIO, "enable_fusion": fusion, "fusion_type": "aff_2d" if fusion else None, "projection_dim": 12}
    text = {**tiny_hf.SIZES, "max_position_embeddings": 17, "pad_token_id": 0, "projection_dim": 12}
    model = hf.ClapModel(hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=12)).eval()
    stir(model)
    model.save_pretrained(folder)
    extractor = hf.ClapFeatureExtractor(max_length_s=1, truncation="fusion" if fusion else "rand_trunc")
    tokenizer = tiny_hf.make("clap")[1]
    processor = hf.ClapProcessor(feature_extractor=extractor, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    return model, processor


@torch.no_grad()
def stir(model: Any) -> None:
    """Random values everywhere, since some begin at zero or one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():  # of BatchNorm
        if name.endswith(("running_mean", "running_var")):
            buffer += 0.2 * torch.rand(buffer.shape, generator=generator)


def xclip(folder: Path, images: str = "VideoMAEImageProcessor") -> tuple[Any, Any]:
    """An X-CLIP of 4 frames; released ones prepare frames as VideoMAE does."""
    import transformers as hf

    torch.manual_seed(0)
    vision = {**image_tiny_hf.VIT, "num_frames": 4, "mit_hidden_size": 12, "mit_intermediate_size": 24,
              "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2}  # fmt: skip
    config = hf.XCLIPConfig(
        text_config=image_tiny_hf.TEXT, vision_config=vision, projection_dim=12, prompt_num_attention_heads=2
    )
    model = hf.XCLIPModel(config).eval()
    stir(model)
    model.save_pretrained(folder)
    pictures = getattr(hf, images)(**image_tiny_hf.CROP)
    processor = hf.XCLIPProcessor(image_processor=pictures, tokenizer=tiny_hf.make("clip")[1])
    processor.save_pretrained(folder)
    return model, processor
