"""Encoders of torchaudio's bundles equal the library's own models, on tiny bundles put among its pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
from safetensors.torch import save_file
from torchaudio.pipelines._wav2vec2 import impl, utils

import mmrep
from mmrep import BadSampleError
from mmrep.config import ConfigError, component
from mmrep.hub.fetch import ModelFolderError
from mmrep.modalities.audio._signals import signal
from mmrep.modalities.audio._torchaudio_wave import made_of_bundle
from mmrep.modalities.audio.torchaudio import TorchaudioEncoder
from mmrep.testing import check_encoder

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
BASE = {
    "extractor_mode": "group_norm", "extractor_conv_layer_config": [(8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 2, 2)],
    "extractor_conv_bias": False, "encoder_embed_dim": 16, "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 8, "encoder_pos_conv_groups": 2, "encoder_num_layers": 2, "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.1, "encoder_ff_interm_features": 24, "encoder_ff_interm_dropout": 0.1,
    "encoder_dropout": 0.1, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.5, "aux_num_out": None,
}  # fmt: skip
LARGE = {**BASE, "extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True}
WAVLM = {"encoder_max_distance": 20, "encoder_num_buckets": 16}
KINDS = {
    "TINY_BASE": ("Wav2Vec2", BASE, False),
    "TINY_LARGE": ("Wav2Vec2", LARGE, True),
    "TINY_WAVLM": ("WavLM", {**BASE, **WAVLM}, False),
    "TINY_WAVLM_LARGE": ("WavLM", {**LARGE, **WAVLM}, True),
    "TINY_ASR": ("Wav2Vec2", {**BASE, "aux_num_out": 5}, False),
}


@pytest.fixture(autouse=True)
def bundles(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """Tiny bundles among the library's; what it would download is a random state, by the name of the file."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, (kind, params, normalize) in KINDS.items():
        fields = {"_path": f"{name}.pth", "_params": params, "_sample_rate": 8000, "_normalize_waveform": normalize,
                  "_model_type": kind}  # fmt: skip
        asr = name == "TINY_ASR"
        bundle = impl.Wav2Vec2ASRBundle(**fields, _labels=("a", "b")) if asr else impl.Wav2Vec2Bundle(**fields)
        monkeypatch.setattr(torchaudio.pipelines, name, bundle, raising=False)
        torch.manual_seed(0)
        model = utils._get_model(kind, params)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        states[f"{name}.pth"] = model.state_dict()

    def downloaded(path: str, options: Any, remove_axes: Any = None) -> dict[str, torch.Tensor]:
        assert options is None or options == {"map_location": "cpu", "weights_only": True, "progress": False}
        return dict(states[path])

    monkeypatch.setattr(utils, "_get_state_dict", downloaded)
    return states


def build(name: str, **fields: Any) -> TorchaudioEncoder:
    return component("encoders", "torchaudio", bundle=name, **{"download": True, **fields}).build().eval()


def library(name: str) -> Any:
    """The library's own model, standardising included, without its letters."""
    model = getattr(torchaudio.pipelines, name).get_model()
    getattr(model, "model", model).aux = None
    return model


def clips(seconds: tuple[float, ...] = (0.3, 0.55, 0.1)) -> list[np.ndarray]:
    kinds = ("noise", "chirp", "tone")
    return [
        0.1 + signal(kinds[i % 3], int(s * 8000) + i, i).astype(np.float32) / (1 << 15) for i, s in enumerate(seconds)
    ]


def run(encoder: TorchaudioEncoder, waves: list[np.ndarray], layers: tuple[int, ...] = ()) -> Any:
    inputs = encoder.collate([encoder.prepare((wave, 8000)) for wave in waves])
    with torch.no_grad():
        return encoder.encode(encoder.tokenize(inputs), layers=layers)


@pytest.mark.parametrize("name", KINDS)
def test_contract(name: str):
    check_encoder(build(name))


@pytest.mark.parametrize("name", KINDS)
def test_clips_of_a_padded_batch_are_what_the_library_makes_of_each(name: str):
    model, waves = library(name), clips()
    out = run(build(name), waves, layers=(2, 1))
    assert not bool(out.tokens.grid.valid.all())
    for i, wave in enumerate(waves):
        with torch.no_grad():
            want, _ = model(torch.from_numpy(wave)[None])
            layers, _ = model.extract_features(torch.from_numpy(wave)[None])
        n = want.shape[1]
        assert out.tokens.grid.valid[i].sum() == n
        torch.testing.assert_close(out.tokens.values[i, :n], want[0], **CLOSE)
        torch.testing.assert_close(out.layers[0][i, :n], layers[1][0], **CLOSE)
        torch.testing.assert_close(out.layers[1][i, :n], layers[0][0], **CLOSE)
        assert want.std() > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_is_the_librarys(name: str):
    model, [wave, *_] = library(name).bfloat16(), clips()
    got = run(build(name).bfloat16(), [wave]).tokens.values
    inner = getattr(model, "model", model)
    values = torch.from_numpy(wave)[None]
    if inner is not model:  # ours is standardised in float32
        values = torch.nn.functional.layer_norm(values, values.shape)
    with torch.no_grad():
        want, _ = inner(values.bfloat16())
    assert got.dtype == torch.bfloat16
    # Our GroupNorm is in float32 and rounded once, theirs is torch's.
    torch.testing.assert_close(got, want, atol=0.05 * float(want.abs().max()), rtol=0)


def test_a_masked_batch_of_the_library_is_ours_where_nothing_depends_on_padding(monkeypatch: pytest.MonkeyPatch):
    """Layer norms and no standardising: then the library's padded batch is right, too."""
    bundle = torchaudio.pipelines.TINY_LARGE
    monkeypatch.setattr(bundle, "_normalize_waveform", False)
    inputs = build("TINY_LARGE").collate([build("TINY_LARGE").prepare((wave, 8000)) for wave in clips()])
    with torch.no_grad():
        want, lengths = library("TINY_LARGE")(inputs["wave"][:, 0], inputs["lengths"])
        got = build("TINY_LARGE")(inputs).tokens
    assert got.grid.valid.sum(1).tolist() == lengths.tolist()
    torch.testing.assert_close(got.values[got.grid.valid], want[got.grid.valid], **CLOSE)


@pytest.mark.parametrize("name", ["TINY_BASE", "TINY_WAVLM"])
def test_gradients_are_the_librarys(name: str):
    encoder, model, [wave, *_] = build(name), library(name), clips()
    model(torch.from_numpy(wave)[None])[0].square().sum().backward()
    encoder(encoder.collate([encoder.prepare((wave, 8000))])).tokens.values.square().sum().backward()
    theirs = dict(model.named_parameters())
    for key, parameter in encoder.trunk.model.named_parameters():
        want = theirs[key].grad
        torch.testing.assert_close(parameter.grad, want, atol=1e-4 * float(want.abs().max() + 1), rtol=1e-2, msg=key)


@pytest.mark.parametrize("name", ["TINY_BASE", "TINY_WAVLM_LARGE"])
def test_a_dropped_frame_leaves_no_trace(name: str):
    encoder = build(name)
    inputs = encoder.collate([encoder.prepare((wave, 8000)) for wave in clips((0.3, 0.4))])
    tokens = encoder.tokenize(inputs)
    keep = torch.arange(0, 40, 2).expand(2, -1)
    before = encoder.encode(tokens, keep=keep).tokens.values
    tokens.values[:, 1::2] += 3.0
    torch.testing.assert_close(encoder.encode(tokens, keep=keep).tokens.values, before)
    tokens.values[:, 0, ::2] += 3.0
    assert (encoder.encode(tokens, keep=keep).tokens.values - before).abs().max() > 1e-2


def test_wavlm_keeps_the_distances_between_kept_frames():
    encoder = build("TINY_WAVLM")
    attention, seen = encoder.trunk.model.encoder.transformer.layers[1].attention, []
    inner = attention.forward
    attention.forward = lambda x, **k: seen.append(k["position_bias"]) or inner(x, **k)
    inputs = encoder.collate([encoder.prepare((wave, 8000)) for wave in clips((0.3, 0.4))])
    encoder.encode(encoder.tokenize(inputs), keep=torch.tensor([[0, 10, 20], [3, -1, 4]]))
    full = encoder.trunk.model.encoder.transformer.layers[0].attention.compute_bias(30, 30)
    torch.testing.assert_close(seen[0][0], full[:, [0, 10, 20]][:, :, [0, 10, 20]])
    torch.testing.assert_close(seen[0][1, :, 0, 2], full[:, 3, 4])


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_weights_come_from_a_local_file(suffix: str, bundles: dict[str, Any], tmp_path: Path):
    path, state = tmp_path / f"weights{suffix}", bundles["TINY_ASR.pth"]
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    local = build("TINY_ASR", weights=str(path), download=False)
    assert torch.equal(run(local, clips()).tokens.values, run(build("TINY_ASR"), clips()).tokens.values)
    assert not any("aux" in key for key in local.state_dict())


def test_other_weights_are_refused(bundles: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match=r"TINY_BASE.pth.* nothing is downloaded unasked: set weights"):
        build("TINY_BASE", download=False)
    with pytest.raises(ConfigError, match="not both"):
        build("TINY_BASE", weights="here.pt")
    with pytest.raises(ValueError, match="there is no file"):
        build("TINY_BASE", weights=str(tmp_path / "no.pt"), download=False)
    torch.save({"state": Path}, tmp_path / "program.pt")  # a class: reading it would look it up, and could run it
    with pytest.raises(ValueError, match="could run any program, so it is refused"):
        build("TINY_BASE", weights=str(tmp_path / "program.pt"), download=False)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict of tensors, but list"):
        build("TINY_BASE", weights=str(tmp_path / "list.pt"), download=False)
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"allowed are .safetensors, .pt, .pth"):
        build("TINY_BASE", weights=str(tmp_path / "weights.npz"), download=False)
    torch.save(bundles["TINY_LARGE.pth"], tmp_path / "large.pt")
    with pytest.raises(ValueError, match="do not fit bundle 'TINY_BASE'"):
        build("TINY_BASE", weights=str(tmp_path / "large.pt"), download=False)


def test_names_that_are_no_bundle_of_these_networks():
    with pytest.raises(ValueError, match=r"has no wav2vec 2.0.*did you mean 'WAV2VEC2_BASE'"):
        build("WAV2VEC_BASE")
    with pytest.raises(ValueError, match=r"has no wav2vec 2\.0"):
        build("HDEMUCS_HIGH_MUSDB")


@pytest.mark.parametrize(("name", "width", "depth", "normalize"), [
    ("WAV2VEC2_BASE", 768, 12, False), ("HUBERT_LARGE", 1024, 24, True), ("WAVLM_BASE_PLUS", 768, 12, False),
    ("WAV2VEC2_ASR_LARGE_LV60K_960H", 1024, 24, True), ("MMS_FA", 1024, 24, True),
])  # fmt: skip
def test_the_librarys_bundles_are_known_without_their_weights(name: str, width: int, depth: int, normalize: bool):
    made_of = made_of_bundle(getattr(torchaudio.pipelines, name))
    assert (made_of.options["encoder_embed_dim"], made_of.options["encoder_num_layers"]) == (width, depth)
    assert (made_of.sampling_rate, made_of.normalize) == (16_000, normalize)
    assert made_of.options["aux_num_out"] is None


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_model_needs_no_weights_and_no_bundle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoder = build(name)
    encoder.save_files(tmp_path)
    monkeypatch.delattr(torchaudio.pipelines, name)
    again = TorchaudioEncoder(component("encoders", "torchaudio", bundle=name).config, files=tmp_path).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(run(again, clips()).tokens.values, run(encoder, clips()).tokens.values)
    assert [p.name for p in tmp_path.iterdir()] == ["torchaudio.json"]


def test_other_rates_are_converted_and_too_short_is_refused():
    encoder = build("TINY_BASE")
    assert encoder.prepare((np.zeros(4410), 44_100))["wave"].shape == (1, 800)
    least = encoder.trunk.shortest
    encoder.prepare((np.zeros(least), 8000))
    with pytest.raises(BadSampleError, match="too short"):
        encoder.prepare((np.zeros(least - 1), 8000))
    assert build("TINY_BASE", max_seconds=0.2).prepare((np.zeros(8000), 8000))["wave"].shape == (1, 1600)


def test_the_bridge_is_the_mean_of_the_librarys_tokens(tmp_path: Path, bundles: dict[str, dict[str, torch.Tensor]]):
    wave = clips((0.4,))[0]
    with torch.no_grad():
        wanted = library("TINY_BASE")(torch.from_numpy(wave)[None])[0].mean(1)
    torch.save(bundles["TINY_BASE.pth"], tmp_path / "weights.pt")
    for name in ("torchaudio:TINY_BASE", f"torchaudio:TINY_BASE/{tmp_path}/weights.pt"):
        found = mmrep.load(name).encode([{"array": wave, "sampling_rate": 8000}])
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(ModelFolderError, match="did you mean 'TINY_BASE'"):
        mmrep.load("torchaudio:TINI_BASE")
