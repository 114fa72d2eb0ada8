"""Hugging Face video models: equal to the library's own call, processor and model, on random checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from video_files import numbered, textured
from video_tiny_hf import KINDS, make, save

from mmrep.config import ConfigError, component
from mmrep.modalities.video.hf import HFVideo
from mmrep.tokens import Tokens


def build(folder: Path, **fields) -> HFVideo:
    return component("encoders", "hf-video", path=str(folder), local_files_only=True, **fields).build().eval()


@torch.no_grad()
def library(model, processor, frames: np.ndarray) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Last hidden state, layers and pooled, as a transformers user gets them."""
    inputs = processor([frames], return_tensors="pt")
    only_encoder = {"skip_predictor": True} if type(model).__name__ == "VJEPA2Model" else {}
    out = model(**inputs, output_hidden_states=True, return_dict=True, **only_encoder)
    return out.last_hidden_state, out.hidden_states, getattr(out, "pooler_output", None)


def time_first(values: torch.Tensor, times: int) -> torch.Tensor:
    """TimeSformer's tokens run through time at each place."""
    cells = values[:, 1:].unflatten(1, (-1, times)).transpose(1, 2).flatten(1, 2)
    return torch.cat([values[:, :1], cells], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_layers_are_the_librarys(kind: str, tmp_path: Path):
    model, processor = save(kind, tmp_path)
    encoder = build(tmp_path, pooler=kind == "vivit")
    frames = textured(4, 45, 33)
    want, layers, pooled = library(model, processor, frames)
    inputs = encoder.collate([encoder.prepare(frames), encoder.prepare(textured(4, 24, 50))])
    with torch.no_grad():
        got = encoder(inputs)
        asked = encoder.encode(encoder.tokenize(inputs), layers=[1, 2]).layers
    order = (lambda v: time_first(v, 4)) if kind == "timesformer" else (lambda v: v)
    torch.testing.assert_close(got.tokens.values[:1], order(want), atol=2e-5, rtol=1e-4)
    for ours, theirs in zip(asked, layers[1:], strict=True):
        torch.testing.assert_close(ours[:1], order(theirs), atol=2e-5, rtol=1e-4)
    assert want.std() > 0.1
    if kind == "vivit":
        torch.testing.assert_close(got.pooled[:1], pooled, atol=1e-5, rtol=1e-4)
    else:
        assert got.pooled is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_librarys(kind: str, tmp_path: Path):
    model, processor = save(kind, tmp_path)
    encoder = build(tmp_path)
    frames = textured(4, 45, 33)
    only_encoder = {"skip_predictor": True} if kind == "vjepa2" else {}
    want = model(**processor([frames], return_tensors="pt"), **only_encoder).last_hidden_state
    got = encoder(encoder.collate([encoder.prepare(frames)])).tokens.values
    (want.square().sum()).backward()
    (got.square().sum()).backward()
    theirs = dict((model.encoder if kind == "vjepa2" else model).named_parameters())
    for name, parameter in encoder.model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["videomae", "vjepa2", "vivit", "timesformer"])
def test_the_grid_says_where_tokens_are(kind: str, tmp_path: Path):
    """Only the tubelet whose pixels change has another embedding."""
    save(kind, tmp_path)
    encoder = build(tmp_path)
    inputs = encoder.collate([encoder.prepare(textured(4, 16, 16))])
    plain = encoder.tokenize(inputs)
    depth = 1 if kind == "timesformer" else 2
    assert plain.grid.shape == (4 // depth, 2, 2)
    special = int(plain.grid.special[0].sum())
    assert special == (1 if kind in ("timesformer", "vivit") else 0)
    for n in range(special, plain.values.shape[1]):
        time, row, column = plain.grid.coords[0, n].int().tolist()
        frames = inputs["frames"].clone()
        frames[:, time * depth, :, row * 8 + 3, column * 8 + 3] ^= 255
        changed = (encoder.tokenize({**inputs, "frames": frames}).values - plain.values).abs().amax(2)[0] > 1e-6
        assert changed.nonzero().flatten().tolist() == [n]


def test_v_jepas_kept_tokens_know_their_places(tmp_path: Path):
    """The same as the library's layers with its own position mask."""
    model, _ = save("vjepa2", tmp_path)
    encoder = build(tmp_path)
    tokens = encoder.tokenize(encoder.collate([encoder.prepare(textured(4, 45, 33))]))
    keep = torch.tensor([[6, 1, 3]])
    with torch.no_grad():
        got = encoder.encode(tokens, keep).tokens.values
        values = tokens.values[:, keep[0]]
        for layer in model.encoder.layer:
            values = layer(values, keep)[0]
        torch.testing.assert_close(got, model.encoder.layernorm(values), atol=1e-5, rtol=1e-4)
        moved = encoder.encode(Tokens(tokens.values, tokens.grid), torch.tensor([[6, 1, 3, -1]])).tokens
    torch.testing.assert_close(moved.values[:, :3], got)
    assert moved.grid.valid[0].tolist() == [True, True, True, False]


def test_samples_of_different_numbers_of_kept_tokens_do_not_meet(tmp_path: Path):
    save("videomae", tmp_path)
    encoder = build(tmp_path)
    tokens = encoder.tokenize(encoder.collate([encoder.prepare(textured(4)), encoder.prepare(numbered(9))]))
    with torch.no_grad():
        both = encoder.encode(tokens, torch.tensor([[0, 5, -1], [2, 3, 7]]), layers=[1])
        one = encoder.tokenize(encoder.collate([encoder.prepare(textured(4))]))
        first = encoder.encode(one, torch.tensor([[0, 5]]), layers=[1])
    torch.testing.assert_close(both.tokens.values[:1, :2], first.tokens.values)
    torch.testing.assert_close(both.layers[0][:1, :2], first.layers[0])


def test_a_view_sees_and_gives_floats_in_0_to_1(tmp_path: Path):
    save("vivit", tmp_path)  # its processor rescales to -1..1 first
    encoder = build(tmp_path)
    inputs = encoder.collate([encoder.prepare(textured(4))])
    assert inputs["frames"].dtype == torch.uint8
    floats = {**inputs, "frames": inputs["frames"].float() / 255}
    torch.testing.assert_close(encoder.tokenize(floats).values, encoder.tokenize(inputs).values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["videomae", "timesformer"])
def test_checkpoints_with_an_image_processors_config_are_read(kind: str, tmp_path: Path):
    """As on the hub: the file is named and says that it is of an image processor."""
    _, processor = save(kind, tmp_path)
    (tmp_path / "video_preprocessor_config.json").unlink()
    old = {"image_processor_type": "VideoMAEImageProcessor", "image_mean": [0.2, 0.3, 0.4],
           "image_std": [0.5, 0.6, 0.7], "size": {"shortest_edge": 20},
           "crop_size": {"height": 16, "width": 16}}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    encoder = build(tmp_path)
    processor.image_mean, processor.image_std = old["image_mean"], old["image_std"]
    frames = textured(4, 45, 33)
    want = processor([frames], return_tensors="pt")["pixel_values"]
    got = encoder.normalize(encoder.collate([encoder.prepare(frames)])["frames"])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_the_saved_model_needs_nothing_but_its_files(tmp_path: Path):
    place, files = tmp_path / "checkpoint", tmp_path / "files"
    files.mkdir()
    _, processor = make("videomae")
    processor.image_mean = [0.9, 0.1, 0.2]
    save("videomae", place)
    processor.save_pretrained(place)
    encoder = build(place)
    encoder.save_files(files)
    for path in place.iterdir():
        path.unlink()
    again = HFVideo(encoder.config, files=files).eval()
    again.load_state_dict(encoder.state_dict())
    inputs = encoder.collate([encoder.prepare(textured(4))])
    assert torch.equal(again(again.collate([again.prepare(textured(4))])).tokens.values, encoder(inputs).tokens.values)
    assert tuple(again.processor.image_mean) == (0.9, 0.1, 0.2)


def test_short_videos_are_filled_up_and_other_lengths_are_for_v_jepa(tmp_path: Path):
    save("vjepa2", tmp_path / "vjepa2")
    save("videomae", tmp_path / "videomae")
    longer = build(tmp_path / "vjepa2", frames=6)
    assert longer(longer.collate([longer.prepare(textured(3))])).tokens.grid.shape == (3, 2, 2)
    with pytest.raises(ValueError, match=r"frames=5: .* reads frames by 2"):
        build(tmp_path / "vjepa2", frames=5)
    with pytest.raises(ValueError, match=r"frames=8: .* reads exactly 4 frames"):
        build(tmp_path / "videomae", frames=8)
    with pytest.raises(ConfigError, match="short='mask'"):
        build(tmp_path / "vjepa2", short="mask")


def test_other_checkpoints_are_refused(tmp_path: Path):
    import transformers as hf

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    hf.ViTModel(hf.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="'vit' model is no video model that hf-video knows: videomae, vjepa2"):
        build(tmp_path / "vit")
    config = hf.TimesformerConfig(**sizes, image_size=16, patch_size=8, num_frames=4, attention_type="space_only")
    hf.TimesformerModel(config).save_pretrained(tmp_path / "space")
    with pytest.raises(ValueError, match="use video-frames"):
        build(tmp_path / "space")
    save("videomae", tmp_path / "mae")
    with pytest.raises(ValueError, match="pooler is asked for"):
        build(tmp_path / "mae", pooler=True)


def test_learned_positions_and_class_tokens_do_not_decay(tmp_path: Path):
    save("timesformer", tmp_path)
    names = {"cls_token", "position_embeddings", "time_embeddings"}
    assert build(tmp_path).no_weight_decay() == {f"model.embeddings.{name}" for name in names}
