"""Small videos made on the spot, whose frames say their number: the grey of frame i is ``grey(i)``."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def grey(number: int) -> int:
    return 4 + 8 * number


def number(image: Image.Image) -> int:
    """Which frame a decoded picture is, from its mean grey; lossy codecs are off by less than four levels."""
    return round((float(np.asarray(image).mean()) - 4) / 8)


def numbered(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 [count, height, width, 3]."""
    return np.stack([np.full((height, width, 3), grey(i), np.uint8) for i in range(count)])


def textured(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A moving texture: every frame of it costs bytes, so that damage hits something."""
    base = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return np.stack([np.roll(base, i, 1) for i in range(count)])


def container(
    frames: np.ndarray,
    codec: str = "libx264",
    format: str = "mp4",
    folder: Path | None = None,
    *,
    rate: int = 10,
    turn: int = 0,
    pts: list[int] | None = None,
    **options: Any,
) -> bytes:
    """Encode frames; ``folder`` for what must be written to a file (a movie whose index stands in front)."""
    import av

    target: Any = io.BytesIO() if folder is None else str(folder / f"movie.{format}")
    muxer = {"movflags": "faststart"} if folder is not None else {}
    with av.open(target, "w", format=format, options=muxer) as out:
        stream: Any = out.add_stream(codec, rate=rate, options={key: str(value) for key, value in options.items()})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if pts is not None:
                picture.pts = pts[i]
                picture.time_base = Fraction(1, rate)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return target.getvalue() if folder is None else Path(target).read_bytes()


def animation(frames: np.ndarray, format: str, duration: int | list[int] = 40, **options: Any) -> bytes:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    file = io.BytesIO()
    lossless = {"lossless": True} if format == "WEBP" else {}
    first.save(file, format, save_all=True, append_images=rest, duration=duration, **lossless, **options)
    return file.getvalue()
