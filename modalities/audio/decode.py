"""Any form of one piece of audio to a float32 waveform and its sampling rate: the single door for audio.

A sampling rate is never guessed: files carry theirs, and an array must come with one. A wrong rate is the silent error
of audio: the sound is read at another speed and pitch, and nothing fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from mmrep.data.raw import is_location, raw_stream, unwrap
from mmrep.encoder import BadSampleError
from mmrep.modalities.audio._files import read_file

MAX_DURATION = 600.0  # seconds; ten minutes of stereo at 48 kHz are 230 MB
MIN_RATE, MAX_RATE = 8_000, 192_000  # Hz
MAX_CHANNELS = 8
MAX_LEVEL = 2.0**32  # beyond any integer range given as floats; the square of more would overflow a spectrogram


class Waveform(NamedTuple):
    """Decoded audio; it is itself a raw value that `decode` takes.

    Attributes:
        values: float32 [channels, samples]; full scale of integer formats is -1..1.
        sampling_rate: samples a second, in Hz.
    """

    values: Tensor
    sampling_rate: int

    @property
    def seconds(self) -> float:
        """The duration."""
        return self.values.shape[1] / self.sampling_rate


def decode(raw: Any, *, max_duration: float = MAX_DURATION, at_most: float | None = None) -> Waveform:
    """Decode one piece of audio.

    Args:
        raw: a path, ``file://`` or ``data:`` URL, bytes, binary file object, dict with ``bytes`` and/or ``path`` (as
            Hugging Face datasets store undecoded audio): an audio file, or a video file, whose first audio track is
            read. Or samples with their rate: a pair ``(array, sampling_rate)``, a dict ``{"array": …,
            "sampling_rate": …}`` (Hugging Face's decoded audio), or a torchcodec decoder. An array is a numpy array,
            torch tensor or list, [samples] or [channels, samples]; [samples, channels] is taken where it can mean
            nothing else. Values are uint8 (silence at 128), int8, int16, int32, or floats, taken as they are.
        max_duration: refuse longer audio before decoding it, in seconds.
        at_most: decode only so many seconds from the start; the file must still keep to ``max_duration``.

    Returns:
        At least one sample of 1 to 8 channels, all finite.

    Raises:
        BadSampleError: it cannot be read; the cause is one of ``missing file``, ``unreadable file``, ``url``, ``not
            audio``, ``no sampling rate``, ``sampling rate``, ``no audio track``, ``damaged audio``, ``truncated
            audio``, ``empty audio``, ``too long``, ``not finite``, ``value range``, ``unsupported samples``.
        MissingPackageError: a video or AAC file without PyAV, the extra ``video``.
    """
    pair = _samples_and_rate(raw)
    if pair is not None:
        rate = check_rate(pair[1])
        return _finish(_from_array(pair[0]), rate, max_duration, at_most)
    raw = unwrap(raw)
    if is_location(raw):
        with raw_stream(raw, "audio") as stream:
            values, rate = read_file(stream, check_rate, max_duration, at_most)
    else:
        values, rate = read_file(raw_stream(raw, "audio"), check_rate, max_duration, at_most)
    return _finish(torch.from_numpy(values), rate, max_duration, at_most)


def check_rate(rate: Any) -> int:
    """A sampling rate as an int.

    Raises:
        BadSampleError: no whole number, or outside 8 to 192 kHz.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.integer, np.floating)) or rate != rate // 1:
        raise BadSampleError("sampling rate", f"{rate!r} is no whole number of samples a second")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise BadSampleError("sampling rate", f"{rate} Hz is outside {MIN_RATE} to {MAX_RATE} Hz")
    return int(rate)


def _samples_and_rate(raw: Any) -> tuple[Any, Any] | None:
    """The array and the rate of a raw value that holds samples; None for one that is or names a file."""
    if isinstance(raw, Mapping) and raw.get("array") is not None:  # such a dict names its file beside
        value = cast("Mapping[str, Any]", raw)
        if value.get("sampling_rate") is None:
            raise BadSampleError("no sampling rate", f'a dict of {", ".join(map(str, value))}; add "sampling_rate"')
        return value["array"], value["sampling_rate"]
    if isinstance(raw, (tuple, list)) and len(raw) == 2 and _is_array(raw[0]) and not _is_array(raw[1]):
        return raw[0], raw[1]
    all_samples = getattr(raw, "get_all_samples", None)  # of torchcodec.decoders.AudioDecoder
    if callable(all_samples):
        samples: Any = all_samples()
        return samples.data, samples.sample_rate
    if _is_array(raw):
        raise BadSampleError(
            "no sampling rate", "an array alone does not say how fast to play it; give (array, sampling_rate)"
        )
    return None


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor, list))


def _from_array(array: Any) -> Tensor:
    """Any accepted array to float32 [channels, samples]."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    else:
        try:
            array = np.asarray(array)
        except ValueError as error:  # a ragged list
            raise BadSampleError("unsupported samples", str(error)) from error
    values = _channels_first(_scaled(array))
    return torch.from_numpy(np.ascontiguousarray(values))


def _scaled(array: np.ndarray) -> np.ndarray:
    """Values to float32; integers by the range of their dtype, never by the content."""
    kind = array.dtype.newbyteorder("=")
    if kind == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    if kind in (np.int8, np.int16):
        return array.astype(np.float32) / (1 << (8 * kind.itemsize - 1))
    if kind == np.int32:
        return (array.astype(np.float64) / (1 << 31)).astype(np.float32)
    if np.issubdtype(kind, np.floating):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused as such
            return array.astype(np.float32)
    raise BadSampleError(
        "unsupported samples",
        f"dtype {array.dtype}; allowed: uint8, int8, int16, int32 and floats (others have no agreed full scale)",
    )


def _channels_first(array: np.ndarray) -> np.ndarray:
    if array.ndim == 1:
        return array[None]
    if array.ndim != 2:
        raise BadSampleError(
            "unsupported samples", f"an array of shape {array.shape}, not [samples] or [channels, samples]"
        )
    rows, columns = array.shape
    if rows == 1 or rows <= MAX_CHANNELS < columns or not array.size:
        return array
    if columns <= MAX_CHANNELS < rows:
        return array.T
    if rows > MAX_CHANNELS:
        raise BadSampleError("unsupported samples", f"an array of shape {array.shape} has more than 8 channels")
    raise BadSampleError(
        "unsupported samples",
        f"an array of shape {array.shape} may be [channels, samples] or [samples, channels]: too short to tell",
    )


def _finish(values: Tensor, rate: int, max_duration: float, at_most: float | None) -> Waveform:
    """The checks that every form of audio goes through."""
    if not values.numel():
        raise BadSampleError("empty audio", f"no samples (shape {tuple(values.shape)})")
    if len(values) > MAX_CHANNELS:
        raise BadSampleError("unsupported samples", f"{len(values)} channels; at most {MAX_CHANNELS}")
    if values.shape[1] > max_duration * rate:
        raise BadSampleError("too long", f"{values.shape[1] / rate:.1f} s is more than {max_duration:g} s")
    if at_most is not None:
        values = values[:, : max(1, round(at_most * rate))]
    if not bool(values.isfinite().all()):
        raise BadSampleError("not finite", "NaN or infinity among the samples")
    peak = float(values.abs().max())
    if peak > MAX_LEVEL:
        raise BadSampleError("value range", f"samples up to {peak:g}; full scale of floats is 1")
    return Waveform(values, rate)


def mix(values: Tensor, channels: int) -> Tensor:
    """Float [C, T] to [channels, T]: mono is the mean of all; stereo of other than two channels repeats the mean."""
    if len(values) == channels:
        return values
    return values.mean(0, keepdim=True).expand(channels, -1).contiguous()
