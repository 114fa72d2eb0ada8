"""Frames through any image encoder, then over time: one token a frame.

In a recipe::

    encoder:
      type: video-frames
      frames: 8
      encoder: {type: open-clip-image, model: ViT-B-32, pretrained: laion2b_s34b_b79k}
      frame_pool: native
      frozen_frames: true
      depth: 2
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from mmrep.blocks import Transformer
from mmrep.config import Component, Of, component, config
from mmrep.encoder import BadSampleError
from mmrep.modalities.video._base import VIEWED, VideoEncoder
from mmrep.modalities.video.decode import open_video
from mmrep.modalities.video.sampling import Sampling
from mmrep.registry import encoders
from mmrep.tokens import Content, Encoding, Grid, Inputs, Tokens

_FOLDER = "frames"


class VideoFrames(VideoEncoder):
    """Any registered image encoder on each frame, its pool, and a small transformer over time.

    A token is a frame; its coordinate is its time in seconds. ``depth: 0`` leaves the frames as they are, so that pool
    "mean" averages them; nothing can then be dropped, and there are no layers. A batch holds the image encoder's inputs
    as [B, T, …] (``pixels`` are called ``frames``); its preprocessing and its files are saved with this encoder.

    With frozen frames and a transformer, frames can be hidden and what the image encoder made of them be predicted.
    """

    @config
    class Config(Sampling):
        """Fields of ``video-frames``, beside its sampling.

        encoder: an image encoder. frame_pool: its tokens to one vector a frame. frozen_frames: the image encoder and
        the pool get no gradient and stay in eval mode. depth: blocks of the transformer over time; 0 for none. heads:
        its attention heads; must divide the width of the pooled frames. mlp_ratio: hidden width of its MLPs over that
        width. dropout, drop_path: its probabilities.
        """

        encoder: Annotated[Component, Of("encoders")]
        frame_pool: Annotated[Component, Of("pools")] = field(default_factory=lambda: component("pools", "mean"))
        frozen_frames: bool = False
        depth: Annotated[int, Field(ge=0)] = 0
        heads: Annotated[int, Field(ge=1)] = 4
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0

        def __post_init__(self) -> None:
            modality = getattr(self.encoder.cls, "modality", None)
            if modality != "image":
                able = [n for n, cls in encoders.load_all().items() if getattr(cls, "modality", None) == "image"]
                raise ValueError(
                    f"encoder {self.encoder.type!r} reads {modality}; frames are pictures: one of {', '.join(able)}"
                )

    # What it can do with a transformer over frozen frames; an instance without one, or that learns, narrows it.
    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, sampling=config)
        self.config: VideoFrames.Config = config
        self.inner = config.encoder.build(files=None if files is None else files / _FOLDER)
        native = config.frame_pool.type == "native" and self.inner.pooled_width is not None
        self.frame_pool = config.frame_pool.build(self.inner.pooled_width if native else self.inner.width)
        self.width: int = self.frame_pool.width
        self.depth = config.depth
        self.transformer = self.norm = self.positions = None
        if config.depth:
            if self.width % config.heads:
                raise ValueError(f"heads={config.heads} does not divide the width of the pooled frames, {self.width}")
            self.transformer = Transformer(
                self.width,
                config.depth,
                config.heads,
                mlp_ratio=config.mlp_ratio,
                dropout=config.dropout,
                drop_path=config.drop_path,
            )
            self.norm = nn.LayerNorm(self.width)
            self.positions = nn.Parameter(0.02 * torch.randn(1, config.frames, self.width))
        else:
            self.supports = frozenset({"tokens"})
        if not config.frozen_frames:  # a target that learns is a target that collapses
            self.supports = self.supports - {"content", "mask_token"}
        if config.frozen_frames:
            self.inner.requires_grad_(False)
            self.frame_pool.requires_grad_(False)
            self.train(self.training)

    @classmethod
    def fit(cls, config: Config, samples: Iterable[Any], folder: Path) -> None:
        """Let the image encoder learn from the middle frames of the videos."""
        inner = folder / _FOLDER
        inner.mkdir(exist_ok=True)
        config.encoder.cls.fit(config.encoder.config, _MiddleFrames(samples, config), inner)
        if not any(inner.iterdir()):
            inner.rmdir()

    @property
    def axes(self) -> int:
        """A token has one coordinate, its time in seconds."""
        return 1

    def train(self, mode: bool = True) -> VideoFrames:
        """Switch training mode; a frozen image encoder stays in eval mode."""
        super().train(mode)
        if self.config.frozen_frames:
            self.inner.eval()
            self.frame_pool.eval()
        return self

    def prepare_frame(self, frame: Image.Image) -> Inputs:
        """The image encoder's own reading."""
        return self.inner.prepare(frame)

    def prepare_frames(self, frames: Sequence[Inputs]) -> Inputs:
        """Stack what the image encoder made of each frame: frames of one video are of one size."""
        return {_outer(key): torch.stack([frame[key] for frame in frames]) for key in frames[0]}

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad over time with the last frame, by the image encoder's own collation of all frames."""
        frame = [key for key in items[0] if _of_frames(key)]
        rest = super().collate([{k: v for k, v in item.items() if k not in frame} for item in items])
        shape = rest["times"].shape
        last = items[0]["times"].ndim - 1  # the axis of time
        flat: list[Inputs] = []
        for item in items:
            at = torch.arange(shape[-1]).clamp_max(item["times"].shape[-1] - 1)
            rows = {_inner(key): item[key].index_select(last, at).flatten(0, last) for key in frame}
            flat += [{key: row[i] for key, row in rows.items()} for i in range(shape[1:].numel())]
        together = self.inner.collate(flat)
        return {**rest, **{_outer(key): value.view(*shape, *value.shape[1:]) for key, value in together.items()}}

    def clip_tokens(self, inputs: Inputs) -> Tokens:
        """Inputs [B, T, …] to one token a frame, [B, T, D]; the whole image encoder runs here."""
        times, valid = inputs["times"], inputs["valid"]
        frames = {_inner(key): value.flatten(0, 1) for key, value in inputs.items() if _of_frames(key)}
        values, places = self._pooled(frames).unflatten(0, times.shape), None
        if self.positions is not None:
            places = self.positions[:, : times.shape[1]].to(values.dtype).expand_as(values)
            values = values + places
        special = torch.zeros_like(valid)
        full = bool(valid.all())
        grid = Grid(times[..., None].to(values.dtype), valid, special, times.shape[1:] if full else None)
        return Tokens(values, grid, places if "mask_token" in self.supports else None)

    def content(self, inputs: Inputs) -> Content:
        """See `Encoder.content`: the pooled frames [B, N, D] before their place is added (LV-MAE, arXiv:2504.03501).

        What stands for a frame that the clip does not have is not observed.
        """
        if "content" not in self.supports:
            return super().content(inputs)
        valid = inputs["valid"].flatten(1)  # of several clips, one after the other
        frames = {_inner(key): value for key, value in inputs.items() if _of_frames(key)}
        axes = inputs["times"].ndim
        values = self._pooled({key: value.flatten(0, axes - 1) for key, value in frames.items()})
        values = values.view(*valid.shape, self.width)
        return Content(values, valid[..., None].expand_as(values))

    def encode_clips(self, tokens: Tokens, layers: Sequence[int]) -> Encoding:
        """Frames see each other: [B, T, D], normed; the layers are block outputs, not normed."""
        if self.transformer is None or self.norm is None:
            return Encoding(tokens)
        full = tokens.grid.shape is not None or bool(tokens.grid.valid.all())
        values, asked = self.transformer(tokens.values, None if full else tokens.grid.valid, layers)
        return Encoding(Tokens(self.norm(values), tokens.grid), layers=asked)

    def save_files(self, folder: Path) -> None:
        """Write the image encoder's files into a folder of their own."""
        inner = folder / _FOLDER
        inner.mkdir(exist_ok=True)
        self.inner.save_files(inner)
        if not any(inner.iterdir()):
            inner.rmdir()

    def layer_modules(self) -> list[nn.Module]:
        """Those over time, to which the image encoder is what comes before; without them the image encoder's."""
        return self.inner.layer_modules() if self.transformer is None else list(self.transformer.blocks)

    def no_weight_decay(self) -> set[str]:
        """The image encoder's, and the positions in time."""
        own = set() if self.positions is None else {"positions"}
        return own | {f"inner.{name}" for name in self.inner.no_weight_decay()}

    def _pooled(self, frames: Inputs) -> Tensor:
        """[B * T, D]; of no frames too, which some libraries cannot run on."""
        count = len(next(iter(frames.values())))
        if not count:
            frames = {key: value.new_zeros(1, *value.shape[1:]) for key, value in frames.items()}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen_frames):
            return self.frame_pool(self.inner(frames))[:count]


class _MiddleFrames:
    """The middle frames of the videos that can be read; may be gone through twice."""

    def __init__(self, samples: Iterable[Any], how: Sampling) -> None:
        self.samples, self.how = samples, how

    def __iter__(self) -> Iterator[Image.Image]:
        for raw in self.samples:
            try:
                with open_video(raw, self.how) as video:
                    frame = video.read([len(video) // 2], Image.Image.copy)[0]
            except BadSampleError:  # it is quarantined when it is read for training
                continue
            yield frame


def _outer(key: str) -> str:
    """The image encoders' name for pixels, under the name that video views look for."""
    return "frames" if key == "pixels" else key


def _inner(key: str) -> str:
    return "pixels" if key == "frames" else key


def _of_frames(key: str) -> bool:
    return key not in ("times", "valid") and not key.startswith(VIEWED)
