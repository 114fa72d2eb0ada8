"""Hugging Face audio encoders equal transformers' own calls: feature extractor, then model, on ragged clips."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from audio_tiny_hf import KINDS, WAVES, make

from mmrep import BadSampleError
from mmrep.config import component
from mmrep.modalities.audio._signals import signal
from mmrep.modalities.audio.hf import HFAudio
from mmrep.testing import check_encoder

Folder = Callable[[str], Path]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
IDLE = "fuses clips longer than the window; the examples are shorter"
NO_GRADIENT = {"clap-fused": {"*.fusion_model.*": IDLE, "*.mel_conv2d.*": IDLE}}


def build(path: object, **fields: Any) -> HFAudio:
    return component("encoders", "hf-audio", path=str(path), **fields).build().eval()


def clips(rate: int, seconds: tuple[float, ...] = (0.3, 0.55, 0.1)) -> list[np.ndarray]:
    """Ragged float32 clips at the model's own rate, so that nothing is resampled on the way."""
    kinds = ("noise", "chirp", "tone")
    return [signal(kinds[i % 3], int(s * rate) + i, i).astype(np.float32) / (1 << 15) for i, s in enumerate(seconds)]


def run(encoder: HFAudio, waves: list[np.ndarray], layers: tuple[int, ...] = ()) -> Any:
    rate = encoder.preprocess.sampling_rate
    inputs = encoder.collate([encoder.prepare((wave, rate)) for wave in waves])
    with torch.no_grad():
        return encoder.encode(encoder.tokenize(inputs), layers=layers)


def library(folder: Path, waves: list[np.ndarray], cls: Any = transformers.AutoModel, **options: Any) -> Any:
    """What a user of transformers writes."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    inputs = extractor(waves, sampling_rate=extractor.sampling_rate, return_tensors="pt", **options)
    model = cls.from_pretrained(folder).eval()
    if isinstance(model, transformers.WhisperModel):
        model = model.get_encoder()
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True)


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str, hf_audio_folder: Folder):
    check_encoder(build(hf_audio_folder(kind)), n=4, no_gradient=NO_GRADIENT.get(kind))


@pytest.mark.parametrize("kind", ["ast", "whisper"])
def test_contract_with_counted_padding(kind: str, hf_audio_folder: Folder):
    """Every token is valid then, so that keep of all tokens is compared with no keep."""
    encoder = build(hf_audio_folder(kind), count_padding=True, int16=True, normalize="peak", max_seconds=0.4)
    check_encoder(encoder, n=4)
    assert run(encoder, clips(16_000)).tokens.grid.shape is not None


@pytest.mark.parametrize("kind", [kind for kind in WAVES if kind.endswith("large")])
def test_models_with_masks_equal_the_librarys_padded_batch(kind: str, hf_audio_folder: Folder):
    waves = clips(16_000)
    expected = library(hf_audio_folder(kind), waves, padding=True)
    encoder = build(hf_audio_folder(kind))
    out = run(encoder, waves, layers=(1,))
    valid = out.tokens.grid.valid
    assert valid.sum(1).tolist() == [encoder.trunk.frames(torch.tensor(len(w))) for w in waves]
    torch.testing.assert_close(out.tokens.values[valid], expected.last_hidden_state[valid], **CLOSE)
    torch.testing.assert_close(out.layers[0][valid], expected.hidden_states[1][valid], **CLOSE)


@pytest.mark.parametrize("kind", WAVES)
def test_waves_in_a_batch_equal_the_library_alone(kind: str, hf_audio_folder: Folder):
    """The base sizes normalise over time, so that padding changes what the library itself makes of a batch."""
    waves = clips(16_000)
    out = run(build(hf_audio_folder(kind)), waves, layers=(1, 2))
    for i, wave in enumerate(waves):
        expected = library(hf_audio_folder(kind), [wave])
        n = expected.last_hidden_state.shape[1]
        assert out.tokens.grid.valid[i].sum() == n
        torch.testing.assert_close(out.tokens.values[i, :n], expected.last_hidden_state[0], **CLOSE)
        torch.testing.assert_close(out.layers[0][i, :n], expected.hidden_states[1][0], **CLOSE)


def test_padding_changes_the_librarys_own_base_models(hf_audio_folder: Folder):
    """Why we do not follow its padded batch there."""
    waves = clips(16_000)
    batch = library(hf_audio_folder("wav2vec2"), waves, padding=True).last_hidden_state
    alone = library(hf_audio_folder("wav2vec2"), waves[2:]).last_hidden_state
    assert (batch[2, : alone.shape[1]] - alone[0]).abs().max() > 0.01


def test_standardising_is_the_extractors(hf_audio_folder: Folder):
    """On a clip with an offset, and not at all where the extractor says so."""
    loud = [0.2 + 0.01 * wave for wave in clips(16_000)]
    out = run(build(hf_audio_folder("hubert")), loud)
    expected = library(hf_audio_folder("hubert"), loud[:1]).last_hidden_state
    torch.testing.assert_close(out.tokens.values[:1, : expected.shape[1]], expected, **CLOSE)
    assert not build(hf_audio_folder("wavlm")).extractor.do_normalize


@pytest.mark.parametrize(("kind", "cls"), [("ast", transformers.ASTModel), ("whisper", transformers.WhisperModel)])
def test_spectrogram_models_equal_the_librarys_batch(kind: str, cls: Any, hf_audio_folder: Folder):
    waves = clips(16_000, (0.3, 0.55, 0.1, 0.9))
    expected = library(hf_audio_folder(kind), waves, cls)
    out = run(build(hf_audio_folder(kind)), waves, layers=(1, 2))
    torch.testing.assert_close(out.tokens.values, expected.last_hidden_state, **CLOSE)
    torch.testing.assert_close(out.layers[0], expected.hidden_states[1], **CLOSE)
    if kind == "ast":
        torch.testing.assert_close(out.pooled, expected.pooler_output, **CLOSE)


def test_ast_marks_the_patches_of_the_clip(hf_audio_folder: Folder):
    """28 frames of 0.3 s; patches begin every 6 frames at 0, 6, …, 24: five of the ten times, in five bands."""
    encoder = build(hf_audio_folder("ast"))
    grid = run(encoder, clips(16_000, (0.3, 1.0))).tokens.grid
    assert grid.special[0].sum() == 2
    valid = grid.valid[0, 2:].view(5, 10)
    assert valid.tolist() == [[True] * 5 + [False] * 5] * 5
    assert bool(grid.valid[1].all())
    coords = grid.coords[0, 2:].view(5, 10, 2)
    torch.testing.assert_close(coords[2, 1], torch.tensor([15.5, 0.1075]))
    regular = run(encoder, clips(16_000, (1.0, 2.0))).tokens.grid
    assert regular.shape == (5, 10)
    assert run(build(hf_audio_folder("ast"), count_padding=True), clips(16_000, (0.3,))).tokens.grid.shape == (5, 10)


def test_whisper_marks_the_frames_of_the_clip(hf_audio_folder: Folder):
    encoder = build(hf_audio_folder("whisper"))
    grid = run(encoder, clips(16_000, (0.3, 0.101, 3.0))).tokens.grid
    assert grid.valid.sum(1).tolist() == [15, 6, 50]  # 30 and 11 frames of 10 ms, halved upwards
    torch.testing.assert_close(grid.coords[0, :3, 0], torch.tensor([0.0, 0.02, 0.04]))


@pytest.mark.parametrize("projection", [True, False])
def test_clap_equals_the_librarys_batch(projection: bool, hf_audio_folder: Folder):
    waves = clips(48_000, (0.3, 0.55, 0.1, 0.9))
    expected = library(hf_audio_folder("clap"), waves, transformers.ClapAudioModelWithProjection)
    encoder = build(hf_audio_folder("clap"), projection=projection)
    out = run(encoder, waves)
    maps = expected.last_hidden_state
    torch.testing.assert_close(out.tokens.values, maps.flatten(2).mT, **CLOSE)
    assert out.tokens.grid.shape == tuple(maps.shape[2:])
    if projection:
        torch.testing.assert_close(out.pooled, expected.audio_embeds, **CLOSE)
        assert encoder.pooled_width == 12
    else:
        torch.testing.assert_close(out.pooled, maps.mean((2, 3)), **CLOSE)
        assert encoder.pooled_width == encoder.width == 16


def test_clap_reads_the_beginning_of_a_long_clip(hf_audio_folder: Folder, monkeypatch):
    [wave] = clips(48_000, (1.7,))
    monkeypatch.setattr(np.random, "randint", lambda low, high: 0)
    expected = library(hf_audio_folder("clap"), [wave], transformers.ClapAudioModelWithProjection)
    torch.testing.assert_close(run(build(hf_audio_folder("clap")), [wave]).pooled, expected.audio_embeds, **CLOSE)


def test_fused_clap_reads_the_middle_of_each_third_of_a_long_clip(hf_audio_folder: Folder, monkeypatch):
    waves = clips(48_000, (1.7, 0.4, 3.1, 1.004))
    monkeypatch.setattr(np.random, "choice", lambda places: places[len(places) // 2])
    expected = library(hf_audio_folder("clap-fused"), waves, transformers.ClapAudioModelWithProjection)
    encoder = build(hf_audio_folder("clap-fused"))
    monkeypatch.setattr(np.random, "choice", lambda places: pytest.fail("drew a random number"))
    monkeypatch.setattr(np.random, "randint", lambda *a: pytest.fail("drew a random number"))
    torch.testing.assert_close(run(encoder, waves).pooled, expected.audio_embeds, **CLOSE)
    inputs = encoder.collate([encoder.prepare((wave, 48_000)) for wave in waves])
    assert inputs["longer"].tolist() == [[True], [False], [True], [False]]
    rows = run(encoder, waves[1:2])
    torch.testing.assert_close(rows.pooled[0], expected.audio_embeds[1], **CLOSE)
    encoder.train()
    encoder(inputs).pooled.square().sum().backward()
    fused = [p for name, p in encoder.named_parameters() if "fusion_model" in name or "mel_conv2d" in name]
    assert all(p.grad is not None for p in fused)
    assert sum(bool(p.grad.abs().sum() > 0) for p in fused) > len(fused) / 2


def test_fused_clap_without_a_long_clip_still_reaches_every_parameter(hf_audio_folder: Folder):
    """With zeros: processes that share gradients would wait for those of an unused parameter."""
    encoder = build(hf_audio_folder("clap-fused")).train()
    inputs = encoder.collate([encoder.prepare((wave, 48_000)) for wave in clips(48_000)])
    encoder(inputs).pooled.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_16_bits_are_those_of_claps_authors(hf_audio_folder: Folder):
    """int16 to float of float to int16: ``x.clip(-1, 1) * 32767`` cut to int16, over 32767 (numpy)."""
    wave = np.float32([0.5, -0.25, 1e-5, 3e-5, -3e-5, 1.5, -2.0, 0.1] * 100)
    expected = ((np.clip(wave, -1, 1) * 32767.0).astype(np.int16) / 32767.0).astype(np.float32)
    got = build(hf_audio_folder("wav2vec2"), int16=True).prepare((wave, 16_000))["wave"][0].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_other_rates_and_stereo_are_converted(kind: str, hf_audio_folder: Folder):
    encoder = build(hf_audio_folder(kind))
    rate = 48_000 if kind.startswith("clap") else 16_000
    assert encoder.preprocess.sampling_rate == rate
    t = np.arange(11_025) / 22_050
    sound = 0.4 * np.sin(2 * np.pi * 500 * t)
    stereo = encoder.prepare((np.stack([2 * sound, 0 * sound]), 22_050))
    mono = encoder.prepare((sound, 22_050))
    for key, value in mono.items():
        torch.testing.assert_close(stereo[key], value, rtol=1e-3, atol=1e-3)
    assert round(float(mono["seconds"]) if "seconds" in mono else mono["wave"].shape[1] / rate, 2) == 0.5


@pytest.mark.parametrize("kind", ["ast", "wav2vec2"])
def test_too_short_for_the_model(kind: str, hf_audio_folder: Folder):
    encoder = build(hf_audio_folder(kind))
    least = encoder.trunk.shortest
    encoder.prepare((np.zeros(least), 16_000))
    with pytest.raises(BadSampleError) as error:
        encoder.prepare((np.zeros(least - 1), 16_000))
    assert error.value.cause == "too short"


def test_windows_and_limits(hf_audio_folder: Folder):
    assert build(hf_audio_folder("wav2vec2")).preprocess.max_seconds == 30.0
    assert build(hf_audio_folder("wav2vec2"), max_seconds=90.0).preprocess.max_seconds == 90.0
    assert build(hf_audio_folder("whisper"), max_seconds=90.0).preprocess.max_seconds == 1.0
    assert build(hf_audio_folder("whisper"), max_seconds=0.5).preprocess.max_seconds == 0.5
    assert build(hf_audio_folder("clap-fused")).preprocess.max_seconds is None
    assert build(hf_audio_folder("clap")).preprocess.max_seconds == 1.0
    ast = build(hf_audio_folder("ast"))
    items = [ast.prepare((wave, 16_000)) for wave in clips(16_000, (0.655, 2.0))]
    assert [int(item["frames"]) for item in items] == [64, 64]


@pytest.mark.parametrize("kind", ["wav2vec2", "wavlm-large"])
def test_a_dropped_frame_leaves_no_trace(kind: str, hf_audio_folder: Folder):
    """Not even through the convolution that gives positions: other values there change nothing."""
    encoder = build(hf_audio_folder(kind))
    inputs = encoder.collate([encoder.prepare((wave, 16_000)) for wave in clips(16_000, (0.3, 0.4))])
    tokens = encoder.tokenize(inputs)
    keep = torch.arange(0, 40, 2).expand(2, -1)
    before = encoder.encode(tokens, keep=keep).tokens.values
    tokens.values[:, 1::2] += 3.0
    torch.testing.assert_close(encoder.encode(tokens, keep=keep).tokens.values, before)
    tokens.values[:, 0] += 3.0
    assert (encoder.encode(tokens, keep=keep).tokens.values - before).abs().max() > 1e-2


def test_wavlm_keeps_the_distances_between_kept_frames(hf_audio_folder: Folder):
    """Kept frames 0, 10 and 20 are ten apart in attention, and no neighbours."""
    encoder = build(hf_audio_folder("wavlm"))
    attention = encoder.trunk.model.encoder.layers[0].attention
    seen = []
    inner = attention.forward
    attention.forward = lambda hidden, **k: seen.append(k["position_bias"]) or inner(hidden, **k)
    inputs = encoder.collate([encoder.prepare((wave, 16_000)) for wave in clips(16_000, (0.3, 0.4))])
    encoder.encode(encoder.tokenize(inputs), keep=torch.tensor([[0, 10, 20], [3, -1, 4]]))
    full = attention.compute_bias(30, 30)
    bias = seen[0].view(2, 2, 3, 3)
    torch.testing.assert_close(bias[0], full[:, [0, 10, 20]][:, :, [0, 10, 20]])
    torch.testing.assert_close(bias[1, :, 0, 2], full[:, 3, 4])


def test_spec_augment_masks_what_the_model_sees(hf_audio_folder: Folder):
    view = component("views", "spec-augment", time_masks=1, mel_masks=1).build()
    seeds = torch.tensor([1, 2, 3])
    for kind in ("ast", "whisper"):
        encoder = build(hf_audio_folder(kind))
        inputs = encoder.collate([encoder.prepare((wave, 16_000)) for wave in clips(16_000)])
        out, params = view.batch(inputs, seeds)
        masked = encoder.tokenize(out).values - encoder.tokenize(inputs).values
        assert (masked.abs().amax((1, 2)) > 1e-3).all()
        nothing = {**inputs, **{key: torch.zeros_like(value) for key, value in params.items()}}
        assert torch.equal(encoder.tokenize(nothing).values, encoder.tokenize(inputs).values)
        everything = {**inputs, "mask_time": torch.tensor([[[0.0, 100.0]]]).expand(3, -1, -1)}
        blank = {**inputs, "features": torch.zeros_like(inputs["features"])}
        assert torch.equal(encoder.tokenize({**everything, "mask_mel": params["mask_mel"]}).values,
                           encoder.tokenize(blank).values)  # fmt: skip
    for kind in ("wav2vec2", "clap"):
        encoder = build(hf_audio_folder(kind))
        inputs = encoder.collate([encoder.prepare((wave, encoder.preprocess.sampling_rate)) for wave in clips(48_000)])
        with pytest.raises(ValueError, match="spec-augment masks a spectrogram"):
            encoder(view.batch(inputs, seeds)[0])


def test_waveform_augmentation_reaches_every_family(hf_audio_folder: Folder):
    seeds = torch.tensor([1, 2, 3])
    device = component("views", "audio-augment").build()
    loader = component("views", "audio-augment", level="sample").build()
    for kind in ("wav2vec2", "ast"):
        encoder = build(hf_audio_folder(kind))
        items = [encoder.prepare((wave, 16_000), view=loader, seed=i) for i, wave in enumerate(clips(16_000))]
        plain = [encoder.prepare((wave, 16_000)) for wave in clips(16_000)]
        key = "wave" if kind == "wav2vec2" else "features"
        assert all(a[key].shape != b[key].shape or (a[key] - b[key]).abs().max() > 1e-3
                   for a, b in zip(items, plain, strict=True))  # fmt: skip
        inputs = encoder.collate(plain)
        if kind == "wav2vec2":
            changed = encoder(device.batch(inputs, seeds)[0]).tokens.values
            assert (changed - encoder(inputs).tokens.values).abs().max() > 1e-3
        else:
            with pytest.raises(ValueError, match="level: sample"):
                device.batch(inputs, seeds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_needs_no_original(kind: str, hf_audio_folder: Folder, tmp_path: Path):
    encoder = build(hf_audio_folder(kind))
    encoder.save_files(tmp_path)
    again = HFAudio(component("encoders", "hf-audio", path="/gone").config, files=tmp_path).eval()
    again.load_state_dict(encoder.state_dict())
    waves = clips(encoder.preprocess.sampling_rate)
    assert torch.equal(run(again, waves).tokens.values, run(encoder, waves).tokens.values)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "preprocessor_config.json"}


def test_refused_checkpoints(hf_audio_folder: Folder, tmp_path: Path):
    bert = tmp_path / "bert"
    transformers.BertModel(transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,
                           num_attention_heads=1, intermediate_size=8)).save_pretrained(bert)  # fmt: skip
    with pytest.raises(ValueError, match="is a 'bert' model; hf-audio knows wav2vec2, hubert, wavlm, pe_audio, "):
        build(bert)
    bare = shutil.copytree(hf_audio_folder("ast"), tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="no feature extractor"):
        build(bare)
    wrong = shutil.copytree(hf_audio_folder("ast"), tmp_path / "wrong")
    text = json.loads((wrong / "preprocessor_config.json").read_text())
    (wrong / "preprocessor_config.json").write_text(json.dumps({**text, "max_length": 99}))
    with pytest.raises(ValueError, match="99 frames of 32 bands"):
        build(wrong)
    mixed = shutil.copytree(hf_audio_folder("clap"), tmp_path / "mixed")
    shutil.copy(hf_audio_folder("clap-fused") / "preprocessor_config.json", mixed)
    with pytest.raises(ValueError, match="do not belong together"):
        build(mixed)
    adapter = tmp_path / "adapter"
    model, extractor = make("wav2vec2")
    config = model.config
    config.add_adapter = True
    transformers.Wav2Vec2Model(config).save_pretrained(adapter)
    extractor.save_pretrained(adapter)
    with pytest.raises(ValueError, match="add_adapter is not supported"):
        build(adapter)


def test_capabilities(hf_audio_folder: Folder):
    for kind in KINDS:
        encoder = build(hf_audio_folder(kind))
        full = {"tokens", "drop_tokens", "layers"}
        assert encoder.supports == ({"tokens"} if kind.startswith("clap") else full)
