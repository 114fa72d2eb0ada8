"""The recurrent speaker encoder: an independent slow twin, and Resemblyzer's own network where it is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from mmrep.config import ConfigError, component
from mmrep.modalities.audio.lstm import AudioLSTM

SMALL = {"hidden": 12, "width": 10, "depth": 2, "mels": 16, "window": 0.05, "frames": 12, "stride": 5}
RESEMBLYZER = "package:resemblyzer/pretrained.pt"


def build(**fields) -> AudioLSTM:
    torch.manual_seed(0)
    return component("encoders", "audio-lstm", **fields).build().eval()


def voice(n: int, seed: int = 0, level: float = 0.3) -> np.ndarray:
    random, at = np.random.default_rng(seed), np.arange(n) / 16_000
    hum = sum(np.sin(2 * np.pi * pitch * at + pitch) / pitch for pitch in (120, 240, 720, 2_900))
    return (level * (hum * 60 + 0.2 * random.normal(size=n)) * (1 + np.sin(5 * at))).astype(np.float32)


@torch.no_grad()
def encoded(encoder: AudioLSTM, waves: list[np.ndarray], **options):
    inputs = encoder.collate([encoder.prepare((wave, 16_000)) for wave in waves])
    return encoder.encode(encoder.tokenize(inputs), **options)


def mel_twin(wave: np.ndarray, n_fft: int = 400, mels: int = 40) -> np.ndarray:
    """The power mel spectrogram [frames, mels] of librosa, as transformers computes it in numpy: zeros outside."""
    bank = mel_filter_bank(n_fft // 2 + 1, mels, 0.0, 8_000.0, 16_000, norm="slaney", mel_scale="slaney")
    found = spectrogram(
        wave.astype(np.float64), window_function(n_fft, "hann"), n_fft, 160, n_fft, power=2.0, pad_mode="constant",
        mel_filters=bank, mel_floor=0.0,
    )  # fmt: skip
    return np.asarray(found).T


def cell(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
    """The states of one recurrent layer over rows [T, K], gate by gate."""
    state = memory = torch.zeros(weights["weight_hh_l0"].shape[1], dtype=rows.dtype)
    states = []
    for row in rows:
        gates = weights["weight_ih_l0"] @ row + weights["bias_ih_l0"]
        gates = gates + weights["weight_hh_l0"] @ state + weights["bias_hh_l0"]
        let, forget, new, out = gates.chunk(4)
        memory = forget.sigmoid() * memory + let.sigmoid() * new.tanh()
        state = out.sigmoid() * memory.tanh()
        states.append(state)
    return torch.stack(states)


def twin(encoder: AudioLSTM, wave: np.ndarray) -> tuple[Tensor, list[Tensor]]:
    """The windows' embeddings [W, D] in fp64, and each layer's last states [W, hidden]."""
    how = encoder.config
    long, stride, hop = how.frames, how.stride, 160
    count = 1
    while (len(wave) // hop + 1) - (count - 1) * stride > long:  # frames are left beyond the last window
        count += 1
    if count > 1 and (len(wave) - (count - 1) * stride * hop) / (long * hop) < how.coverage:
        count -= 1
    mel = mel_twin(np.pad(wave, (0, (count * stride + long) * hop)), round(how.window * 16_000), how.mels)
    if how.log:
        mel = np.log(np.maximum(mel, how.floor))
    found, layers = [], []
    for number in range(count):
        rows, lasts = torch.from_numpy(mel[number * stride : number * stride + long]), []
        for layer in encoder.layers:
            rows = cell({key: value.double() for key, value in layer.lstm.named_parameters()}, rows)
            lasts.append(rows[-1])
        row = (encoder.linear.weight.double() @ rows[-1] + encoder.linear.bias.double()).clamp_min(0)
        found.append(row / row.norm())
        layers.append(lasts)
    return torch.stack(found), [torch.stack(each) for each in zip(*layers, strict=True)]


# A window is 12 frames or 1,920 samples, and the next begins after 800; three quarters of one are 1,440.
LENGTHS = [1, 700, 1_920, 1_921, 2_239, 2_240, 3_039, 3_040, 8_003]


@pytest.mark.parametrize("log", [False, True])
@torch.no_grad()
def test_a_padded_batch_is_the_slow_twin_of_each_clip(log: bool):
    encoder = build(**SMALL, log=log, loudness=None)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    waves = [voice(n, n, 0.02) for n in LENGTHS]
    out = encoded(encoder, waves, layers=[2, 1])
    counts = []
    for i, wave in enumerate(waves):
        want, layers = twin(encoder, wave)
        counts.append(len(want))
        assert out.tokens.grid.valid[i].sum() == len(want)
        for got, expected in zip((out.tokens.values, *out.layers), (want, layers[1], layers[0]), strict=True):
            torch.testing.assert_close(got[i, : len(want)].double(), expected, rtol=1e-3, atol=2e-5)
        mean = want.mean(0)
        torch.testing.assert_close(out.pooled[i].double(), mean / mean.norm(), rtol=1e-3, atol=2e-5)
    assert counts == [1, 1, 1, 1, 1, 2, 2, 3, 9]


def test_coordinates_are_the_middle_of_a_window():
    grid = encoded(build(**SMALL), [voice(4_000)]).tokens.grid
    assert grid.coords[0, :2, 0].tolist() == pytest.approx([5.5 * 0.01, 10.5 * 0.01])
    assert grid.shape == (4,)


def test_a_quiet_clip_is_raised_and_a_loud_one_left():
    encoder = build(**SMALL, loudness=-30.0)
    quiet, loud = (encoder.prepare((voice(4_000, level=level), 16_000))["wave"] for level in (1e-4, 0.5))
    assert float(quiet.square().mean().sqrt()) == pytest.approx(10**-1.5, rel=1e-5)
    assert torch.equal(loud[0], torch.from_numpy(voice(4_000, level=0.5)))
    assert not encoder.prepare((np.zeros(4_000, np.float32), 16_000))["wave"].any()
    faint = encoder.prepare((voice(4_000, level=1e-9), 16_000))["wave"]
    torch.testing.assert_close(faint[0], torch.from_numpy(voice(4_000, level=1e-9)) * 1000)


def test_stereo_is_mixed_or_read_side_by_side():
    both = np.stack([voice(4_000, 1), voice(4_000, 2)])
    mono, mixed = (encoded(build(**SMALL), [wave]).pooled for wave in (both.mean(0), both))
    torch.testing.assert_close(mono, mixed)
    stereo = build(**SMALL, channels="stereo")
    assert stereo.layers[0].lstm.input_size == 32
    assert not torch.allclose(encoded(stereo, [both]).pooled, encoded(stereo, [both[::-1].copy()]).pooled)


def test_impossible_windows_and_other_networks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="stride=13 would leave frames unread"):
        component("encoders", "audio-lstm", **{**SMALL, "stride": 13})
    torch.save(theirs(build(**SMALL)), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt.* does not fit a network of this config.*hidden|size mismatch"):
        build(**{**SMALL, "hidden": 13}, checkpoint=str(tmp_path / "weights.pt"))


def theirs(encoder: AudioLSTM) -> dict[str, Tensor]:
    """The weights by the names that GE2E's implementations give them, in a file of a training run."""
    state = {key: value for key, value in encoder.state_dict().items() if key.startswith("linear")}
    for number, layer in enumerate(encoder.layers):
        state.update({f"lstm.{key[:-1]}{number}": value for key, value in layer.lstm.state_dict().items()})
    return {"step": 3, "model_state": {"similarity_weight": torch.ones(1), **state}}


def test_a_checkpoint_is_read_and_a_saved_model_needs_it_no_more(tmp_path):
    one = build(**SMALL)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)
    torch.save(theirs(one), tmp_path / "weights.pt")
    other = build(**SMALL, checkpoint=str(tmp_path / "weights.pt"))
    assert all(torch.equal(value, one.state_dict()[key]) for key, value in other.state_dict().items())
    (tmp_path / "saved").mkdir()
    other.save_files(tmp_path / "saved")
    (tmp_path / "weights.pt").unlink()
    again = AudioLSTM(other.config, files=tmp_path / "saved")
    assert again.state_dict().keys() == other.state_dict().keys()


@pytest.fixture
def resemblyzer(monkeypatch):
    """The package's own network; what it imports beside torch may be absent, and is not what is compared."""
    if find_spec("resemblyzer") is None:
        pytest.skip("Resemblyzer is not installed")
    for name in ("webrtcvad", "librosa", "scipy.ndimage.morphology"):
        try:
            __import__(name)
        except ImportError:
            stand_in: Any = ModuleType(name)
            stand_in.binary_dilation = None
            stand_in.feature = SimpleNamespace(melspectrogram=lambda *, y, **_: mel_twin(y).T)
            monkeypatch.setitem(sys.modules, name, stand_in)
    before = set(sys.modules)
    import resemblyzer

    yield resemblyzer
    for name in set(sys.modules) - before:
        if name.startswith("resemblyzer"):
            del sys.modules[name]


def test_embeddings_are_resemblyzers(resemblyzer):
    own = resemblyzer.VoiceEncoder("cpu", verbose=False)
    encoder = build(checkpoint=RESEMBLYZER)
    # Around one window of 25,600 samples, and around where the second counts: three quarters of 12,800 to 38,400.
    waves = [voice(n, n, 0.01) for n in (9_001, 25_599, 25_600, 31_999, 32_000, 60_001)]
    out = encoded(encoder, waves)
    for i, wave in enumerate(waves):
        raised = resemblyzer.audio.normalize_volume(wave, -30, increase_only=True)
        want, parts, _ = own.embed_utterance(raised, return_partials=True, rate=1.25)
        assert out.tokens.grid.valid[i].sum() == len(parts)
        np.testing.assert_allclose(out.tokens.values[i, : len(parts)], parts, atol=2e-6)
        np.testing.assert_allclose(out.pooled[i], want, atol=2e-6)
    at_default = encoded(build(checkpoint=RESEMBLYZER, stride=77), waves[-1:]).pooled[0]
    wanted = own.embed_utterance(resemblyzer.audio.normalize_volume(waves[-1], -30, increase_only=True))
    np.testing.assert_allclose(at_default, wanted, atol=2e-6)
