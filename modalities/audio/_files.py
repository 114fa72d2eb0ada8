"""Reading audio files: soundfile where it can (WAV, FLAC, OGG, MP3 …), PyAV for the rest (MP4, WebM, AAC …)."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from mmrep.encoder import BadSampleError
from mmrep.registry import require

_UNRECOGNISED = 1  # SF_ERR_UNRECOGNISED_FORMAT of sndfile.h
_HEAD = 600  # bytes
# Starts of files that only FFmpeg reads. A file that neither reader knows should not ask for a package in vain.
_CONTAINERS = (b"\x1aE\xdf\xa3", b"FLV", b"0&\xb2u\x8ef\xcf\x11", b"\0\0\x01\xba", b"#!AMR", b"\x0bw", b"ADIF")
_ATOMS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # MP4, M4A and QuickTime, after four bytes of size

CheckRate = Callable[[Any], int]


def read_file(
    stream: BinaryIO, check_rate: CheckRate, max_duration: float, at_most: float | None
) -> tuple[np.ndarray, int]:
    """Read an audio or video file.

    Args:
        stream: an open binary file; it need not be able to seek.
        check_rate: raises BadSampleError for a sampling rate that is not accepted.
        max_duration: in seconds; longer audio is refused, unread where its header tells.
        at_most: seconds from the start to decode. None: all.

    Returns:
        Float32 [channels, samples] and the sampling rate.

    Raises:
        BadSampleError: see `mmrep.modalities.audio.decode.decode`.
        MissingPackageError: the file needs PyAV.
    """
    import soundfile

    try:
        if not stream.seekable():
            stream = io.BytesIO(stream.read())
        start = stream.tell()
        head = stream.read(_HEAD)
        stream.seek(start)
    except (OSError, ValueError, AttributeError) as error:
        raise BadSampleError("unreadable file", str(error)) from error
    if not isinstance(head, bytes):
        raise BadSampleError("not audio", "the file is open in text mode; open it in binary mode")
    if not head:
        raise BadSampleError("empty audio", "the file is empty")
    try:
        with soundfile.SoundFile(stream) as file:
            return _read_soundfile(file, check_rate, max_duration, at_most)
    except soundfile.LibsndfileError as error:
        if not _is_container(head):
            if error.code == _UNRECOGNISED:
                raise BadSampleError("not audio", "no known audio format, or its header is damaged") from error
            raise BadSampleError("damaged audio", str(error)) from error
    stream.seek(start)
    return _read_av(stream, check_rate, max_duration, at_most)


def _is_container(head: bytes) -> bool:
    aac = len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0
    mpeg_ts = len(head) > 376 and head[0] == head[188] == head[376] == 0x47
    riff = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    return head.startswith(_CONTAINERS) or head[4:8] in _ATOMS or aac or mpeg_ts or riff


def _read_soundfile(
    file: Any, check_rate: CheckRate, max_duration: float, at_most: float | None
) -> tuple[np.ndarray, int]:
    rate = check_rate(file.samplerate)
    _check_duration(file.frames / rate, max_duration)
    wanted = file.frames if at_most is None else min(file.frames, max(1, round(at_most * rate)))
    values = file.read(wanted, dtype="float32", always_2d=True)
    if len(values) < 0.9 * wanted:  # the header of an MP3 may be off by a little
        raise BadSampleError("truncated audio", f"{len(values)} of {wanted} samples are there")
    return np.ascontiguousarray(values.T), rate


def _read_av(
    stream: BinaryIO, check_rate: CheckRate, max_duration: float, at_most: float | None
) -> tuple[np.ndarray, int]:
    av: Any = require("av", "video")
    try:
        with av.open(stream, mode="r") as container:
            if not container.streams.audio:
                raise BadSampleError("no audio track", f"a file of format {container.format.name}")
            track = container.streams.audio[0]
            rate = check_rate(track.rate)
            announced = None if track.duration is None else float(track.duration * track.time_base)
            _check_duration(announced or 0.0, max_duration)
            limit = round((max_duration if at_most is None else min(at_most, max_duration)) * rate) + 1
            parts = _frames(av, container, track, limit)
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise BadSampleError("damaged audio", str(error)) from error
    if not parts:
        raise BadSampleError("empty audio", "the audio track has no samples")
    values = np.concatenate(parts, axis=1)
    wanted = 0.0 if announced is None else min(announced * rate, limit)
    if values.shape[1] < 0.9 * wanted:
        raise BadSampleError("truncated audio", f"{values.shape[1] / rate:.2f} of {wanted / rate:.2f} s are there")
    return values, rate


def _frames(av: Any, container: Any, track: Any, limit: int) -> list[np.ndarray]:
    """Decoded blocks, float32 [channels, n], until ``limit`` samples are reached."""
    resampler = av.AudioResampler(format="fltp")  # the format of the samples only; rate and channels stay
    parts: list[np.ndarray] = []
    count = 0
    for frame in container.decode(track):
        for block in resampler.resample(frame):
            parts.append(block.to_ndarray())
            count += parts[-1].shape[1]
        if count >= limit:
            break
    return parts


def _check_duration(seconds: float, max_duration: float) -> None:
    if seconds > max_duration:
        raise BadSampleError("too long", f"{seconds:.1f} s is more than {max_duration:g} s")
