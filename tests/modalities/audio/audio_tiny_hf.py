"""Tiny random Hugging Face audio models with their feature extractors, saved as a user's folder would be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WAVE = {
    **SIZES, "conv_dim": (8, 8, 8), "conv_kernel": (10, 3, 2), "conv_stride": (5, 4, 4), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 20,
}  # fmt: skip
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
CLAP_AUDIO = {
    "num_mel_bins": 64, "spec_size": 128, "window_size": 4, "patch_size": 4, "patch_stride": [4, 4],
    "hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [2, 2],
}  # fmt: skip
CLAP_TEXT = {**SIZES, "vocab_size": 30, "max_position_embeddings": 16}


def make(kind: str) -> tuple[Any, Any]:
    """A random model of one architecture, and its extractor."""
    import transformers as hf

    def wave(**fields: Any) -> Any:
        return hf.Wav2Vec2FeatureExtractor(**fields)

    def clap(fusion: bool) -> tuple[Any, Any]:
        audio = {**CLAP_AUDIO, "enable_fusion": fusion, "fusion_type": "aff_2d" if fusion else None}
        config = hf.ClapConfig(text_config=CLAP_TEXT, audio_config=audio, projection_dim=12)
        how = "fusion" if fusion else "rand_trunc"
        return hf.ClapModel(config), hf.ClapFeatureExtractor(max_length_s=1, truncation=how)

    models: dict[str, Callable[[], tuple[Any, Any]]] = {
        "ast": lambda: (
            hf.ASTModel(hf.ASTConfig(**SIZES, patch_size=8, frequency_stride=6, time_stride=6, max_length=64,
                                     num_mel_bins=32)),
            hf.ASTFeatureExtractor(num_mel_bins=32, max_length=64),
        ),
        "wav2vec2": lambda: (hf.Wav2Vec2Model(hf.Wav2Vec2Config(**WAVE)), wave()),
        "wav2vec2-large": lambda: (
            hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**WAVE, **LARGE)), wave(return_attention_mask=True)
        ),
        "hubert": lambda: (hf.HubertModel(hf.HubertConfig(**WAVE)), wave()),
        "hubert-large": lambda: (hf.HubertModel(hf.HubertConfig(**WAVE, **LARGE)), wave(return_attention_mask=True)),
        "wavlm": lambda: (hf.WavLMModel(hf.WavLMConfig(**WAVE)), wave(do_normalize=False)),
        "wavlm-large": lambda: (hf.WavLMModel(hf.WavLMConfig(**WAVE, **LARGE)), wave(return_attention_mask=True)),
        "whisper": lambda: (
            hf.WhisperForConditionalGeneration(hf.WhisperConfig(
                vocab_size=30, num_mel_bins=16, d_model=16, encoder_layers=2, encoder_attention_heads=2,
                decoder_layers=1, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
                max_source_positions=50, max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None)),
            hf.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
        ),
        "clap": lambda: clap(False),
        "clap-fused": lambda: clap(True),
    }  # fmt: skip
    return models[kind]()


WAVES = ("wav2vec2", "wav2vec2-large", "hubert", "hubert-large", "wavlm", "wavlm-large")
KINDS = (*WAVES, "ast", "whisper", "clap", "clap-fused")
