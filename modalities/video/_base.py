"""What every video encoder shares: reading the frames of a video, padding over time, several clips, and examples."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.encoder import BadSampleError, Encoder
from mmrep.modalities.video._clips import apart, rejoin, together
from mmrep.modalities.video.decode import Video, open_video
from mmrep.modalities.video.sampling import Sampling, choose, phases
from mmrep.tokens import Encoding, Inputs, Tokens
from mmrep.views import View

Triple = tuple[float, float, float]
VIEWED = "view."
"""What begins the names of inputs that hold a view's parameters; `VideoAugment` hands them on."""
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@config
class Preprocess(Sampling):
    """How a video becomes the network's input. It is part of the encoder and saved with it.

    size: side of the square frames, in pixels. resize: "crop" scales the shorter side to ``size / crop_share`` and cuts
    the centre; "squash" scales both sides and distorts. crop_share: share of the side that the centre crop keeps.
    interpolation: always with anti-aliasing. mean, std: per channel, of pixels in 0..1; the default maps to -1..1.
    """

    size: Annotated[int, Field(ge=1)] = 64
    resize: Literal["crop", "squash"] = "crop"
    crop_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: Triple = (0.5, 0.5, 0.5)
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (
        0.5,
        0.5,
        0.5,
    )


def fit_square(image: Image.Image, how: Preprocess) -> np.ndarray:
    """Resize one frame to uint8 [size, size, 3], with torchvision's roundings (``Resize``, then ``CenterCrop``).

    Raises:
        BadSampleError: it is so long and thin that the resized frame would exceed ``how.max_pixels``.
    """
    side = math.floor(how.size / how.crop_share)
    if how.resize == "squash":
        width = height = side
    else:
        short = min(image.size)
        width, height = (side if edge == short else int(side * edge / short) for edge in image.size)
    if width * height > how.max_pixels:
        raise BadSampleError("extreme shape", f"{image.size} pixels, resized to {side} on the shorter side, are many")
    if (width, height) != image.size:
        image = image.resize((width, height), _FILTERS[how.interpolation])
    left, top = (round((edge - how.size) / 2) for edge in (width, height))
    return np.array(image.crop((left, top, left + how.size, top + how.size)))


class VideoEncoder(Encoder):
    """Reads videos; subclasses add `clip_tokens` and `encode_clips`.

    `prepare` gives ``{"frames": uint8 [T, 3, H, W], "times": float32 [T]}``, seconds from the first frame of the video
    (or of a view's part of it); of several clips, each has one axis more in front, [K, T, …]. `collate` pads over time
    and adds ``valid`` bool [B, (K,) T].

    Args:
        config: the encoder's config.
        files: see `Encoder`.
        sampling: which frames are read; may be the config itself.
    """

    modality = "video"

    def __init__(self, config: Any, files: Path | None = None, *, sampling: Sampling) -> None:
        super().__init__(config, files)
        self.sampling = sampling

    def prepare_frames(self, frames: Sequence[Any]) -> Inputs:
        """The frames of all clips, as `prepare_frame` gave them, to tensors [N, …]. The default stacks arrays."""
        return {"frames": torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()}

    def prepare_frame(self, frame: Image.Image) -> Any:
        """One upright RGB picture to whatever `prepare_frames` takes; called once for each different frame."""
        raise NotImplementedError

    def preview(self, raw: Any) -> Image.Image:
        """The middle frame, at its own size."""
        with open_video(raw, self.sampling) as video:
            return video.read([len(video) // 2], Image.Image.copy)[0]

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One video to tensors; see `open_video` for what a video may be.

        With a view the encoder reads one clip, whose phase the view may have drawn; without, the ``clips`` of the
        config. What the view notes of itself comes along under names that begin with ``view.``.

        Raises:
            BadSampleError: the video cannot be read.
        """
        how = self.sampling
        with open_video(raw, how) as video:
            if view is not None:
                video = view.sample(video, seed)
            places = phases(how.clips) if view is None else phases(1) if video.phase is None else [video.phase]
            chosen = choose(video.times, video.end, how, places)
            found = self.prepare_frames(video.read(chosen.ravel().tolist(), self.prepare_frame))
        item = {**found, "times": torch.from_numpy(video.times[chosen.ravel()]).float()}
        if len(places) > 1:
            item = {key: value.view(len(places), -1, *value.shape[1:]) for key, value in item.items()}
        return {**item, **_notes(video)}

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad over time with zeros, at the end: see the class. ``view.`` tensors are stacked."""
        longest = max((item["times"].shape[-1] for item in items), default=1)
        lengths = torch.tensor([item["times"].shape[-1] for item in items])
        axis = items[0]["times"].ndim - 1 if items else 0
        padded = {
            key: torch.stack([value if key.startswith(VIEWED) else _pad(value, axis, longest) for value in values])
            for key, values in ((key, [item[key] for item in items]) for key in items[0])
        }
        valid = torch.arange(longest) < lengths[:, None]
        return {**padded, "valid": valid if axis == 0 else valid[:, None].expand(-1, items[0]["times"].shape[0], -1)}

    def length(self, item: Inputs) -> int:
        """The number of frames."""
        return item["times"].numel()

    def summary(self, item: Inputs) -> Tensor:
        """The mean frame, and the mean change from a frame to the next: float32 [2 * 3 * H * W]."""
        if "frames" not in item:
            return super().summary(item)
        frames = item["frames"].flatten(0, -4).float() / 255
        change = frames.diff(dim=0).abs().mean(0) if len(frames) > 1 else torch.zeros_like(frames[0])
        return torch.cat([frames.mean(0).flatten(), change.flatten()])

    def clip_tokens(self, inputs: Inputs) -> Tokens:
        """Inputs of single clips, [B, T, …], to tokens, special ones in front."""
        raise NotImplementedError

    def encode_clips(self, tokens: Tokens, layers: Sequence[int]) -> Encoding:
        """Tokens of single clips, some of which may be missing or padding, to an encoding."""
        raise NotImplementedError

    def tokenize(self, inputs: Inputs) -> Tokens:
        """Inputs to tokens; of several clips, their number is the first coordinate and the first axis of the shape."""
        times = inputs["times"]
        if times.ndim == 2:
            return self.clip_tokens(inputs)
        rows = {key: value.flatten(0, 1) for key, value in inputs.items() if not key.startswith(VIEWED)}
        return together(self.clip_tokens(rows), times.shape[1])

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Tokens to an encoding; each clip by itself."""
        self.check_request(keep, layers)
        kept = tokens.keep(keep)
        if kept.grid.coords.shape[-1] == self.axes:
            return self.encode_clips(kept, layers)
        rows, places = apart(kept)
        return rejoin(self.encode_clips(rows, layers), places)

    @property
    def axes(self) -> int:
        """How many coordinates a token of a single clip has: (time, row, column)."""
        return 3

    def examples(self, n: int, seed: int) -> list[Any]:
        """Videos of odd sizes and lengths: arrays of both libraries, animated WebP, list of pictures, still picture."""
        return [_KINDS[i % len(_KINDS)](_pattern(_LENGTHS[i % len(_LENGTHS)], 37 + 11 * (i % 3), 29 + 7 * (i % 5),
                                                 seed * 31 + i)) for i in range(n)]  # fmt: skip

    def oddities(self, seed: int) -> dict[str, Any]:
        """Short, tiny, empty, damaged and mistyped videos."""
        frames = _pattern(12, 40, 32, seed)
        opaque = np.ascontiguousarray(frames[..., :3])
        animated = _webp(frames)
        odd: dict[str, Any] = {
            "one pixel": opaque[:3, :1, :1],
            "one frame": opaque[:1],
            "one grey frame, as floats": torch.from_numpy(opaque[:1, :, :, :1]).permute(0, 3, 1, 2) / 255,
            "a long thin frame": np.zeros((2, 1, 4000, 3), np.uint8),
            "no frames": opaque[:0],
            "frames of no pixels": opaque[:, :0],
            "five channels": np.zeros((4, 8, 8, 5), np.uint8),
            "a dtype of 64 bits": opaque.astype(np.int64),
            "floats beyond 1": opaque.astype(np.float32),
            "not a number": np.full((2, 8, 8, 3), np.nan, np.float32),
            "a frame rate of zero": (opaque, 0),
            "a very high frame rate": (opaque, 1e6),
            "an empty list": [],
            "frames of different sizes": [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))],
            "a cut animation": animated[: len(animated) // 2],
            "no bytes": b"",
            "text": b"this is no video",
        }
        if find_spec("av") is not None:
            whole = _mp4(opaque)
            middle = len(whole) // 2
            odd["a whole container"] = whole
            odd["a damaged container"] = whole[:middle] + bytes(60) + whole[middle + 60 :]
            odd["a cut container"] = whole[: len(whole) * 3 // 4]
        return odd


class PixelEncoder(VideoEncoder):
    """A video encoder that resizes frames itself and normalises them on its device.

    Args:
        config: the encoder's config.
        files: see `Encoder`.
        preprocess: the preprocessing; may be the config itself.
    """

    def __init__(self, config: Any, files: Path | None = None, *, preprocess: Preprocess) -> None:
        super().__init__(config, files, sampling=preprocess)
        self.preprocess = preprocess
        # Not in the state: they belong to the config, and a checkpoint that disagreed with it would win silently.
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def prepare_frame(self, frame: Image.Image) -> np.ndarray:
        """Resize to uint8 [size, size, 3]."""
        return fit_square(frame, self.preprocess)

    def normalize(self, frames: Tensor) -> Tensor:
        """Uint8, or float in 0..1, [..., 3, H, W], to standardised floats in the dtype of the weights."""
        scaled = frames.to(self.mean.dtype) / 255 if frames.dtype == torch.uint8 else frames.to(self.mean.dtype)
        return (scaled - self.mean) / self.std


def _notes(video: Video) -> Inputs:
    return {VIEWED + name: torch.tensor(value) for name, value in video.params.items()}


def _pad(value: Tensor, axis: int, length: int) -> Tensor:
    missing = length - value.shape[axis]
    if not missing:
        return value
    shape = [missing if i == axis else n for i, n in enumerate(value.shape)]
    return torch.cat([value, value.new_zeros(shape)], axis)


_LENGTHS = (5, 11, 3, 1, 23)


def _pattern(length: int, width: int, height: int, seed: int) -> np.ndarray:
    """A smooth moving pattern, uint8 [length, height, width, 4], by integer arithmetic: the same on every machine."""
    t, y, x = np.mgrid[:length, :height, :width].astype(np.int64)
    waves = []
    for channel in range(4):
        step = 3 + (seed * 5 + channel * 7) % 11
        phase = (seed * 97 + channel * 61) % 512
        ramp = (x * step + y * (14 - step) + t * (9 + seed % 23) + phase) % 512
        waves.append(np.where(ramp < 256, ramp, 511 - ramp))
    return np.stack(waves, -1).astype(np.uint8)


def _webp(frames: np.ndarray) -> bytes:
    """Lossless, so that every version of the library gives the same pixels back."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=rest, duration=40, lossless=True, exact=True)
    return file.getvalue()


def _mp4(frames: np.ndarray) -> bytes:
    from mmrep.registry import require

    av: Any = require("av", "video")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


_KINDS = (
    lambda frames: (np.ascontiguousarray(frames[..., :3]), 10),
    _webp,
    lambda frames: [Image.fromarray(frame[..., :3]) for frame in frames],
    lambda frames: Image.fromarray(frames[0, ..., :3]),
    lambda frames: torch.from_numpy(frames[..., :3].copy()).permute(0, 3, 1, 2).float() / 255,
)
