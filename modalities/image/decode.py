"""Any form of one picture to an upright 8-bit PIL image: the single door through which pictures come in.

What a naive ``Image.open(path).convert("RGB")`` gets wrong is put right here: EXIF orientation, transparency (which
would show whatever colour lies under it), 16-bit depth (which would be clipped to white), a pixel cap that holds before
anything is decoded, and an error a run can count and survive.
"""

from __future__ import annotations

import logging
import struct
import zlib
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mmrep.data.raw import is_location, raw_stream, unwrap
from mmrep.encoder import BadSampleError

logger = logging.getLogger(__name__)

MAX_PIXELS = 1 << 26  # 67 million, 200 MB as RGB; below the size at which PIL itself starts to warn
# Only plain raster formats: PIL would also run Ghostscript on EPS, and has readers that nobody needs or hardens.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
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


def decode(
    raw: Any,
    *,
    mode: str = "RGB",
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    at_least: int | None = None,
) -> Image.Image:
    """Decode one picture.

    Args:
        raw: a path, ``file://`` or ``data:`` URL, bytes, binary file object, PIL image, dict with ``bytes`` and/or
            ``path`` (as Hugging Face datasets store undecoded pictures), numpy array [H, W] or [H, W, C], or torch
            tensor [H, W] or [C, H, W]. C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA); values are bool, uint8,
            uint16 or float in 0..1.
        mode: ``"RGB"`` or ``"L"``.
        background: what shows through transparency, 0..255.
        max_pixels: refuse larger pictures before decoding them. PIL itself refuses 179 million in any case.
        at_least: if the picture is a JPEG, it may be shrunk by 2, 4 or 8 while it is decoded, as long as its shorter
            side keeps so many pixels. None: full size.

    Returns:
        An upright image of ``mode``; the first frame if there are several.

    Raises:
        BadSampleError: it cannot be read; the cause is one of ``missing file``, ``unreadable file``, ``url``, ``not an
            image``, ``too many pixels``, ``truncated image``, ``damaged image``, ``empty image``, ``not finite``,
            ``value range``, ``unsupported pixels``.
    """
    raw = unwrap(raw)
    if isinstance(raw, torch.Tensor):
        raw = raw.detach().cpu()
        raw = raw.float() if raw.dtype == torch.bfloat16 else raw
        raw = (raw.permute(1, 2, 0) if raw.ndim == 3 else raw).numpy()
    if isinstance(raw, np.ndarray):
        image = _from_array(raw, max_pixels)
    elif isinstance(raw, Image.Image):
        image = upright(raw, max_pixels)
    elif is_location(raw):
        with raw_stream(raw, "an image") as stream:
            image = load_stream(stream, max_pixels, at_least)
    else:
        image = load_stream(raw_stream(raw, "an image"), max_pixels, at_least)
    return _flatten(image, background).convert(mode)


def load_stream(stream: Any, max_pixels: int, at_least: int | None = None) -> Image.Image:
    """Decode a picture file, turned upright, in the mode that it has; see `decode`."""
    Image.init()
    try:
        image = Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        raise BadSampleError("not an image", "no known picture format, or its header is damaged") from error
    except _BOMBS as error:
        raise BadSampleError("too many pixels", str(error)) from error
    except _DECODER_ERRORS as error:
        raise _unreadable(error) from error
    return upright(image, max_pixels, at_least)


def upright(image: Image.Image, max_pixels: int, at_least: int | None = None) -> Image.Image:
    """Check the size in the header, decode, turn upright."""
    width, height = image.size
    if width * height > max_pixels:
        raise BadSampleError("too many pixels", f"{width} x {height} is more than {max_pixels}")
    if width * height == 0:
        raise BadSampleError("empty image", f"{width} x {height} pixels")
    try:
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        image.load()
    except _BOMBS as error:
        raise BadSampleError("too many pixels", str(error)) from error
    except _DECODER_ERRORS as error:
        raise _unreadable(error) from error
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except _DECODER_ERRORS as error:
        logger.debug("unreadable EXIF data ignored: %s", error)
        return image


def _unreadable(error: Exception) -> BadSampleError:
    cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
    return BadSampleError("truncated image" if cut else "damaged image", str(error))


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any PIL mode to ``RGB`` or ``L``."""
    if image.mode.startswith("I") or image.mode == "F":  # I, I;16, I;16B: grey of 16 bits; F: grey in 0..1
        values = np.asarray(image)
        return Image.fromarray(_to_bytes(values if image.mode == "F" else _to_uint16(values)))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    try:
        return image.convert("L" if image.mode == "1" else "RGB")
    except ValueError as error:
        raise BadSampleError("unsupported pixels", f"PIL mode {image.mode!r}: {error}") from error


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (2, 3, 4))):
        hint = "; the channels stand first: transpose it, or give a torch tensor" if _channels_first(array) else ""
        raise BadSampleError("unsupported pixels", f"an array of shape {array.shape}, not [H, W] or [H, W, 1..4]{hint}")
    if array.size == 0:
        raise BadSampleError("empty image", f"an array of shape {array.shape}")
    if array.shape[0] * array.shape[1] > max_pixels:
        raise BadSampleError("too many pixels", f"{array.shape[1]} x {array.shape[0]} is more than {max_pixels}")
    return Image.fromarray(np.ascontiguousarray(_to_bytes(array)))


def _channels_first(array: np.ndarray) -> bool:
    return array.ndim == 3 and array.shape[0] in (1, 2, 3, 4)


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """Values of any accepted dtype to uint8, scaled by the range that the dtype stands for, never by the content."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.newbyteorder("=") == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded to nearest
    if not np.issubdtype(array.dtype, np.floating):
        raise BadSampleError("unsupported pixels", f"dtype {array.dtype}; allowed: bool, uint8, uint16, float in 0..1")
    if not np.isfinite(array).all():
        raise BadSampleError("not finite", "NaN or infinity among the pixels")
    _check_range(array, 1.0, slack=1e-3)  # interpolation overshoots a little
    return np.rint(np.clip(array, 0, 1).astype(np.float32) * 255).astype(np.uint8)


def _to_uint16(array: np.ndarray) -> np.ndarray:
    """PIL holds some 16-bit pictures as 32-bit integers; a range beyond that has no agreed white."""
    _check_range(array, 65535, slack=0)
    return array.astype(np.uint16)


def _check_range(array: np.ndarray, top: float, slack: float) -> None:
    low, high = float(array.min()), float(array.max())
    if low < -slack or high > top + slack:
        raise BadSampleError("value range", f"pixels {low:g}..{high:g}, where 0..{top:g} is black to white")
