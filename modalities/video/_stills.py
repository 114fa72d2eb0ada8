"""Frames that need no video decoder: arrays, lists of pictures, animated pictures and still ones."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mmrep.encoder import BadSampleError
from mmrep.modalities.video.sampling import Sampling

T = TypeVar("T")
# Only plain raster formats whose first bytes say what they are; whatever else goes to the video decoder.
FORMATS = ("WEBP", "GIF", "PNG", "JPEG", "BMP", "TIFF", "AVIF", "JPEG2000")
_STANDARD_DURATION = 0.1  # seconds; what browsers give a frame of an animation that says 0
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def open_pictures(stream: Any) -> Image.Image | None:
    """Open a still or animated picture; None if it is something else.

    Raises:
        BadSampleError: a picture with a damaged header, or of too many pixels for Pillow.
    """
    Image.init()
    try:
        return Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        stream.seek(0)
        return None
    except _BOMBS as error:
        raise BadSampleError("too many pixels", str(error)) from error
    except _DECODER_ERRORS as error:
        raise BadSampleError("damaged video", str(error)) from error


class PictureFrames:
    """A Pillow image, animated or not.

    Most animated formats store differences, so all frames are decoded, in order. They are kept for reading if there
    are not more than ``max_pixels`` pixels in all, and otherwise decoded again.
    """

    def __init__(self, image: Image.Image, how: Sampling) -> None:
        self.image, self.how = image, how
        width, height = image.size
        check_size(width, height, how)
        self.count = getattr(image, "n_frames", 1)
        check_count(self.count, how)
        self._kept: dict[int, Image.Image] = {}
        keeps = width * height * self.count <= how.max_pixels
        lasts: list[float] = []
        for number, frame in enumerate(self._decoded()):
            lasts.append(float(image.info.get("duration") or 0) / 1000 or _STANDARD_DURATION)
            if keeps:
                self._kept[number] = frame
        if self.count == 1:
            lasts = [1 / how.assumed_fps]
        ends = np.cumsum(lasts)
        self.times, self.end = np.concatenate([[0.0], ends[:-1]]), float(ends[-1])

    def read(self, wanted: Sequence[int], each: Callable[[Image.Image], T]) -> dict[int, T]:
        """See `mmrep.modalities.video.decode.Frames`."""
        if self._kept:
            return {place: each(flatten(self._kept[place], self.how.background)) for place in wanted}
        among = set(wanted)
        return {n: each(flatten(f, self.how.background)) for n, f in enumerate(self._decoded()) if n in among}

    def _decoded(self) -> Any:
        for number in range(self.count):
            try:
                if self.count > 1:
                    self.image.seek(number)
                self.image.load()
                turned = number == 0 and self.image.getexif().get(ExifTags.Base.Orientation, 1) != 1
                frame = ImageOps.exif_transpose(self.image) if turned and self.count == 1 else self.image.copy()
            except _BOMBS as error:
                raise BadSampleError("too many pixels", str(error)) from error
            except _DECODER_ERRORS as error:
                cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
                detail = f"frame {number} of {self.count}: {error}"
                raise BadSampleError("truncated video" if cut else "damaged video", detail) from error
            yield frame


class ArrayFrames:
    """Frames in memory: an array of four axes, or a list of pictures."""

    def __init__(self, frames: Any, how: Sampling, fps: float) -> None:
        self.how = how
        self.frames = _pictures(frames) if isinstance(frames, (list, tuple)) else _channels_last(frames)
        check_count(len(self.frames), how)
        first = self.frames[0]
        width, height = first.size if isinstance(first, Image.Image) else first.shape[1::-1]
        check_size(width, height, how)
        self.times, self.end = np.arange(len(self.frames)) / fps, len(self.frames) / fps

    def read(self, wanted: Sequence[int], each: Callable[[Image.Image], T]) -> dict[int, T]:
        """See `mmrep.modalities.video.decode.Frames`."""
        return {place: each(flatten(_as_image(self.frames[place]), self.how.background)) for place in wanted}


def check_size(width: int, height: int, how: Sampling) -> None:
    """Refuse frames that are too large or empty.

    Raises:
        BadSampleError: ``too many pixels`` or ``empty video``.
    """
    if width * height > how.max_pixels:
        raise BadSampleError("too many pixels", f"{width} x {height} is more than {how.max_pixels}")
    if width * height == 0:
        raise BadSampleError("empty video", f"frames of {width} x {height} pixels")


def check_count(count: int, how: Sampling) -> None:
    """Refuse a video of no frames or of too many.

    Raises:
        BadSampleError: ``too many frames`` or ``empty video``.
    """
    if count > how.max_frames:
        raise BadSampleError("too many frames", f"{count} is more than {how.max_frames}")
    if count == 0:
        raise BadSampleError("empty video", "no frames")


def flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any PIL mode to RGB; transparency is laid over ``background``.

    Raises:
        BadSampleError: pixels of more than 8 bits.
    """
    if image.mode.startswith("I") or image.mode == "F":
        raise BadSampleError("unsupported frames", f"PIL mode {image.mode!r}; frames have 8 bits a channel")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("RGB")


def _pictures(frames: Sequence[Any]) -> Any:
    """A list of frames, which must be alike."""
    if not frames:
        raise BadSampleError("empty video", "no frames")
    if not all(isinstance(frame, Image.Image) for frame in frames):
        if not all(isinstance(frame, (np.ndarray, torch.Tensor)) for frame in frames):
            kinds = ", ".join(sorted({type(frame).__name__ for frame in frames}))
            raise BadSampleError("not a video", f"a list of {kinds}; frames are PIL images or arrays")
        arrays = [frame if isinstance(frame, torch.Tensor) else torch.from_numpy(frame) for frame in frames]
        if len({(tuple(array.shape), array.dtype) for array in arrays}) > 1:
            raise BadSampleError("unsupported frames", "the frames of a list differ in shape or dtype")
        stacked = torch.stack(arrays)
        return _channels_last(stacked if isinstance(frames[0], torch.Tensor) else stacked.numpy())
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise BadSampleError("unsupported frames", f"frames of different sizes: {sorted(sizes)[:3]}")
    return frames


def _channels_last(array: Any) -> np.ndarray:
    """[T, H, W, C] of uint8 or floating numbers, whichever order and library it comes in."""
    torchlike = isinstance(array, torch.Tensor)
    if torchlike:
        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    kinds = "[T, H, W, C] or [T, C, H, W] with C from 1 to 4"
    if array.ndim != 4:
        hint = "; one picture is [1, H, W, C]" if array.ndim in (2, 3) else ""
        raise BadSampleError("unsupported frames", f"an array of shape {array.shape}, not {kinds}{hint}")
    first, last = (array.shape[axis] in (1, 2, 3, 4) for axis in (1, 3))
    if not (first or last):
        raise BadSampleError("unsupported frames", f"an array of shape {array.shape}, not {kinds}")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise BadSampleError("unsupported frames", f"dtype {array.dtype}; allowed: uint8, or float in 0..1")
    return array.transpose(0, 2, 3, 1) if first and (torchlike or not last) else array


def _as_image(frame: Any) -> Image.Image:
    if isinstance(frame, Image.Image):
        return frame
    if frame.dtype != np.uint8:
        if not np.isfinite(frame).all():
            raise BadSampleError("not finite", "NaN or infinity among the pixels")
        low, high = float(frame.min()), float(frame.max())
        if low < -1e-3 or high > 1 + 1e-3:  # interpolation overshoots a little
            raise BadSampleError("value range", f"pixels {low:g}..{high:g}, where 0..1 is black to white")
        frame = np.rint(np.clip(frame, 0, 1).astype(np.float32) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(frame[:, :, 0] if frame.shape[2] == 1 else frame))
