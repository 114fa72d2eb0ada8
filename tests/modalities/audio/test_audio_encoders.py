"""Our own audio encoders keep the contract; and what is special to reading, spectrograms and convolved waveforms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchaudio

from mmrep import BadSampleError
from mmrep.config import ConfigError, component
from mmrep.modalities.audio import _base
from mmrep.modalities.audio._base import level, resample
from mmrep.modalities.audio._mel import LogMel
from mmrep.modalities.audio._positions import sincos
from mmrep.modalities.audio._signals import file_bytes, signal
from mmrep.modalities.audio.decode import Waveform
from mmrep.modalities.audio.spectrogram import AudioSpectrogram
from mmrep.modalities.audio.wave import AudioWave
from mmrep.registry import encoders
from mmrep.testing import check_encoder
from mmrep.views import View

SMALL = {"width": 32, "depth": 2, "heads": 2}
CASES = [
    ("audio-spectrogram", SMALL),
    ("audio-spectrogram", {**SMALL, "class_token": False, "frequency": "learned", "channels": "stereo",
                           "sampling_rate": 32_000, "mels": 32, "patch": [4, 32], "normalize": "rms"}),
    ("audio-spectrogram", {**SMALL, "dropout": 0.1, "drop_path": 0.1, "layer_scale": 1e-4, "patch": [1, 64],
                           "max_seconds": 0.2, "sampling_rate": 8_000, "window": 0.064, "hop": 0.02}),
    ("audio-wave", {**SMALL, "conv_width": 16}),
    ("audio-wave", {**SMALL, "conv_width": 16, "class_token": False, "channels": "stereo", "sampling_rate": 22_050,
                    "kernels": [64, 5], "strides": [32, 4], "normalize": "peak", "dropout": 0.1}),
    ("audio-lstm", {"hidden": 24, "width": 20, "depth": 2}),
    ("audio-lstm", {"hidden": 24, "width": 20, "depth": 3, "mels": 16, "window": 0.05, "frames": 20, "stride": 8,
                    "log": True, "channels": "stereo", "loudness": None}),
    ("silero", {}),
    ("silero", {"width": 12, "normalize": "rms", "max_seconds": 0.2}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_contract(name: str, fields: dict):
    torch.manual_seed(0)
    check_encoder(component("encoders", name, **fields).build(), n=8)


def test_every_registered_audio_encoder_is_tested():
    registered = {name for name, cls in encoders.load_all().items() if getattr(cls, "modality", "") == "audio"}
    assert registered == {"hf-audio", "torchaudio", *(name for name, _ in CASES)}


def spectrogram(**fields) -> AudioSpectrogram:
    torch.manual_seed(0)
    return component("encoders", "audio-spectrogram", **{**SMALL, **fields}).build().eval()


def wave(**fields) -> AudioWave:
    torch.manual_seed(0)
    return component("encoders", "audio-wave", **{**SMALL, "conv_width": 16, **fields}).build().eval()


def clip(n: int, kind: str = "noise", seed: int = 0, rate: int = 16_000) -> tuple[np.ndarray, int]:
    return signal(kind, n, seed), rate


# Reading


@pytest.mark.parametrize(("old", "new"), [(44_100, 16_000), (8_000, 48_000), (192_000, 8_000), (22_050, 32_000)])
def test_resampling_is_torchaudios(old: int, new: int):
    values = torch.from_numpy(signal("chirp", 5_000, 3).astype(np.float32))[None] / (1 << 15)
    torch.testing.assert_close(resample(values, old, new), torchaudio.functional.resample(values, old, new))


def test_an_uncommon_ratio_is_rounded_a_little():
    """44101 to 16000 Hz exactly is a filter of 700 million numbers; the rounded ratio keeps pitch and length."""
    t = np.arange(44_101) / 44_101
    values = torch.from_numpy(np.sin(2 * np.pi * 1000 * t)).float()[None]
    out = resample(values, 44_101, 16_000)
    assert abs(out.shape[1] - 16_000) <= 2
    middle = out[0, 4000:12_000]
    expected = torch.sin(2 * math.pi * 1000 * torch.arange(4000, 12_000) / 16_000)
    assert (middle - expected).abs().max() < 0.05
    assert resample(values, 44_100, 44_100) is values


def test_a_batch_of_mixed_rates_is_one_rate():
    """The same second of sound at several rates is the same second at the encoder's rate."""
    encoder = spectrogram()
    rates = (8_000, 16_000, 44_100, 192_000)
    raws = [(0.3 * np.sin(2 * np.pi * 700 * np.arange(rate) / rate), rate) for rate in rates]
    inputs = encoder.collate([encoder.prepare(raw) for raw in raws])
    assert inputs["lengths"].tolist() == [16_000] * 4
    assert inputs["seconds"].tolist() == [1.0] * 4
    expected = 0.3 * torch.sin(2 * math.pi * 700 * torch.arange(4_000, 12_000) / 16_000)
    assert (inputs["wave"][:, 0, 4_000:12_000] - expected).abs().max() < 2e-3
    slow = encoder.prepare((raws[0][0], 16_000))["wave"]
    assert slow.shape[1] == 8_000, "another rate is another sound"


def test_channels():
    stereo = np.stack([signal("tone", 900, 1), signal("noise", 900, 1)])
    mono = spectrogram().prepare((stereo, 16_000))["wave"]
    np.testing.assert_allclose(mono.numpy(), stereo.mean(0, keepdims=True) / (1 << 15), atol=1e-6)
    both = spectrogram(channels="stereo")
    np.testing.assert_allclose(both.prepare((stereo, 16_000))["wave"].numpy(), stereo / (1 << 15), atol=1e-6)
    assert torch.equal(*both.prepare((stereo[0], 16_000))["wave"])
    swapped = both(both.collate([both.prepare((stereo[::-1].copy(), 16_000))])).tokens.values
    assert (swapped - both(both.collate([both.prepare((stereo, 16_000))])).tokens.values).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "expected"), [("peak", 1.0), ("rms", 0.1)])
def test_levels(kind: str, expected: float):
    values = torch.from_numpy(signal("noise", 999, 0).astype(np.float32))[None] / (1 << 15)
    for loudness in (1.0, 0.02):
        out = level(values * loudness, kind)
        got = out.abs().max() if kind == "peak" else out.square().mean().sqrt()
        torch.testing.assert_close(got.item(), expected, rtol=1e-4, atol=0)
    assert torch.equal(level(torch.zeros(1, 9), kind), torch.zeros(1, 9))
    faint = values * 1e-7
    torch.testing.assert_close(level(faint, kind), faint * 1000)  # noise is not blown up
    assert level(values, "none") is values
    assert torch.equal(spectrogram(normalize=kind).prepare(clip(999))["wave"], level(values, kind))


def test_long_clips_keep_their_beginning_and_a_view_may_choose():
    raw = file_bytes(signal("noise", 50_000, 0), 22_050, "FLAC", "PCM_16")
    whole = spectrogram(max_seconds=None).prepare(raw)["wave"]
    part = spectrogram(max_seconds=0.5).prepare(raw)["wave"]
    assert part.shape == (1, 8_000)
    torch.testing.assert_close(part, whole[:, :8_000])

    class Last(View):
        def sample(self, decoded: Waveform, seed: int) -> Waveform:
            return Waveform(decoded.values[:, -100 * seed :], decoded.sampling_rate)

    last = spectrogram(max_seconds=0.5).prepare(raw, view=Last(None), seed=3)["wave"]
    torch.testing.assert_close(last, whole[:, -300:])


@pytest.mark.parametrize("spoil", [lambda v: v[:, :0], lambda v: v * math.nan, lambda v: v * 1e30])
def test_a_view_that_spoils_a_clip_makes_it_a_bad_sample(spoil):
    class Spoiler(View):
        def sample(self, decoded: Waveform, seed: int) -> Waveform:
            return Waveform(spoil(decoded.values), decoded.sampling_rate)

    with pytest.raises(BadSampleError, match="the view left"):
        spectrogram().prepare(clip(500), view=Spoiler(None))


def test_odd_audio_is_read_or_refused():
    encoder = spectrogram()
    read = {"one sample", "one sample of a high rate", "100 samples", "silence", "constant", "integers as floats",
            "8 kHz", "192 kHz", "44,101 Hz", "24 bits in 32", "eight channels", "samples before channels"}  # fmt: skip
    for name, raw in encoder.oddities(0).items():
        try:
            encoder.prepare(raw)
        except BadSampleError:
            assert name not in read, name
        else:
            assert name in read, name


def test_preview_and_examples():
    encoder = spectrogram()
    assert encoder.preview((np.zeros((2, 52_920), np.int16), 44_100)) == "1.20 s, 44.1 kHz, stereo"
    assert encoder.preview((np.zeros((5, 8_000), np.int16), 8_000)) == "1.00 s, 8 kHz, 5 channels"
    items = [encoder.prepare(raw) for raw in encoder.examples(8, 0)]
    assert len({item["wave"].shape[1] for item in items}) >= 6
    assert {type(raw) for raw in encoder.examples(8, 0)} >= {tuple, dict, bytes}


def test_padding_is_told_by_lengths_and_zero():
    encoder = wave()
    items = [encoder.prepare(clip(n)) for n in (700, 1_300)]
    inputs = encoder.collate(items)
    assert inputs["wave"].shape == (2, 1, 1_300)
    assert inputs["lengths"].tolist() == [700, 1_300]
    assert inputs["wave"][0, :, 700:].abs().max() == 0
    torch.testing.assert_close(inputs["seconds"], torch.tensor([700 / 16_000, 1_300 / 16_000]))
    assert encoder.collate([])["wave"].shape == (0, 1, 1)


# Spectrograms


def test_the_spectrogram_is_torchaudios():
    config = AudioSpectrogram.Config(
        mels=40, low=50.0, high=7_000.0, mel_norm="slaney", mel_scale="slaney", patch=(8, 8)
    )
    values = torch.from_numpy(signal("chirp", 5_000, 3).astype(np.float32))[None, None] / (1 << 15)
    twin = torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=512, win_length=400, hop_length=160, f_min=50.0, f_max=7_000.0, n_mels=40, norm="slaney",
        mel_scale="slaney", pad_mode="constant",
    )  # fmt: skip
    expected = twin(values).clamp_min(1e-5).log().mT
    got = LogMel(config)(values)
    assert got.shape == (1, 1, 1 + 5_000 // 160, 40)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LogMel(config)(values), got)


def test_padding_changes_no_frame_and_fills_with_the_mean():
    encoder = spectrogram()
    short, long = (encoder.prepare(clip(n, seed=n)) for n in (1_999, 9_000))
    alone, counts = encoder.spectrogram(encoder.collate([short]))
    together, both = encoder.spectrogram(encoder.collate([short, long]))
    assert counts.tolist() == [1 + 1_999 // 160]
    assert both.tolist() == [1 + 1_999 // 160, 1 + 9_000 // 160]
    F = int(counts)
    torch.testing.assert_close(together[:1, :, :F], alone[:, :, :F])
    assert together[0, :, F:].abs().max() == 0
    assert together[0, :, F - 1].abs().max() > 0


@pytest.mark.parametrize(
    ("samples", "patches"), [(1, 1), (159, 1), (1_119, 1), (1_120, 1), (1_279, 1), (1_280, 2), (2_560, 3)]
)
def test_valid_patches_are_those_of_the_clip(samples: int, patches: int):
    """8 frames of 10 ms a patch: 1 + L // 160 frames, rounded up to patches."""
    encoder = spectrogram(class_token=False)
    items = [encoder.prepare(clip(n)) for n in (samples, 16_000)]
    grid = encoder.tokenize(encoder.collate(items)).grid
    assert grid.shape is None
    assert grid.valid[0].sum() == patches * 4
    assert bool(grid.valid[0, : patches * 4].all())
    assert encoder.length(items[0]) == patches * 4
    whole = encoder.tokenize(encoder.collate(items[:1])).grid
    assert whole.shape == (patches, 4)


def test_coordinates_are_seconds_and_bands():
    grid = spectrogram().tokenize(spectrogram().collate([spectrogram().prepare(clip(16_000))])).grid
    assert grid.shape == (13, 4)
    assert grid.special[0].tolist() == [True] + [False] * 52
    torch.testing.assert_close(grid.coords[0, 1], torch.tensor([0.035, 7.5]))
    torch.testing.assert_close(grid.coords[0, 2], torch.tensor([0.035, 23.5]))
    torch.testing.assert_close(grid.coords[0, 5], torch.tensor([0.115, 7.5]))


def test_a_tone_is_found_where_the_coordinates_say():
    """A click in the second half, and a tone of high pitch: the loudest patch lies there."""
    encoder = spectrogram(class_token=False)
    t = np.arange(16_000) / 16_000
    sound = np.where((t > 0.6) & (t < 0.68), np.sin(2 * np.pi * 6_000 * t), 0.0)
    inputs = encoder.collate([encoder.prepare((sound, 16_000))])
    mel, _ = encoder.spectrogram(inputs)
    power = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(mel, (0, 0, 0, -mel.shape[2] % 8)), (8, 16))
    place = encoder.tokenize(inputs).grid.coords[0, power.flatten().argmax()]
    assert abs(place[0] - 0.64) < 0.05
    assert place[1] > 48


@pytest.mark.parametrize("frequency", ["sincos", "learned"])
def test_positions_are_added_before_tokens_are_dropped(frequency: str):
    encoder = spectrogram(frequency=frequency, class_token=False)
    tokens = encoder.tokenize({"wave": torch.zeros(1, 1, 4_800), "lengths": torch.tensor([4_800])})
    assert (torch.pdist(tokens.values[0, :12]) > 1e-3).all(), "equal patches at different places have equal tokens"


def test_positions_are_those_of_the_formula():
    table = sincos(torch.tensor([0, 1, 7]), 8).numpy()
    for row, place in zip(table, (0, 1, 7), strict=True):
        want = [f(place / 10000 ** (2 * i / 8)) for f in (np.sin, np.cos) for i in range(4)]
        np.testing.assert_allclose(row, want, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"mels": 300, "patch": [8, 10]}, "more bands than"), ({"high": 9_000.0}, "no band within"),
     ({"low": 8_000.0}, "no band"), ({"hop": 0.03}, "at most window"), ({"patch": [8, 7]}, "does not divide mels"),
     ({"heads": 3}, "does not divide width"), ({"width": 30, "heads": 2}, "multiple of 4"),
     ({"sampling_rate": 4_000}, "8000")],
)  # fmt: skip
def test_impossible_configs(fields: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        component("encoders", "audio-spectrogram", **{**SMALL, **fields})


@pytest.mark.parametrize("kind", ["global", "band"])
def test_statistics_are_learned_from_the_samples(kind: str, tmp_path):
    fields = {**SMALL, "standardize": kind, "mels": 32, "patch": [8, 16]}
    config = component("encoders", "audio-spectrogram", **fields).config
    with pytest.raises(ValueError, match="learned from training samples"):
        AudioSpectrogram(config)
    raws = [*spectrogram().examples(6, 0), b"no sound", (np.zeros(0), 16_000)]
    AudioSpectrogram.fit(config, raws, tmp_path)
    encoder = AudioSpectrogram(config, tmp_path)
    plain = spectrogram(mels=32, patch=[8, 16], mean=0.0, std=1.0)
    frames = []
    for raw in raws[:6]:
        values, _ = plain.spectrogram(plain.collate([plain.prepare(raw)]))
        frames.append(values[0, 0].double())
    every = torch.cat(frames)
    dims = (0,) if kind == "band" else (0, 1)
    expected = every.mean(dims).float().reshape(-1), every.std(dims, correction=0).float().reshape(-1)
    torch.testing.assert_close(encoder.mean, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.std, expected[1], rtol=1e-3, atol=1e-3)
    assert encoder.mean.shape == ((32,) if kind == "band" else (1,))
    torch.manual_seed(0)
    check_encoder(encoder, n=4)
    again = tmp_path / "again"
    again.mkdir()
    encoder.save_files(again)
    assert (again / "log_mel.json").read_bytes() == (tmp_path / "log_mel.json").read_bytes()


def test_statistics_that_cannot_be_learned_or_do_not_fit(tmp_path):
    config = component("encoders", "audio-spectrogram", **SMALL, standardize="band").config
    with pytest.raises(ValueError, match="none of the training samples"):
        AudioSpectrogram.fit(config, [b"no sound"], tmp_path)
    AudioSpectrogram.fit(config, [(np.zeros(9_000), 16_000)], tmp_path)
    silent = AudioSpectrogram(config, tmp_path)
    torch.testing.assert_close(silent.std, torch.full((64,), 1e-3))
    other = component("encoders", "audio-spectrogram", **SMALL, standardize="band", mels=32).config
    with pytest.raises(ValueError, match="expected 32"):
        AudioSpectrogram(other, tmp_path)
    given = component("encoders", "audio-spectrogram", **SMALL).config
    AudioSpectrogram.fit(given, iter(()), tmp_path / "none")  # reads and writes nothing


# Convolved waveforms


@pytest.mark.parametrize("samples", [1, 399, 400, 719, 720, 721, 5_000, 16_000])
def test_frames_are_counted_exactly(samples: int):
    """As many as the convolutions give for the clip alone; a clip shorter than one frame has one."""
    encoder = wave(class_token=False)
    items = [encoder.prepare(clip(n)) for n in (samples, 20_000)]
    expected = 1 + max(samples - 400, 0) // 320
    grid = encoder.tokenize(encoder.collate(items)).grid
    assert grid.valid[0].sum() == expected
    assert encoder.tokenize(encoder.collate(items[:1])).grid.shape == (expected,)
    assert encoder.length(items[0]) == expected
    torch.testing.assert_close(grid.coords[0, :2, 0], torch.tensor([199.5, 519.5]) / 16_000)


def test_a_frame_sees_its_own_samples_only():
    """The gradient of a valid frame before the transformer lies within the field that its coordinate says."""
    encoder = wave(class_token=False)
    values = torch.from_numpy(signal("noise", 4_000, 0).astype(np.float32))[None, None].requires_grad_()
    tokens = encoder.tokenize({"wave": values, "lengths": torch.tensor([4_000])})
    tokens.values[0, 5].square().sum().backward()
    touched = values.grad[0, 0].nonzero()
    assert touched.min() == 5 * 320
    assert touched.max() == 5 * 320 + 399


def test_the_convolutions_are_wav2vecs():
    """Against a transformers feature extractor of its larger models, given the same weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        conv_dim=(16,) * 7, feat_extract_norm="layer", conv_bias=True, feat_extract_activation="gelu"
    )
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

    encoder, twin = wave(), Wav2Vec2FeatureEncoder(config).eval()
    for ours, theirs in zip(encoder.convolutions, twin.conv_layers, strict=True):
        theirs.conv.load_state_dict(ours.conv.state_dict())
        theirs.layer_norm.load_state_dict(ours.norm.state_dict())
    values = torch.randn(2, 1, 3_000)
    torch.testing.assert_close(encoder.convolutions(values), twin(values[:, 0]), rtol=1e-4, atol=1e-5)


def test_impossible_waves():
    for fields, message in (
        ({"kernels": [3]}, "1 kernels"),
        ({"heads": 3}, "heads"),
        ({"width": 33, "heads": 3}, "even"),
    ):
        with pytest.raises(ConfigError, match=message):
            component("encoders", "audio-wave", **{**SMALL, **fields})


def test_importing_the_modality_loads_no_audio_library():
    import subprocess
    import sys

    modules = ("decode", "spectrogram", "wave", "lstm", "silero", "hf", "views")
    lines = "; ".join(f"import mmrep.modalities.audio.{name}" for name in modules)
    heavy = "('torchaudio', 'soundfile', 'av', 'transformers')"
    code = f"{lines}; import sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_resampling_filters_are_kept():
    _base._resampler.cache_clear()
    values = torch.zeros(1, 100)
    resample(values, 44_100, 16_000)
    resample(values, 44_100, 16_000)
    assert _base._resampler.cache_info().hits == 1
