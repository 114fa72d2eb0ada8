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


PE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
PE_TEXT = {"vocab_size": 60, "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0,
           "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 59,
           "cls_token_id": 1, "sep_token_id": 59, "local_attention": 8}  # fmt: skip
PE_AUDIO = {**PE, "dac_config": {"encoder_hidden_size": 4, "downsampling_ratios": [2, 4], "codebook_dim": 6}}
PE_PICTURE = {"embed_dim": 16, "img_size": [14, 14], "depth": 1, "num_heads": 2, "ref_feat_shape": [1, 1],
              "mlp_ratio": 2, "global_pool": "map"}  # fmt: skip
PE_VIDEO = {**PE, "vision_config": {"architecture": "vit_pe_core_large_patch14_336", "num_classes": 10,
                                    "model_args": PE_PICTURE}}  # fmt: skip


def pe(kind: str, folder: Path, *, frames: int | None = 4) -> tuple[Any, Any]:
    """A Perception Encoder of audio, of video, or of both: ``pe_audio``, ``pe_video`` or ``pe_audio_video``."""
    import transformers as hf

    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "feature_extractor": hf.PeAudioFeatureExtractor(hop_length=8),
        "video_processor": hf.PeVideoVideoProcessor(
            size={"height": 14, "width": 14}, do_resize=True, do_rescale=True, rescale_factor=1 / 255,
            do_normalize=True, image_mean=[0.5, 0.4, 0.5], image_std=[0.5, 0.5, 0.4],
            num_frames=frames, do_sample_frames=True,
        ),
        "tokenizer": tiny_hf.make("bert")[1],
    }  # fmt: skip
    if kind == "pe_audio":
        config = hf.PeAudioConfig(text_config=PE_TEXT, audio_config=PE_AUDIO)
        model, processor, without = hf.PeAudioModel(config), hf.PeAudioProcessor, "video_processor"
    elif kind == "pe_video":
        config = hf.PeVideoConfig(text_config=PE_TEXT, video_config=PE_VIDEO)
        model, processor, without = hf.PeVideoModel(config), hf.PeVideoProcessor, "feature_extractor"
    else:
        both = {**PE, "audio_config": PE_AUDIO, "video_config": PE_VIDEO}
        config = hf.PeAudioVideoConfig(text_config=PE_TEXT, audio_video_config=both)
        model, processor, without = hf.PeAudioVideoModel(config), hf.PeAudioVideoProcessor, ""
    stir(model.eval())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_scale"):
                parameter.abs_()  # of a trained model
    model.save_pretrained(folder)
    made = processor(**{name: part for name, part in parts.items() if name != without})
    made.save_pretrained(folder)
    return model, made
