"""Every form of audio comes in with its own rate and full scale, and what cannot be read is a bad sample."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from mmrep import BadSampleError
from mmrep.modalities.audio import _files as files
from mmrep.modalities.audio._signals import file_bytes, signal
from mmrep.modalities.audio.decode import Waveform, check_rate, decode, mix

TONE = signal("tone", 3000, 1)
STEREO = np.stack([TONE, signal("chirp", 3000, 2)])
SCALED = torch.from_numpy(STEREO.astype(np.float32) / (1 << 15))


def cause(raw: object, **options: float) -> str:
    with pytest.raises(BadSampleError) as error:
        decode(raw, **options)
    return error.value.cause


def video_bytes(form: str, codec: str, rate: int, samples: np.ndarray | None, picture: bool = False) -> bytes:
    """A container of float32 [2, T], with a black video track if asked for."""
    av = pytest.importorskip("av")
    stream = io.BytesIO()
    with av.open(stream, "w", format=form) as out:
        frames = []
        if picture:
            track = out.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p")
            frames += [(track, av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))) for _ in range(5)]
        if samples is not None:
            track = out.add_stream(codec, rate=rate, layout="stereo")
            whole = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout="stereo")
            whole.sample_rate, whole.pts = rate, 0
            fifo = av.AudioFifo()
            fifo.write(whole)
            while (frame := fifo.read(track.codec_context.frame_size or 1024, partial=True)) is not None:
                frames.append((track, frame))
        for track, frame in frames:
            out.mux(track.encode(frame))
        for track in {id(track): track for track, _ in frames}.values():
            out.mux(track.encode(None))
    return stream.getvalue()


def tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    return np.stack([wave, wave]).astype(np.float32)


def pitch(clip: Waveform) -> float:
    spectrum = torch.fft.rfft(clip.values[0]).abs()
    return float(spectrum.argmax()) / clip.seconds


@pytest.mark.parametrize(
    "form", ["path", "str", "file url", "data url", "bytes", "file", "bytes dict", "path dict", "pipe"]
)
def test_forms_of_a_file(form: str, tmp_path):
    raw = file_bytes(STEREO, 22_050, "WAV", "PCM_16")
    path = tmp_path / "a clip.wav"
    path.write_bytes(raw)

    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    forms = {
        "path": path, "str": str(path), "file url": path.as_uri(), "bytes": raw, "file": io.BytesIO(raw),
        "data url": "data:audio/wav;base64," + base64.b64encode(raw).decode(),
        "bytes dict": {"bytes": raw, "path": None},
        "path dict": {"bytes": None, "path": str(path)}, "pipe": Pipe(raw),
    }  # fmt: skip
    clip = decode(forms[form])
    assert clip.sampling_rate == 22_050
    assert torch.equal(clip.values, SCALED)


@pytest.mark.parametrize(
    ("form", "subtype", "tolerance"),
    [("WAV", "PCM_16", 0), ("WAV", "PCM_24", 0), ("WAV", "PCM_32", 0), ("WAV", "FLOAT", 0), ("WAV", "DOUBLE", 0),
     ("FLAC", "PCM_16", 0), ("FLAC", "PCM_24", 0), ("AIFF", "PCM_24", 0), ("WAV", "PCM_U8", 1 / 127),
     ("OGG", "VORBIS", 0.1), ("MP3", "MPEG_LAYER_III", 0.1)],
)  # fmt: skip
def test_formats_of_files(form: str, subtype: str, tolerance: float):
    """Whatever the depth, full scale is 1; lossy formats keep pitch and loudness."""
    samples = SCALED.numpy() if tolerance < 0.05 else tone(16_000)
    clip = decode(file_bytes(samples, 16_000, form, subtype))
    expected = torch.from_numpy(samples)
    assert clip.sampling_rate == 16_000
    if tolerance < 0.05:
        assert (clip.values - expected).abs().max() <= tolerance
    else:
        assert abs(pitch(clip) - 440) < 2
        assert abs(clip.values.std() / expected.std() - 1) < tolerance


@pytest.mark.parametrize(
    "array",
    [STEREO, STEREO.astype(np.int32) << 16, STEREO.astype(">i2"), SCALED.numpy(), SCALED.double().numpy(), SCALED,
     SCALED.double(), torch.from_numpy(STEREO), SCALED.tolist(), STEREO.T, SCALED.T],
)  # fmt: skip
def test_dtypes_and_layouts_of_arrays(array: object):
    for raw in ((array, 16_000), [array, 16_000.0], {"array": array, "sampling_rate": 16_000, "path": None}):
        clip = decode(raw)
        assert torch.equal(clip.values, SCALED)
        assert clip.values.dtype == torch.float32
        assert type(clip.sampling_rate) is int


def test_8_bits():
    levels = np.array([0, 64, 128, 192, 255], np.uint8)
    assert decode((levels, 8000)).values.tolist() == [[-1, -0.5, 0, 0.5, 127 / 128]]
    assert decode((levels.astype(np.int16).astype(np.int8), 8000)).values[0, 1] == 0.5
    assert decode((np.array([-(1 << 31)], np.int32), 8000)).values.item() == -1


def test_half_precision_and_no_gradient():
    half = SCALED.bfloat16().requires_grad_()
    assert torch.equal(decode((half, 8000)).values, SCALED.bfloat16().float())
    assert torch.equal(decode((SCALED.half().numpy(), 8000)).values, SCALED.half().float())


def test_a_waveform_and_a_torchcodec_decoder_are_raw_values():
    clip = Waveform(SCALED, 48_000)
    assert decode(clip).sampling_rate == 48_000
    assert torch.equal(decode(clip).values, SCALED)
    samples = SimpleNamespace(data=SCALED, sample_rate=44_100)
    assert decode(SimpleNamespace(get_all_samples=lambda: samples)).sampling_rate == 44_100


def test_a_rate_is_never_guessed():
    for raw in (TONE, SCALED, SCALED.tolist(), {"array": TONE}, {"array": TONE, "sampling_rate": None}):
        assert cause(raw) == "no sampling rate"
    with pytest.raises(BadSampleError, match=r"give \(array, sampling_rate\)"):
        decode(TONE)


@pytest.mark.parametrize("rate", [8_000, 11_025, 192_000])
def test_rates_from_8_to_192_khz(rate: int):
    assert decode((TONE, rate)).sampling_rate == rate
    assert decode(file_bytes(TONE, rate, "WAV", "PCM_16")).sampling_rate == rate


@pytest.mark.parametrize("rate", [4, 7_999, 192_001, 0, -8000, 11_025.5, "16000", True, None, float("nan"), 1e400])
def test_other_rates_are_refused(rate: object):
    assert cause((TONE, rate)) == "sampling rate"


def test_a_file_with_another_rate_is_refused():
    assert cause(file_bytes(TONE, 4_000, "WAV", "PCM_16")) == "sampling rate"


def test_odd_arrays():
    assert cause((TONE[:0], 16_000)) == "empty audio"
    assert cause((STEREO[:, :0], 16_000)) == "empty audio"
    assert cause((np.array([0.0, np.nan]), 16_000)) == "not finite"
    assert cause((np.array([0.0, -np.inf]), 16_000)) == "not finite"
    assert cause((np.array([1e300]), 16_000)) == "not finite"
    assert cause((np.array([1e30]), 16_000)) == "value range"
    for array in (TONE.astype(np.int64), TONE.astype(np.uint16), TONE > 0, TONE.astype(complex), np.array(["a"]),
                  np.array([None]), [[1.0], [1.0, 2.0]], STEREO[None], np.float32(1)):  # fmt: skip
        assert cause((array if isinstance(array, list) else np.asarray(array), 16_000)) == "unsupported samples"
    assert decode((np.float32([0.5]), 16_000)).values.tolist() == [[0.5]]
    assert decode((np.zeros(100, np.float32), 16_000)).values.abs().max() == 0


def test_which_axis_is_which():
    """Eight channels at most; two short axes are ambiguous, but for a single channel."""
    for shape, channels in (((1, 1), 1), ((1, 5), 1), ((2, 9), 2), ((9, 2), 2), ((8, 9), 8), ((1, 3000), 1)):
        assert len(decode((np.zeros(shape), 16_000)).values) == channels
    for shape in ((2, 2), (8, 8), (5, 1), (9, 9), (9, 3000)):
        assert cause((np.zeros(shape), 16_000)) == "unsupported samples"
    assert cause(file_bytes(np.zeros((9, 50)), 16_000, "WAV", "PCM_16")) == "unsupported samples"


def test_odd_files(tmp_path):
    flac = file_bytes(signal("noise", 40_000, 0), 16_000, "FLAC", "PCM_16")
    mp3 = file_bytes(tone(16_000), 16_000, "MP3", "MPEG_LAYER_III")
    assert cause(flac[: len(flac) // 2]) == "damaged audio"
    assert cause(mp3[: len(mp3) // 2]) == "truncated audio"
    assert cause(file_bytes(TONE[:0], 16_000, "WAV", "PCM_16")) == "empty audio"
    assert cause(b"") == "empty audio"
    assert cause(io.BytesIO()) == "empty audio"
    assert cause(b"a text, no sound " * 99) == "not audio"
    assert cause(io.StringIO("a text")) == "not audio"
    assert cause(object()) == "not audio"
    assert cause(16_000) == "not audio"
    assert cause(None) == "not audio"
    assert cause("https://example.org/a.wav") == "url"
    assert cause(tmp_path / "none.wav") == "missing file"
    assert cause(tmp_path) == "unreadable file"
    wav = file_bytes(TONE, 16_000, "WAV", "PCM_16")
    assert torch.equal(decode(wav[:3044]).values, SCALED[:1, :1500])  # a cut WAV file is read as far as it goes
    closed = io.BytesIO(flac)
    closed.close()
    assert cause(closed) == "unreadable file"
    assert cause(file_bytes(np.float32([0, np.nan]), 16_000, "WAV", "FLOAT")) == "not finite"


def test_the_file_is_closed_and_a_given_file_is_not(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(file_bytes(TONE, 16_000, "WAV", "PCM_16"))
    with path.open("rb") as file:
        decode(file)
        assert not file.closed
    import mmrep.modalities.audio.decode as module

    opened = []
    inner = module.raw_stream
    monkeypatch.setattr(module, "raw_stream", lambda *a: opened.append(inner(*a)) or opened[-1])
    decode(path)
    assert opened[0].closed


def test_the_cap_on_duration_holds_before_decoding(monkeypatch):
    wav = file_bytes(TONE, 8_000, "WAV", "PCM_16")  # 0.375 s
    assert decode(wav, max_duration=0.375).values.shape == (1, 3000)
    assert cause((TONE, 8_000), max_duration=0.37) == "too long"
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: pytest.fail("decoded"))
    assert cause(wav, max_duration=0.37) == "too long"


def test_only_the_beginning_is_decoded_if_no_more_is_asked_for():
    whole = decode(file_bytes(STEREO, 8_000, "FLAC", "PCM_16"))
    for raw in (file_bytes(STEREO, 8_000, "FLAC", "PCM_16"), (STEREO, 8_000)):
        part = decode(raw, at_most=0.1)
        assert torch.equal(part.values, whole.values[:, :800])
    assert decode((STEREO, 8_000), at_most=1e-9).values.shape == (2, 1)


@pytest.mark.parametrize(
    ("form", "codec", "rate", "picture"),
    [("mp4", "aac", 44_100, True), ("mp4", "aac", 16_000, False), ("webm", "libopus", 48_000, False),
     ("matroska", "aac", 32_000, True), ("avi", "mp2", 44_100, True), ("adts", "aac", 44_100, False),
     ("mpegts", "mp2", 48_000, False), ("mov", "aac", 44_100, True)],
)  # fmt: skip
def test_the_sound_of_a_video(form: str, codec: str, rate: int, picture: bool):
    clip = decode(video_bytes(form, codec, rate, tone(rate), picture))
    assert clip.sampling_rate == rate
    assert len(clip.values) == 2
    assert abs(clip.seconds - 1) < 0.1
    assert abs(pitch(clip) - 440) < 2
    middle = clip.values[:, rate // 4 : rate // 2]
    assert abs(middle.std() - 0.5 / 2**0.5) < 0.02


def test_odd_videos(monkeypatch):
    mp4 = video_bytes("mp4", "aac", 16_000, tone(16_000, 3.0), True)
    assert cause(video_bytes("mp4", "", 16_000, None, True)) == "no audio track"
    assert cause(mp4[: len(mp4) // 2]) == "damaged audio"
    assert cause(mp4, max_duration=2.5) == "too long"
    webm = video_bytes("webm", "libopus", 48_000, tone(48_000, 3.0))  # tells no duration of its tracks
    assert cause(webm, max_duration=2.5) == "too long"
    part = decode(mp4, at_most=0.5)
    assert part.values.shape[1] == 8000
    assert abs(decode(webm, at_most=0.5).values.shape[1] - 24_000) <= 1
    values, _ = files.read_file(io.BytesIO(webm), check_rate, 600.0, 0.5)
    assert values.shape[1] < 24_000 + 2 * 960, "decoding stops where no more is asked for"
    monkeypatch.setattr(files, "_frames", lambda *a: pytest.fail("decoded"))
    assert cause(mp4, max_duration=2.5) == "too long"


def test_a_damaged_sound_file_asks_for_no_package(monkeypatch):
    monkeypatch.setattr(files, "require", lambda *a: pytest.fail("asked for PyAV"))
    for raw in (b"text " * 99, file_bytes(signal("noise", 9000, 0), 16_000, "FLAC", "PCM_16")[:4000], b"RIFF"):
        with pytest.raises(BadSampleError):
            decode(raw)


def test_mixing():
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert mix(values, 1).tolist() == [[2, 4]]
    assert mix(values, 2) is values
    assert mix(values[:1], 2).tolist() == [[1, 2], [1, 2]]
    three = torch.cat([values, torch.zeros(1, 2)])
    assert torch.allclose(mix(three, 2), torch.tensor([[4 / 3, 8 / 3]]).expand(2, -1))
