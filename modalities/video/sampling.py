"""Which frames of a video are read: part of an encoder's preprocessing, and saved with it.

A clip is placed by its *phase* in 0..1. A reading without a view has phase 1/2, the middle; a view such as
`video-augment` draws one at random; ``clips: k`` reads k clips, of phases (j + 1/2) / k.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mmrep.config import config

MAX_PIXELS = 1 << 26  # of one frame; 67 million, as for pictures
MAX_FRAMES = 200_000  # over two hours at 25 frames a second
_EPSILON = 1e-6  # seconds; times are sums of rounded numbers, and a frame begins at its own time


@config
class Sampling:
    """Which frames are read.

    frames: how many a clip has, T. sampling: "uniform", the video in T equal parts by frame number and one frame of
    each; "ends", T frames from the first to the last, whatever the phase; or "fps", T frames at ``fps`` a second. fps:
    frames a second of the clip, for sampling "fps". clips: how many clips are read where there is no view, for
    evaluation: each is encoded by itself, and the tokens of all come out together, so that pool "mean" averages over
    clips (as ``pooled`` does), and the tower then projects and normalises. short: a video of fewer frames than T is
    filled up by repeating its last frame, or has fewer, the rest of the batch being marked as padding. assumed_fps: the
    frame rate of arrays, lists and raw streams that have none. background: colour behind transparency, 0..255.
    max_pixels, max_frames: videos of larger or more frames are refused unread.
    """

    frames: Annotated[int, Field(ge=1)] = 8
    sampling: Literal["uniform", "ends", "fps"] = "uniform"
    fps: Annotated[float, Field(gt=0)] = 4.0
    clips: Annotated[int, Field(ge=1)] = 1
    short: Literal["repeat", "mask"] = "repeat"
    assumed_fps: Annotated[float, Field(gt=0)] = 25.0
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    max_frames: Annotated[int, Field(ge=1)] = MAX_FRAMES


def choose(times: np.ndarray, end: float, how: Sampling, phases: list[float]) -> np.ndarray:
    """Which frames to read: int64 [clips, t]; t is ``how.frames``, or less if the video is shorter and not filled up.

    Args:
        times: float64 [N], when each frame begins, in seconds, rising from 0.
        end: when the last frame ends.
        how: the sampling.
        phases: of each clip, in 0..1 (1 excluded).
    """
    if how.sampling == "uniform":
        clips = [uniform(len(times), how.frames, phase) for phase in phases]
    elif how.sampling == "ends":
        clips = [ends(len(times), how.frames) for _ in phases]
    else:
        clips = [at_rate(times, end, how.frames, how.fps, phase) for phase in phases]
    chosen = np.stack(clips)
    missing = how.frames - chosen.shape[1]
    if missing and how.short == "repeat":
        chosen = np.concatenate([chosen, np.repeat(chosen[:, -1:], missing, 1)], 1)
    return chosen


def phases(clips: int) -> list[float]:
    """Where k clips lie: (j + 1/2) / k; one clip lies in the middle."""
    return [(j + 0.5) / clips for j in range(clips)]


def uniform(count: int, frames: int, phase: float = 0.5) -> np.ndarray:
    """Frame ``floor((i + phase) * count / frames)`` for i < frames; all frames if there are not more than that."""
    if count <= frames:
        return np.arange(count)
    return np.minimum(np.floor((np.arange(frames) + phase) * count / frames), count - 1).astype(np.int64)


def ends(count: int, frames: int) -> np.ndarray:
    """Frame ``floor(i * (count - 1) / (frames - 1))`` for i < frames; a short video repeats frames."""
    return np.arange(frames) * (count - 1) // max(frames - 1, 1)


def at_rate(times: np.ndarray, end: float, frames: int, fps: float, phase: float = 0.5) -> np.ndarray:
    """The frames that are shown at ``phase * max(end - (frames - 1) / fps, 0) + i / fps`` seconds, before the end.

    Phase 0 begins with the first frame; as the phase nears 1, the last frame comes to be the clip's last.
    """
    slack = max(end - (frames - 1) / fps, 0.0)
    moments = phase * slack + np.arange(frames) / fps
    if slack == 0:
        moments = moments[: max(int((moments < end - _EPSILON).sum()), 1)]
    shown = np.searchsorted(times, moments + _EPSILON, side="right") - 1
    return np.clip(shown, 0, len(times) - 1).astype(np.int64)
