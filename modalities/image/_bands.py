"""Pictures with any number of channels, in their own range: satellite bands, medical slices, microscopy.

`read_bands` is to these what `decode` is to pictures for the eye: every form of one picture to float32 [C, H, W], with
the numbers that the file holds. Nothing is scaled by dtype; the encoder standardises each channel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmrep.data.raw import is_location, raw_stream, unwrap
from mmrep.encoder import BadSampleError
from mmrep.modalities.image.decode import MAX_PIXELS, load_stream, upright
from mmrep.registry import require

_DTYPES = ("bool", "uint8", "int8", "uint16", "int16", "float16", "float32", "float64")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY = b"\x93NUMPY"
_HEADERS: dict[tuple[int, int], Callable[[BinaryIO], tuple[tuple[int, ...], bool, np.dtype]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_bands(raw: Any, channels: int, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read one picture.

    Args:
        raw: a numpy array [H, W, C] (or [C, H, W] where that alone has C channels), a torch tensor [C, H, W] (or [H, W,
            C]), [H, W] for one channel, a PIL image, or a file in any form that `raw_stream` takes: .npy, TIFF (several
            bands or several pages), or a picture format. Values are bool, 8 or 16-bit integers, or floats.
        channels: C.
        max_pixels: refuse H * W above it before decoding.

    Returns:
        float32 [C, H, W].

    Raises:
        BadSampleError: causes are those of `decode`, and ``wrong channels``.
    """
    raw = unwrap(raw)
    first = isinstance(raw, Tensor)
    if isinstance(raw, Tensor):
        raw = raw.detach().cpu()
        array = (raw.float() if raw.dtype == torch.bfloat16 else raw).numpy()
    elif isinstance(raw, np.ndarray):
        array = raw
    elif isinstance(raw, Image.Image):
        array = _of_picture(upright(raw, max_pixels))
    else:
        stream = raw_stream(raw, "an image")
        try:
            array, first = _of_stream(stream, max_pixels)
        finally:
            if is_location(raw):
                stream.close()
    return _checked(array, channels, first, max_pixels)


def _checked(array: np.ndarray, channels: int, first: bool, max_pixels: int) -> Tensor:
    """Any layout and dtype to float32 [C, H, W]."""
    if array.ndim == 2:
        array, first = array[None], True
    if array.ndim != 3:
        raise BadSampleError("unsupported pixels", f"an array of shape {array.shape}, not [H, W, C] or [C, H, W]")
    usual, other = (0, 2) if first else (2, 0)
    axis = other if array.shape[usual] != channels and array.shape[other] == channels else usual
    if array.shape[axis] != channels:
        raise BadSampleError(
            "wrong channels", f"{array.shape[axis]} channels in shape {array.shape}, where the encoder reads {channels}"
        )
    array = array if axis == 0 else array.transpose(2, 0, 1)
    if array.size == 0:
        raise BadSampleError("empty image", f"an array of shape {array.shape}")
    _check_pixels(array.shape[1], array.shape[2], max_pixels)
    if array.dtype.newbyteorder("=").name not in _DTYPES:
        raise BadSampleError("unsupported pixels", f"dtype {array.dtype}; allowed: {', '.join(_DTYPES)}")
    with np.errstate(over="ignore"):  # a float64 past float32 becomes infinite, and is refused as that
        values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not bool(values.isfinite().all()):
        raise BadSampleError("not finite", "NaN, infinity or a value past float32 among the pixels; fill them first")
    return values


def _of_stream(stream: BinaryIO, max_pixels: int) -> tuple[np.ndarray, bool]:
    """An array, and whether its channels stand first."""
    try:
        start = stream.tell()
        magic = stream.read(len(_NPY))
        stream.seek(start)
    except OSError as error:
        raise BadSampleError("unreadable file", str(error)) from error
    if magic == _NPY:
        return _of_npy(stream), False
    if magic[:4] in _TIFF:
        return _of_tiff(stream, max_pixels)
    return _of_picture(load_stream(stream, max_pixels)), False


def _of_picture(image: Image.Image) -> np.ndarray:
    """A PIL image with the channels that it stores; a palette is looked up."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    array = np.asarray(image)
    if image.mode == "I":  # PIL holds some 16-bit pictures as 32-bit integers
        if array.min() < 0 or array.max() > 65535:
            raise BadSampleError("value range", f"32-bit integers {array.min()}..{array.max()}")
        return array.astype(np.uint16)
    return array


def _of_npy(stream: BinaryIO) -> np.ndarray:
    start = stream.tell()
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"version {version} of the format")
        shape, _, dtype = _HEADERS[version](stream)
        # The header is checked against the file before anything is allocated: a header may claim any size.
        here = stream.tell()
        left = stream.seek(0, os.SEEK_END) - here
        if dtype.hasobject:
            raise BadSampleError("unsupported pixels", "an .npy file of Python objects, which is a pickle")
        need = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if need > left:
            raise BadSampleError("truncated image", f"an .npy file of shape {shape} with {left} of {need} bytes")
        stream.seek(start)
        return np.load(stream, allow_pickle=False)
    except BadSampleError:
        raise
    except (ValueError, EOFError, OSError, SyntaxError, TypeError) as error:
        raise BadSampleError("damaged image", f".npy: {error}") from error


def _of_tiff(stream: BinaryIO, max_pixels: int) -> tuple[np.ndarray, bool]:
    """The first series of a TIFF: several samples a pixel, or several pages of one shape."""
    tifffile = require("tifffile", "tiff")
    try:
        with tifffile.TiffFile(stream) as file:
            series = file.series[0]
            # Axes of length 1 say nothing, unless they are the picture's own.
            kept = [(axis, n) for axis, n in zip(series.axes, series.shape, strict=True) if n != 1 or axis in "YX"]
            axes, shape = [axis for axis, _ in kept], [n for _, n in kept]
            if axes.count("Y") != 1 or axes.count("X") != 1 or len(axes) > 3:
                raise BadSampleError("unsupported pixels", f"a TIFF with axes {series.axes} of sizes {series.shape}")
            _check_pixels(shape[axes.index("Y")], shape[axes.index("X")], max_pixels)
            array = series.asarray().reshape(shape)
    except (BadSampleError, ImportError, MemoryError):
        raise
    except Exception as error:  # its parser lets a damaged file surface as almost anything
        raise BadSampleError("damaged image", f"TIFF: {type(error).__name__}: {error}") from error
    return array, axes[-1] == "X"


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadSampleError("too many pixels", f"{width} x {height} is more than {max_pixels}")
