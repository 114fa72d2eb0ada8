"""Synthesised audio: the examples and the odd values with which audio encoders are checked."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_FULL = 1 << 16


def examples(n: int, seed: int) -> list[Any]:
    """``n`` clips of 0.1 to 1 s: every form of raw audio, several rates, mono and stereo."""
    return [_FORMS[i % len(_FORMS)](seed * 31 + i, 1 + (5 * i + 3 * seed) % 7) for i in range(n)]


def oddities(seed: int, max_duration: float) -> dict[str, Any]:
    """Audio at and past the edge of what can be read, by what is odd about it."""
    wave = signal("chirp", 4000, seed).astype(np.float32) / (1 << 15)
    flac = file_bytes(signal("noise", 8000, seed), 16000, "FLAC", "PCM_16")
    spoiled = {name: wave.copy() for name in ("nan", "inf", "huge")}
    spoiled["nan"][17], spoiled["inf"][17], spoiled["huge"][17] = np.nan, -np.inf, 1e30
    return {
        "no samples": (wave[:0], 16000),
        "one sample": (wave[:1], 16000),
        "one sample of a high rate": (wave[:1], 192_000),
        "100 samples": (wave[:100], 16000),
        "silence": (np.zeros(5000, np.float32), 16000),
        "constant": (np.ones(5000, np.float32), 16000),
        "NaN": (spoiled["nan"], 16000),
        "infinity": (spoiled["inf"], 16000),
        "beyond float32": (wave.astype(np.float64) * 1e300, 16000),
        "one huge sample": (spoiled["huge"], 16000),
        "integers as floats": (wave * (1 << 15), 16000),
        "4 Hz": (wave, 4),
        "8 kHz": (wave[:1000], 8000),
        "192 kHz": (wave, 192_000),
        "11,025.5 Hz": (wave, 11_025.5),
        "44,101 Hz": (wave, 44_101),
        "a rate that is no number": (wave, "16 kHz"),
        "24 bits in 32": (signal("chirp", 4000, seed).astype(np.int32) << 8, 16000),
        "64-bit integers": (signal("chirp", 4000, seed).astype(np.int64), 16000),
        "complex": (wave.astype(np.complex64), 16000),
        "strings": (np.array(["a", "b"]), 16000),
        "three axes": (wave.reshape(2, 10, 200), 16000),
        "eight channels": (wave.reshape(8, 500), 16000),
        "nine channels": (wave[:3996].reshape(9, 444), 16000),
        "which axis is which": (wave[:16].reshape(4, 4), 16000),
        "samples before channels": (wave.reshape(2000, 2), 16000),
        "no rate": wave,
        "no rate in a dict": {"array": wave},
        "half a FLAC file": flac[: len(flac) // 2],
        "no audio in a FLAC file": flac[:100],
        "an empty file": b"",
        "a text file": b"This is a text, and no sound at all. " * 50,
        "an empty dict": {"bytes": None, "path": None},
        "no such file": "/no/such/file.wav",
        "too long": (np.zeros((1, int(max_duration * 8000) + 1), np.int8), 8000),
    }


def signal(kind: str, n: int, seed: int) -> np.ndarray:
    """``n`` samples, int16, by integer arithmetic alone: the same on every machine."""
    t = np.arange(n, dtype=np.int64)
    step = 400 + (seed * 977) % 3000
    if kind == "tone":
        return _triangle(t * step)
    if kind == "chirp":
        return _triangle(t * step // 4 + t * t * (1 + seed % 3) // 4)
    if kind == "clicks":
        return np.where(t % (700 + 97 * (seed % 11)) < 12, 20_000, -30).astype(np.int16)
    if kind == "noise":
        mixed = (t + seed * 7919 + 1) * 2_654_435_761 % (1 << 32)
        mixed = (mixed ^ (mixed >> 15)) * 2_246_822_519 % (1 << 32)
        return ((mixed >> 17) - (1 << 14)).astype(np.int16)
    return np.zeros(n, np.int16)


def file_bytes(samples: np.ndarray, rate: int, form: str, subtype: str) -> bytes:
    """An audio file of int16 or float [samples] or [channels, samples]."""
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, samples.T, rate, format=form, subtype=subtype)
    return stream.getvalue()


def _triangle(phase: np.ndarray) -> np.ndarray:
    """A triangle wave of period 65536 in ``phase``, at a third of full scale."""
    ramp = phase % _FULL
    return ((np.where(ramp < _FULL // 2, ramp, _FULL - 1 - ramp) - _FULL // 4) * 2 // 3).astype(np.int16)


def _faded(samples: np.ndarray) -> np.ndarray:
    """Swelling from silence and back, so that the parts of a clip differ."""
    n = len(samples)
    t = np.arange(n, dtype=np.int64)
    return (samples.astype(np.int64) * np.minimum(t + 1, n - t) * 2 // (n + 1)).astype(np.int16)


def _stereo(first: str, second: str, n: int, seed: int) -> np.ndarray:
    return np.stack([signal(first, n, seed), signal(second, n, seed)])


# A seed and a size of 1 to 7 to one raw value; the lengths are odd on purpose.
_FORMS: tuple[Callable[[int, int], Any], ...] = (
    lambda s, k: (_faded(signal("tone", 1601 * k, s)), 16_000),
    lambda s, k: {
        "array": _stereo("chirp", "clicks", 4407 * k, s).astype(np.float32) / (1 << 15),
        "sampling_rate": 44_100,
    },
    lambda s, k: file_bytes(_stereo("noise", "tone", 2203 * k, s), 22_050, "WAV", "PCM_24"),
    lambda s, k: (torch.from_numpy(_faded(signal("chirp", 797 * k, s))).double() / (1 << 15), 8_000),
    lambda s, k: {"bytes": file_bytes(signal("clicks", 1103 * k, s), 11_025, "FLAC", "PCM_16"), "path": None},
    lambda s, k: (signal("noise", 4801 * k, s).astype(np.int32) << 14, 48_000),
    lambda s, k: (np.zeros(3200 * k, np.uint8) + 128, 32_000),
    lambda s, k: (signal("tone", 9607 * k, s).astype(np.float64)[:, None].repeat(2, 1) / (1 << 15), 96_000),
)
