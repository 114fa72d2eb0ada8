"""Any form of one video to a `Video`, which knows when its frames are shown and decodes the ones that are asked for.

Containers go through PyAV, animated pictures through Pillow; see `mmrep.modalities.video._container` and `._stills`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from mmrep.data.raw import is_location, raw_stream, unwrap
from mmrep.encoder import BadSampleError
from mmrep.modalities.video._container import ContainerFrames
from mmrep.modalities.video._stills import ArrayFrames, PictureFrames, open_pictures
from mmrep.modalities.video.sampling import Sampling

T = TypeVar("T")


class Frames(Protocol):
    """Where frames come from.

    Attributes:
        times: float64 [N], when each frame begins, in seconds, rising from 0.
        end: when the last frame ends, in seconds.
    """

    times: np.ndarray
    end: float

    def read(self, wanted: Sequence[int], each: Callable[[Image.Image], T]) -> dict[int, T]:
        """Decode the frames at ``wanted`` (rising, each once) to upright RGB and give each to ``each``."""
        ...


@dataclass(frozen=True)
class Video:
    """An open video, or a part of one; frames are decoded by `read` only.

    Attributes:
        source: where the frames come from.
        index: int64 [N], the places of this video's frames in ``source``, in the order in which they are shown.
        times: float64 [N], when each is shown, in seconds from 0.
        end: when the last one ends, in seconds.
        phase: where clips are placed, 0..1 (1 excluded); None = where the encoder's own reading places them.
        params: what a view did, by name; scalars.
    """

    source: Frames
    index: np.ndarray
    times: np.ndarray
    end: float
    phase: float | None = None
    params: dict[str, float | bool] = field(default_factory=dict[str, "float | bool"])

    def __len__(self) -> int:
        return len(self.index)

    def read(self, at: Sequence[int], each: Callable[[Image.Image], T]) -> list[T]:
        """Decode frames and apply ``each``; a frame that is asked for twice is decoded once.

        Args:
            at: places among this video's frames, in any order.
            each: called with the upright RGB picture of each frame.

        Raises:
            BadSampleError: too many of them cannot be decoded.
        """
        places = [int(self.index[i]) for i in at]
        found = self.source.read(sorted(set(places)), each)
        return [found[place] for place in places]

    def window(self, first: int, count: int) -> Video:
        """The ``count`` frames from ``first`` on; time begins anew with the first of them."""
        stop = first + count
        end = self.times[stop] if stop < len(self) else self.end
        times = self.times[first:stop]
        return replace(self, index=self.index[first:stop], times=times - times[0], end=float(end - times[0]))

    def without(self, dropped: np.ndarray) -> Video:
        """Without the frames that are marked in bool [N]; each is shown until the next that stays."""
        stays = ~dropped
        times = self.times[stays]
        return replace(self, index=self.index[stays], times=times - times[0], end=self.end - float(times[0]))

    def reversed(self) -> Video:
        """Played backwards, each frame for as long as before."""
        lasts = np.diff(self.times, append=self.end)[::-1]
        times = np.concatenate([[0.0], np.cumsum(lasts)[:-1]])
        return replace(self, index=self.index[::-1], times=times)

    def faster(self, speed: float) -> Video:
        """Played ``speed`` times as fast."""
        return replace(self, times=self.times / speed, end=self.end / speed)


@contextmanager
def open_video(raw: Any, how: Sampling | None = None) -> Iterator[Video]:
    """Open one video.

    Args:
        raw: a path, ``file://`` or ``data:`` URL, bytes or binary file object of a container (mp4, mov, webm, mkv, avi,
            mpeg, flv, ogg …), an animated picture (GIF, WebP, APNG, AVIF) or a still one; a dict with ``bytes`` and/or
            ``path``; a numpy array or torch tensor [T, H, W, C] or [T, C, H, W] of uint8 or of floats in 0..1, where C
            is 1 to 4 (grey, with alpha, RGB, with alpha); a list of PIL images or of such frames; ``(frames, fps)`` or
            ``{"array": frames, "fps": fps}`` of these; or one PIL image. Where both orders of an array are possible,
            channels are last in numpy and first in torch.
        how: what is assumed and what is refused; see `Sampling`. None: its defaults.

    Yields:
        The video, which can be read inside of the ``with`` block.

    Raises:
        BadSampleError: it cannot be read; the cause is one of ``missing file``, ``unreadable file``, ``url``, ``not a
            video``, ``too many pixels``, ``too many frames``, ``truncated video``, ``damaged video``, ``empty video``,
            ``unsupported frames``, ``frame rate``, ``value range``, ``not finite``.
        MissingPackageError: a container, where PyAV is not installed.
    """
    how = how or Sampling()
    raw, fps = _frame_rate(raw)
    raw = unwrap(raw)
    if isinstance(raw, Image.Image):
        yield _whole(PictureFrames(raw, how))
    elif isinstance(raw, (np.ndarray, torch.Tensor, list, tuple)):
        yield _whole(ArrayFrames(raw, how, how.assumed_fps if fps is None else fps))
    elif is_location(raw):
        with raw_stream(raw, "a video") as stream, _from_stream(stream, how) as video:
            yield video
    else:
        with _from_stream(raw_stream(raw, "a video"), how) as video:
            yield video


def _frame_rate(raw: Any) -> tuple[Any, float | None]:
    """``(frames, fps)`` and ``{"array": frames, "fps": fps}`` taken apart."""
    fps: Any = None
    if isinstance(raw, Mapping) and "array" in raw:
        raw, fps = raw["array"], raw.get("fps")
    elif isinstance(raw, tuple) and len(raw) == 2 and np.isscalar(raw[1]):
        raw, fps = raw
    if fps is None:
        return raw, None
    try:
        rate = float(fps)
    except (TypeError, ValueError) as error:
        raise BadSampleError("frame rate", f"{fps!r} is not a number of frames a second") from error
    if not (np.isfinite(rate) and rate > 0):
        raise BadSampleError("frame rate", f"{rate} frames a second")
    return raw, rate


@contextmanager
def _from_stream(stream: Any, how: Sampling) -> Iterator[Video]:
    stream = _seekable(stream)
    pictures = open_pictures(stream)
    if pictures is not None:
        yield _whole(PictureFrames(pictures, how))
        return
    frames = ContainerFrames(stream, how)
    try:
        yield _whole(frames)
    finally:
        frames.close()


def _seekable(stream: Any) -> Any:
    try:
        stream.seek(0)
    except (AttributeError, OSError):
        return io.BytesIO(stream.read())
    return stream


def _whole(source: Frames) -> Video:
    return Video(source, np.arange(len(source.times)), source.times, source.end)
