"""Perception Encoder's audio, video and audio-video checkpoints: what the library's own call gives, side by side."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import mmrep
from mmrep.config import component
from mmrep.hub.fetch import ModelFolderError
from tests.hub import joint_toys

TEXTS = ["w1 w2 w3", "w9", "w4 " * 30]
RATE = 48_000
WAVES = [np.random.default_rng(n).normal(size=size).astype(np.float32) / 4 for n, size in enumerate([400, 163, 1])]
VIDEOS = [
    np.random.default_rng(n).integers(0, 255 - 40 * n, (count, *size, 3), dtype=np.uint8)
    for n, (count, size) in enumerate([(9, (30, 41)), (4, (14, 14)), (3, (64, 20))])
]


def clips():
    return [{"array": wave, "sampling_rate": RATE} for wave in WAVES]


def inputs(processor, row=None):
    """What the library's own processors make of all, or of one."""
    pick = slice(None) if row is None else slice(row, row + 1)
    found = {}
    if hasattr(processor, "feature_extractor"):
        found |= dict(processor.feature_extractor(WAVES[pick], sampling_rate=RATE, return_tensors="pt"))
    if hasattr(processor, "video_processor"):
        made = [processor.video_processor(v, return_tensors="pt")["pixel_values_videos"] for v in VIDEOS[pick]]
        found["pixel_values_videos"] = torch.cat(made)
    coded = processor.tokenizer(TEXTS[pick], return_tensors="pt", padding=True, truncation=True, max_length=16)
    return {**found, "input_ids": coded["input_ids"], "attention_mask": coded["attention_mask"]}


@torch.no_grad()
def library(model, processor):
    """Embeddings and logits of each sample alone, one below the other."""
    outs = [model(**inputs(processor, row)) for row in range(3)]
    names = [name for name in outs[0] if name.endswith("_embeds") or name.startswith("logits_")]
    return {name: torch.cat([out[name] for out in outs]) for name in names}


def logits(temperature, one, other):
    return (temperature.scale * torch.as_tensor(one) @ torch.as_tensor(other).T + temperature.bias).detach()


@pytest.mark.parametrize("kind", ["pe_audio", "pe_video"])
def test_both_towers_and_their_logits_are_the_librarys(kind, tmp_path):
    model, processor = joint_toys.pe(kind, tmp_path)
    ours, wanted = mmrep.load(tmp_path), library(model, processor)
    name = kind.removeprefix("pe_")
    found = ours.encode({"audio": clips(), "video": VIDEOS}[name], name), ours.encode(TEXTS, "text")
    np.testing.assert_allclose(found[0], wanted[f"{name}_embeds"], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(found[1], wanted[f"text_{name}_embeds"], atol=1e-5, rtol=1e-4)
    assert not np.allclose(np.linalg.norm(found[0], axis=1), 1, atol=0.05)  # the library leaves their length
    assert np.abs(found[0][0] - found[0][1]).max() > 1e-3
    theirs = wanted[f"logits_{name}_text"]  # of pairs alone: in a batch the library's codec hears the padding
    torch.testing.assert_close(
        logits(ours.temperature("default"), *found).diagonal(), theirs[:, 0], atol=1e-4, rtol=1e-4
    )
    ours.save_pretrained(tmp_path / "again")
    again = mmrep.load(tmp_path / "again")
    np.testing.assert_array_equal(again.encode(TEXTS, "text"), found[1])
    np.testing.assert_array_equal(again.encode({"audio": clips(), "video": VIDEOS}[name], name), found[0])


def test_audio_video_has_four_towers_and_three_temperatures(tmp_path):
    model, processor = joint_toys.pe("pe_audio_video", tmp_path)
    ours, wanted = mmrep.load(tmp_path), library(model, processor)
    assert list(ours.towers) == ["audio", "video", "text_audio", "text_video"]
    raw = {"audio": clips(), "video": VIDEOS, "text_audio": TEXTS, "text_video": TEXTS}
    found = {name: ours.encode(values, name) for name, values in raw.items()}
    for name, values in found.items():
        np.testing.assert_allclose(values, wanted[f"{name}_embeds"], atol=1e-5, rtol=1e-4, err_msg=name)
    with torch.no_grad():
        one = model(**inputs(processor, 0))  # alone, where no padding is heard
    for temperature, pair, theirs in [
        ("default", ("audio", "video"), one.logits_audio_video),
        ("text_audio", ("audio", "text_audio"), one.logits_audio_text),
        ("text_video", ("video", "text_video"), one.logits_video_text),
    ]:
        torch.testing.assert_close(
            logits(ours.temperature(temperature), *(found[name][:1] for name in pair)), theirs, atol=1e-4, rtol=1e-4
        )
    fused = component("encoders", "hf-text", path=str(tmp_path), space="audio_video").build().eval()
    with torch.no_grad():
        pooled = fused(fused.collate([fused.prepare(text) for text in TEXTS])).pooled
    torch.testing.assert_close(pooled, wanted["text_audio_video_embeds"], atol=1e-5, rtol=1e-4)


def test_tokens_layers_and_gradients_of_audio_are_the_librarys(tmp_path):
    model, processor = joint_toys.pe("pe_audio", tmp_path)
    encoder = component("encoders", "hf-audio", path=str(tmp_path)).build().eval()
    one = processor.feature_extractor(WAVES[1], sampling_rate=RATE, return_tensors="pt")["input_values"]
    theirs = model.audio_encoder(one, output_hidden_states=True)
    batch = encoder.collate([encoder.prepare(clip) for clip in clips()])
    got = encoder.encode(encoder.tokenize(batch), layers=[1, 2])
    n = theirs.last_hidden_state.shape[1]
    assert got.tokens.grid.valid.sum(1).tolist() == [51, n + 1, 2]
    torch.testing.assert_close(got.tokens.values[1:2, 1 : n + 1], theirs.last_hidden_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.layers[0][1:2, : n + 1], theirs.hidden_states[1], atol=1e-5, rtol=1e-4)
    got.pooled[1].square().sum().backward()
    model.audio_head(theirs.pooler_output).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in encoder.trunk.model.named_parameters():
        if wanted[name] is None:
            assert not parameter.requires_grad, name  # the codec
        else:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-3, msg=name)
    bare = component("encoders", "hf-audio", path=str(tmp_path), projection=False).build().eval()
    with torch.no_grad():
        torch.testing.assert_close(bare(batch).pooled[1:2], theirs.pooler_output, atol=1e-5, rtol=1e-4)
    assert encoder({name: value[:0] for name, value in batch.items()}).pooled.shape == (0, 20)


def test_tokens_layers_and_gradients_of_video_are_the_librarys(tmp_path):
    model, processor = joint_toys.pe("pe_video", tmp_path)
    encoder = component("encoders", "hf-video", path=str(tmp_path), sampling="ends").build().eval()
    pixels = processor.video_processor(VIDEOS[0], return_tensors="pt")["pixel_values_videos"]
    theirs = model.video_encoder(pixels, output_hidden_states=True)
    batch = encoder.collate([encoder.prepare(VIDEOS[0])])
    got = encoder.encode(encoder.tokenize(batch), layers=[1, 2])
    torch.testing.assert_close(got.tokens.values[:, 1:], theirs.last_hidden_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.layers[0], theirs.hidden_states[1], atol=1e-5, rtol=1e-4)
    assert got.tokens.grid.shape == (4, 1, 1)
    got.pooled.square().sum().backward()
    model.video_head(theirs.pooler_output).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in encoder.model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-3, msg=name)
    seven = component("encoders", "hf-video", path=str(tmp_path), frames=7, sampling="ends").build().eval()
    want = processor.video_processor(VIDEOS[0], num_frames=7, return_tensors="pt")["pixel_values_videos"]
    with torch.no_grad():
        out = seven(seven.collate([seven.prepare(VIDEOS[0])])).tokens.values[:, 1:]
        torch.testing.assert_close(out, model.video_encoder(want).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_what_is_no_tower_says_why(tmp_path):
    joint_toys.pe("pe_audio_video", tmp_path)
    with pytest.raises(ValueError, match="space=None; its texts have audio, video, audio_video"):
        component("encoders", "hf-text", path=str(tmp_path)).build()
    joint_toys.pe("pe_audio", tmp_path / "frames")
    path = tmp_path / "frames" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["PeAudioFrameLevelModel"]}))
    with pytest.raises(ValueError, match="no embedding of a whole clip"):
        mmrep.load(tmp_path / "frames")


def test_a_scale_of_zero_is_of_an_untrained_model(tmp_path):
    model, _ = joint_toys.pe("pe_audio", tmp_path)
    with torch.no_grad():
        model.text_audio_logit_scale.zero_()
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelFolderError, match="text_audio_logit_scale is 0, and a scale is above 0"):
        mmrep.load(tmp_path)
