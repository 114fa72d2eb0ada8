"""Tiny random Hugging Face models, made on the spot and saved as a user's folder would be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WORDS = [f"w{i}" for i in range(56)]
SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}


def tokenizer(special: str, length: int = 16, **fields: Any) -> Any:
    """A word-level tokenizer; ``special``: "both" ends (ids 1 and 59), "end" only, or "none"."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{w: 3 + i for i, w in enumerate(WORDS)}, "</s>": 59}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = {"both": "<s> $A </s>", "end": "$A </s>", "none": "$A"}[special]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 59)])
    named = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", **fields}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=length, **named)


def make(kind: str) -> tuple[Any, Any]:
    """A random model of one architecture, and a tokenizer that suits it."""
    import transformers as hf

    both = tokenizer("both", cls_token="<s>", sep_token="</s>")
    clip_text = {**SIZES, "eos_token_id": 59, "bos_token_id": 1, "pad_token_id": 0}
    marks = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "w", *"0123456789")
    pieces = {piece: place for place, piece in enumerate(marks)}
    t5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    clip_vision = {**VISION, "image_size": 8}
    offset = {**SIZES, "max_position_embeddings": 17, "pad_token_id": 0}  # RoBERTa's positions begin after the padding
    models: dict[str, Callable[[], tuple[Any, Any]]] = {
        "bert": lambda: (hf.BertModel(hf.BertConfig(**SIZES)), both),
        "roberta": lambda: (
            hf.RobertaModel(hf.RobertaConfig(**{**SIZES, "max_position_embeddings": 17}, pad_token_id=0)),
            tokenizer("both", length=512, cls_token="<s>", sep_token="</s>"),
        ),
        "gpt2": lambda: (
            hf.GPT2Model(hf.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
            tokenizer("none", pad_token=None, padding_side="left"),
        ),
        "llama": lambda: (
            hf.LlamaModel(hf.LlamaConfig(**SIZES, num_key_value_heads=1)), tokenizer("end", padding_side="left")
        ),
        "t5": lambda: (
            hf.T5Model(hf.T5Config(**t5, num_decoder_layers=1)),
            tokenizer("end"),
        ),
        "t5-encoder": lambda: (
            hf.T5EncoderModel(hf.T5Config(**t5)),
            tokenizer("end"),
        ),
        "clip": lambda: (
            hf.CLIPModel(hf.CLIPConfig(text_config=clip_text, vision_config=clip_vision, projection_dim=16)),
            both,
        ),
        "clip-narrow": lambda: (
            hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**clip_text, projection_dim=12)), both
        ),
        "siglip": lambda: (
            hf.SiglipModel(hf.SiglipConfig(text_config={**SIZES, "projection_size": 16},
                                           vision_config=clip_vision)),
            tokenizer("end", pad_token="</s>"),
        ),
        "siglip2": lambda: (
            hf.Siglip2Model(hf.Siglip2Config(text_config={**SIZES, "projection_size": 16},
                                             vision_config={**VISION, "num_patches": 4})),
            hf.Siglip2Tokenizer(  # right as in the released checkpoints; the class itself pads on the left
                vocab=pieces, merges=[], model_max_length=16, add_eos_token=True, padding_side="right"
            ),
        ),
        "metaclip2": lambda: (
            hf.MetaClip2Model(hf.MetaClip2Config(text_config=clip_text, vision_config=clip_vision, projection_dim=16)),
            both,
        ),
        "altclip": lambda: (
            hf.AltCLIPModel(hf.AltCLIPConfig(text_config={**offset, "project_dim": 20}, vision_config=clip_vision,
                                             projection_dim=16)),
            both,
        ),
        "chinese-clip": lambda: (
            hf.ChineseCLIPModel(hf.ChineseCLIPConfig(text_config=clip_text, vision_config=clip_vision,
                                                     projection_dim=16)),
            both,
        ),
        "align": lambda: (
            hf.AlignModel(hf.AlignConfig(
                text_config={**SIZES, "pad_token_id": 0}, projection_dim=16,
                vision_config={"hidden_dim": 32, "image_size": 16, "depthwise_padding": [], "in_channels": [32],
                               "out_channels": [16], "kernel_sizes": [3], "strides": [1], "num_block_repeats": [1],
                               "expand_ratios": [1], "width_coefficient": 1.0, "depth_coefficient": 1.0},
            )),
            both,
        ),
        "clap": lambda: (
            hf.ClapModel(hf.ClapConfig(
                text_config={**offset, "projection_dim": 12}, projection_dim=12,
                audio_config={"hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1],
                              "num_hidden_layers": 2, "num_attention_heads": [1, 2], "num_mel_bins": 16,
                              "spec_size": 32, "window_size": 2, "patch_size": 4, "patch_stride": [4, 4],
                              "projection_dim": 12},
            )),
            both,
        ),
    }  # fmt: skip
    return models[kind]()


JOINT = ("metaclip2", "altclip", "chinese-clip", "align", "clap")
KINDS = ("bert", "roberta", "gpt2", "llama", "t5", "t5-encoder", "clip", "clip-narrow", "siglip", "siglip2", *JOINT)
