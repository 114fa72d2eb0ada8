"""Pictures made by arithmetic alone: the examples of image encoders, and values at the edge of being a picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image


def examples(n: int, seed: int) -> list[Any]:
    """Pictures of odd sizes and several kinds: RGB, grey, RGBA, 16-bit grey array, palette, float tensor."""
    return [_KINDS[i % len(_KINDS)](_of_size(i, seed, 4)) for i in range(n)]


def oddities(seed: int) -> dict[str, Any]:
    """Values at and past the edge of what a picture may be, by what is odd about them."""
    picture = pattern(31, 23, seed)
    rgb = picture[:, :, :3]
    unit = rgb.astype(np.float32) / 255
    png, jpeg = _encoded(rgb, "PNG"), _encoded(rgb, "JPEG")
    palette = Image.fromarray(rgb).quantize(8)
    palette.info["transparency"] = 0
    return {
        "no rows": np.zeros((0, 9, 3), np.uint8),
        "no columns": np.zeros((9, 0, 3), np.uint8),
        "one pixel": rgb[:1, :1],
        "a line": np.repeat(rgb[:1, :1], 5000, 1),
        "a column": np.repeat(rgb[:1, :1], 5000, 0),
        "one grey level": np.full((9, 9, 3), 127, np.uint8),
        "black": np.zeros((9, 9), np.uint8),
        "two values": rgb[:, :, 0] > 127,
        "a vector": np.arange(9, dtype=np.uint8),
        "a number": np.uint8(3),
        "four axes": np.zeros((2, 9, 9, 3), np.uint8),
        "five channels": np.zeros((9, 9, 5), np.uint8),
        "channels first": np.ascontiguousarray(rgb.transpose(2, 0, 1)),
        "NaN": _with(unit, np.nan),
        "infinity": _with(unit, np.inf),
        "the largest float": _with(unit, float(np.finfo(np.float32).max)),
        "negative": unit - 1,
        "bytes as floats": rgb.astype(np.float32),
        "int32": rgb.astype(np.int32),
        "complex": rgb.astype(np.complex64),
        "objects": np.full((4, 4), None, dtype=object),
        "bfloat16": torch.from_numpy(unit).permute(2, 0, 1).bfloat16(),
        "float64": unit.astype(np.float64),
        "big-endian 16 bits": (rgb[:, :, 0].astype(">u2") * 257).astype(">u2"),
        "a picture of mode CMYK": Image.fromarray(rgb).convert("CMYK"),
        "a palette with transparency": palette,
        "wholly transparent": Image.fromarray(picture * np.array([1, 1, 1, 0], np.uint8)),
        "two frames": _encoded(rgb, "GIF", save_all=True, append_images=[Image.fromarray(255 - rgb)]),
        "turned by EXIF": _turned(rgb),
        "half of a PNG": png[: len(png) // 2],
        "half of a JPEG": jpeg[: len(jpeg) // 2],
        "a PNG with a damaged middle": png[: len(png) // 2] + bytes(64) + png[len(png) // 2 + 64 :],
        "a header alone": png[:24],
        "no bytes": b"",
        "zeros": bytes(1000),
        "text": b"This is a line of text, not a picture.\n" * 9,
        "a string that is no path": "a red cat",
        "no file": "/no/such/file.png",
        "an empty dict": {"bytes": None, "path": None},
        "nothing": None,
        "a list": [[1, 2], [3, 4]],
    }


def band_examples(n: int, seed: int, mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    """Pictures of odd sizes with a channel for each of ``mean``, within three deviations of it, in several forms."""
    out: list[Any] = []
    for i in range(n):
        values = _scaled(_of_size(i, seed, len(mean)), mean, std)
        out.append(_BAND_KINDS[i % len(_BAND_KINDS)](values))
    return out


def band_oddities(seed: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Values at and past the edge of what a picture of bands may be, by what is odd about them."""
    C = len(mean)
    values = _scaled(pattern(31, 23, seed, C), mean, std).astype(np.float32)
    file, rgb = _npy(values), pattern(31, 23, seed)[:, :, :3]
    return {
        "no rows": np.zeros((0, 9, C), np.float32),
        "no columns": np.zeros((9, 0, C), np.float32),
        "one pixel": values[:1, :1],
        "a line": np.repeat(values[:1, :1], 5000, 1),
        "a column": np.repeat(values[:1, :1], 5000, 0),
        "one value": np.full((9, 9, C), mean[0], np.float32),
        "one channel too many": np.concatenate([values, values[:, :, :1]], 2),
        "one channel too few": np.zeros((9, 9, C - 1), np.float32),
        "channels first": np.ascontiguousarray(values.transpose(2, 0, 1)),
        "a tensor with channels last": torch.from_numpy(values),
        "a vector": np.arange(9, dtype=np.float32),
        "a number": np.float32(3),
        "four axes": np.zeros((2, 9, 9, C), np.float32),
        "NaN": _with(values, np.nan),
        "infinity": _with(values, -np.inf),
        "the largest float": _with(values, float(np.finfo(np.float32).max)),
        "a float64 past float32": _with(values.astype(np.float64), 1e300),
        "int32": values.astype(np.int32),
        "int64": torch.from_numpy(values).permute(2, 0, 1).long(),
        "complex": values.astype(np.complex64),
        "objects": np.full((4, 4, C), None, dtype=object),
        "bfloat16": torch.from_numpy(values).permute(2, 0, 1).bfloat16(),
        "big-endian": values.astype(">f4"),
        "half of a file": file[: len(file) // 2],
        "a file whose header claims too much": file.replace(b"(23, 31", b"(99999", 1),
        "a file of objects": file.replace(b"'<f4',", b"'|O', ", 1),
        "a header alone": file[:20],
        "half of a PNG": _encoded(rgb, "PNG")[:200],
        "a damaged TIFF": b"II*\0" + bytes(range(200)),
        "no bytes": b"",
        "text": b"This is a line of text, not a picture.\n" * 9,
        "no file": "/no/such/file.npy",
        "an empty dict": {"bytes": None, "path": None},
        "nothing": None,
    }


def pattern(width: int, height: int, seed: int, channels: int = 4) -> np.ndarray:
    """A smooth picture, uint8 [height, width, channels], by integer arithmetic alone: the same on every machine."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    waves = []
    for channel in range(channels):
        step = 3 + (seed * 5 + channel * 7) % 11
        phase = (seed * 97 + channel * 61) % 512
        ramp = (x * step + y * (14 - step) + phase) % 512
        waves.append(np.where(ramp < 256, ramp, 511 - ramp))
    disc = (2 * x - width) ** 2 + (2 * y - height) ** 2 < (min(width, height) * (3 + seed % 4) // 8) ** 2
    marked = seed % min(channels, 3)
    waves[marked] = np.where(disc, 255 - waves[marked], waves[marked])
    return np.stack(waves, -1).astype(np.uint8)


def _of_size(i: int, seed: int, channels: int) -> np.ndarray:
    return pattern(37 + 11 * (i % 3), 29 + 7 * (i % 5), seed * 31 + i, channels)


_KINDS: tuple[Callable[[np.ndarray], Any], ...] = (
    lambda p: Image.fromarray(p[:, :, :3]),
    lambda p: Image.fromarray(p[:, :, 0]),
    lambda p: Image.fromarray(p),
    lambda p: p[:, :, 1].astype(np.uint16) * 257,
    lambda p: Image.fromarray(p[:, :, :3]).quantize(16),
    lambda p: torch.from_numpy(p[:, :, :3].copy()).permute(2, 0, 1).float() / 255,
)


_BAND_KINDS: tuple[Callable[[np.ndarray], Any], ...] = (
    lambda v: v.astype(np.float32),
    lambda v: torch.from_numpy(v.astype(np.float32)).permute(2, 0, 1).contiguous(),
    lambda v: _npy(v.astype(np.float32)),
    lambda v: np.rint(v).astype(np.int16) if np.abs(v).max() < 32767 and v.std() > 10 else v,
)


def _scaled(picture: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Bytes to float64 in the range of mean and deviation."""
    return np.asarray(mean) + np.asarray(std) * (picture / 127.5 - 1) * 2


def _npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values, allow_pickle=False)
    return out.getvalue()


def _with(values: np.ndarray, odd: float) -> np.ndarray:
    """A copy with one odd value in the middle."""
    out = values.copy()
    out[len(out) // 2, out.shape[1] // 2] = odd
    return out


def _encoded(rgb: np.ndarray, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, form, **options)
    return out.getvalue()


def _turned(rgb: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by a quarter
    return _encoded(rgb, "JPEG", exif=exif)
