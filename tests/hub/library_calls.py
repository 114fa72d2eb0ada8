"""Tiny checkpoints of every kind that a bridge reads, and what the library's own call makes of raw values of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tests.hub import joint_toys
from tests.modalities.audio import audio_tiny_hf
from tests.modalities.image import image_tiny_hf
from tests.modalities.text import tiny_hf
from tests.modalities.video import video_tiny_hf

Call = Callable[[Any], dict[str, Tensor]]
"""Of the library's model, in any dtype: [n, D] for each tower, float32, each value by itself and so without padding."""

PICTURES = [
    Image.fromarray(np.random.default_rng(n).integers(0, 255 - 40 * n, (*size, 3), dtype=np.uint8))
    for n, size in enumerate([(30, 41), (16, 16), (64, 20)])
]
TEXTS = ["w1 w2 w3", "w9", "w4 " * 30]
VIDEOS = [np.random.default_rng(n).integers(0, 255 - 40 * n, (4, 30, 41, 3), dtype=np.uint8) for n in range(3)]
SERIES = [np.random.default_rng(n).normal(size=(26, 2)).cumsum(0) + 3 for n in range(3)]


def waves(rate: int, *, seconds: float = 1.0) -> list[np.ndarray]:
    """Three clips, the longest of ``seconds``."""
    sizes = (int(rate * seconds), int(rate * seconds) // 3, int(rate * seconds) // 7 + 5)
    return [np.random.default_rng(n).normal(size=s).astype(np.float32) / 5 for n, s in enumerate(sizes)]


def image_text(kind: str, folder: Path) -> tuple[Any, dict[str, Any], Call]:
    """CLIP and its like."""
    if kind in ("clip", "siglip"):
        model, pictures = image_tiny_hf.save(kind, folder)
        tokenizer = tiny_hf.make(kind)[1]
        tokenizer.save_pretrained(folder)
    else:
        model, processor = joint_toys.image_text(kind, folder)
        pictures, tokenizer = processor.image_processor, processor.tokenizer
    full = kind.startswith("siglip")

    def call(model: Any) -> dict[str, Tensor]:
        coded = _coded(tokenizer, "max_length" if full else False)
        if full:  # it is called without a mask, as it was trained
            coded = [{"input_ids": one["input_ids"]} for one in coded]
        seen = [dict(pictures([one], return_tensors="pt")) for one in PICTURES]
        return {
            "image": _unit([model.get_image_features(**_cast(one, model)) for one in seen]),
            "text": _unit([model.get_text_features(**one) for one in coded]),
        }

    return model, {"image": PICTURES, "text": TEXTS}, call


def clap(folder: Path) -> tuple[Any, dict[str, Any], Call]:
    """CLAP."""
    model, processor = joint_toys.clap(folder)
    rate = processor.feature_extractor.sampling_rate
    clips = waves(rate)

    def call(model: Any) -> dict[str, Tensor]:
        heard = [processor.feature_extractor(wave, sampling_rate=rate, return_tensors="pt") for wave in clips]
        return {
            "audio": _unit([model.get_audio_features(**_cast(one, model)) for one in heard]),
            "text": _unit([model.get_text_features(**one) for one in _coded(processor.tokenizer)]),
        }

    return model, {"audio": _clips(clips, rate), "text": TEXTS}, call


def xclip(folder: Path) -> tuple[Any, dict[str, Any], Call]:
    """X-CLIP."""
    model, processor = joint_toys.xclip(folder)

    def call(model: Any) -> dict[str, Tensor]:
        seen = [processor(videos=list(frames), return_tensors="pt")["pixel_values"] for frames in VIDEOS]
        pixels = [{"pixel_values": one.reshape(1, 4, 3, 16, 16)} for one in seen]
        return {
            "video": _unit([model.get_video_features(**_cast(one, model)) for one in pixels]),
            "text": _unit([model.get_text_features(**one) for one in _coded(processor.tokenizer)]),
        }

    return model, {"video": VIDEOS, "text": TEXTS}, call


def pe(kind: str, folder: Path) -> tuple[Any, dict[str, Any], Call]:
    """Perception Encoder: by one call of all, as it has no other; embeddings have the length that they have."""
    model, processor = joint_toys.pe(kind, folder)
    names = {"pe_audio": ("audio", "text"), "pe_video": ("video", "text"),
             "pe_audio_video": ("audio", "video", "text_audio", "text_video")}[kind]  # fmt: skip
    clips = waves(48_000, seconds=400 / 48_000)
    raw: dict[str, Any] = {"audio": _clips(clips, 48_000), "video": VIDEOS}

    def call(model: Any) -> dict[str, Tensor]:
        outs = []
        for row, coded in enumerate(_coded(processor.tokenizer)):
            given = dict(coded)
            if "audio" in kind:
                given |= processor.feature_extractor(clips[row], sampling_rate=48_000, return_tensors="pt")
            if "video" in kind:
                given |= processor.video_processor(VIDEOS[row], return_tensors="pt")
            outs.append(model(**_cast(given, model)))
        said = {"text": "text_" + kind.removeprefix("pe_")}
        return {name: torch.cat([out[f"{said.get(name, name)}_embeds"] for out in outs]).float() for name in names}

    return model, {name: raw.get(name, TEXTS) for name in names}, call


def text(kind: str, folder: Path) -> tuple[Any, dict[str, Any], Call]:
    """A text model, pooled as its kind is: decoders by the last token, others by the mean."""
    torch.manual_seed(0)
    model, tokenizer = tiny_hf.make(kind)
    joint_toys.stir(model.eval())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def call(model: Any) -> dict[str, Tensor]:
        network = model.get_encoder() if kind == "t5" else model
        hidden = [network(input_ids=one["input_ids"]).last_hidden_state[0].float() for one in _coded(tokenizer)]
        return {"text": torch.stack([h[-1] if kind in ("gpt2", "llama") else h.mean(0) for h in hidden])}

    return model, {"text": TEXTS}, call


def image(kind: str, folder: Path) -> tuple[Any, dict[str, Any], Call]:
    """A vision model, pooled as its kind is."""
    model, processor = image_tiny_hf.save(kind, folder)

    def call(model: Any) -> dict[str, Tensor]:
        found = []
        for one in PICTURES:
            options: dict[str, Any] = _cast(dict(processor([one], return_tensors="pt")), model)
            if kind == "mae":  # nothing masked, in order
                model.config.mask_ratio = 0.0
                options["noise"] = torch.arange(16.0)[None]
            if kind == "hiera":
                embeddings = model.embeddings
                embeddings.is_mae = embeddings.patch_embeddings.is_mae = False
            out = model(**options)
            if kind == "clip-projected":
                found.append(out.image_embeds)
            elif kind in ("vit", "mae"):
                found.append(out.last_hidden_state[:, 0])
            elif kind in ("data2vec", "beit"):  # tokens without the first; their pooler is this, normed
                found.append(out.last_hidden_state.float()[:, 1:].mean(1))
            else:
                found.append(out.pooler_output.flatten(1))
        return {"image": torch.cat([one.float() for one in found])}

    return model, {"image": PICTURES}, call


def audio(kind: str, folder: Path) -> tuple[Any, dict[str, Any], Call]:
    """An audio model: the mean of its frames, of AST the library's own pooled vector."""
    torch.manual_seed(0)
    model, extractor = audio_tiny_hf.make(kind)
    joint_toys.stir(model.eval())
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    rate = extractor.sampling_rate
    clips = [waves(rate, seconds=0.5)[0]] * 3 if kind == "whisper" else waves(rate, seconds=0.5)

    def call(model: Any) -> dict[str, Tensor]:
        found, network = [], model.get_encoder() if kind == "whisper" else model
        for wave in clips:
            given = dict(extractor(wave, sampling_rate=rate, return_tensors="pt"))
            name = extractor.model_input_names[0]
            out = network(_cast({name: given[name]}, model)[name])
            hidden = out.last_hidden_state.float()
            if kind == "whisper":  # its clip is padded to a second: 25 of 50 tokens are of the half second
                hidden = hidden[:, :25]
            found.append(out.pooler_output.float() if kind == "ast" else hidden.mean(1))
        return {"audio": torch.cat(found)}

    return model, {"audio": _clips(clips, rate)}, call


def video(kind: str, folder: Path) -> tuple[Any, dict[str, Any], Call]:
    """A video model: its first token, or the mean of all."""
    model, processor = video_tiny_hf.save(kind, folder)

    def call(model: Any) -> dict[str, Tensor]:
        only: dict[str, Any] = {"skip_predictor": True} if kind == "vjepa2" else {}
        seen = [dict(processor([frames], return_tensors="pt")) for frames in VIDEOS]
        hidden = [model(**_cast(one, model), **only).last_hidden_state.float() for one in seen]
        return {"video": torch.cat([h[:, 0] if kind in ("timesformer", "vivit") else h.mean(1) for h in hidden])}

    return model, {"video": VIDEOS}, call


def series(kind: str, folder: Path) -> tuple[Any, dict[str, Any], Call]:
    """PatchTST, PatchTSMixer and TimesFM: the mean of their tokens."""
    import transformers as hf

    torch.manual_seed(0)
    shared = {"num_input_channels": 2, "context_length": 26, "patch_length": 8, "patch_stride": 4, "d_model": 16}
    sizes = {"patch_length": 8, "context_length": 40, "horizon_length": 8, "num_hidden_layers": 2, "hidden_size": 16,
             "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 2}  # fmt: skip
    model: Any = {
        "patchtst": lambda: hf.PatchTSTModel(hf.PatchTSTConfig(
            **shared, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, do_mask_input=False
        )),
        "patchtsmixer": lambda: hf.PatchTSMixerModel(hf.PatchTSMixerConfig(**shared, num_layers=2)),
        "timesfm": lambda: hf.TimesFmModelForPrediction(hf.TimesFmConfig(**sizes)),
        "timesfm2_5": lambda: hf.TimesFm2_5ModelForPrediction(
            hf.TimesFm2_5Config(**sizes, num_key_value_heads=1, output_quantile_len=8)
        ),
    }[kind]()  # fmt: skip
    joint_toys.stir(model.eval())
    model.save_pretrained(folder)
    given = SERIES if kind.startswith("patch") else [one[:, :1] for one in SERIES]

    def call(model: Any) -> dict[str, Tensor]:
        found = []
        for one in given:
            values = torch.tensor(one, dtype=torch.float32)[None]
            if kind.startswith("patch"):
                out = model(values.to(next(model.parameters()).dtype)).last_hidden_state.float()
                found.append(out.mean((1, 2)))
                continue
            decoder = model.decoder if hasattr(model, "decoder") else model.model
            filled, padding, freq = model._preprocess([values[0, :, 0]], [0])
            extra = {"freq": freq.long()} if hasattr(decoder, "freq_emb") else {}
            out = decoder(past_values=filled.to(next(model.parameters()).dtype),
                          past_values_padding=padding[:, : filled.shape[1]], **extra)  # fmt: skip
            found.append(out.last_hidden_state.float()[:, -4:].mean(1))  # 26 of 40 values: 4 of 5 patches
        return {"time_series": torch.cat(found)}

    return model, {"time_series": given}, call


Make = Callable[[Path], tuple[Any, dict[str, Any], Call]]
KINDS: dict[str, Make] = {
    **{kind: partial(image_text, kind) for kind in ("clip", "siglip", *joint_toys.IMAGE_TEXT)},
    "clap": clap,
    "xclip": xclip,
    **{kind: partial(pe, kind) for kind in ("pe_audio", "pe_video", "pe_audio_video")},
    **{kind: partial(text, kind) for kind in ("bert", "roberta", "t5", "gpt2", "llama")},
    **{kind: partial(image, kind) for kind in (
        "vit", "dinov2-registers", "clip-vision", "clip-projected", "data2vec", "beit", "mae", "hiera", "swin",
        "convnext",
    )},
    **{kind: partial(audio, kind) for kind in ("wav2vec2", "hubert-large", "wavlm", "whisper", "ast")},
    **{kind: partial(video, kind) for kind in ("videomae", "vjepa2", "timesformer", "vivit")},
    **{kind: partial(series, kind) for kind in ("patchtst", "patchtsmixer", "timesfm", "timesfm2_5")},
}  # fmt: skip
"""By name: what saves one in a folder, and returns the library's model, raw values by tower, and its own call."""


def _coded(tokenizer: Any, padding: Any = False) -> list[dict[str, Tensor]]:
    """Each text alone."""
    options: dict[str, Any] = {"return_tensors": "pt", "padding": padding, "truncation": True, "max_length": 16}
    coded = [tokenizer([one], **options) for one in TEXTS]
    return [{name: one[name] for name in ("input_ids", "attention_mask")} for one in coded]


def _cast(inputs: Any, model: Any) -> dict[str, Any]:
    """Floating-point inputs in the dtype of the model, as a user of the library gives them."""
    dtype = next(model.parameters()).dtype
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _unit(found: list[Any]) -> Tensor:
    return F.normalize(torch.cat([getattr(one, "pooler_output", one) for one in found]).float(), dim=1)


def _clips(values: list[np.ndarray], rate: int) -> list[dict[str, Any]]:
    return [{"array": wave, "sampling_rate": rate} for wave in values]
