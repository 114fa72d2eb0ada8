"""Hugging Face video models: VideoMAE, V-JEPA 2, TimeSformer, ViViT, X-CLIP and PE-AV, with their own preprocessing.

In a recipe::

    encoder: {type: hf-video, path: facebook/vjepa2-vitl-fpc64-256, frames: 16}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.encoder import BadSampleError
from mmrep.hub.pretrained import load_pretrained, load_processor, locate, rebuild
from mmrep.modalities.video._base import VideoEncoder
from mmrep.modalities.video._hf_models import FAMILIES, Family, choose
from mmrep.modalities.video.sampling import Sampling
from mmrep.tokens import Encoding, Grid, Inputs, Tokens


@config
class HFVideoConfig(Sampling):
    """Fields of an ``hf-video``, beside its sampling.

    path: a folder, a hub id, or ``package:name/folder`` for a folder inside an installed Python package. revision: hub
    branch, tag or commit. local_files_only: never touch the network. frames: None = as the model was trained, which is
    all that models but V-JEPA 2 and PE can read; PE's processor may say how many, else 16. pooler: keep the pooling
    layer of ViViT, for pool "native"; without it that layer would get no gradient. projection: keep what leads to the
    joint space of X-CLIP or PE, for pool "native". ``short`` must be "repeat".
    """

    path: str
    revision: str | None = None
    local_files_only: bool = False
    frames: Annotated[int, Field(ge=1)] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    pooler: bool = False
    projection: bool = True

    def __post_init__(self) -> None:
        if self.short != "repeat":
            raise ValueError("short='mask': these models read a fixed number of frames; use 'repeat'")


class HFVideo(VideoEncoder):
    """A Hugging Face video model without its task head, and its video processor.

    `prepare` lets the processor convert, resize and crop (to uint8); the model's device does what the processor would
    do next, rescaling and normalising, so that a batch view such as `video-augment` sees values in 0..1. Sampling is
    ours. Tokens are the class token (TimeSformer, ViViT; of each frame: X-CLIP), then the tubelets, time first;
    coordinates are (tubelet, row, column). The library's own call gives the same tokens; TimeSformer's in another
    order, time last, and X-CLIP's frame by frame.

    Choose the pool at the tower: ``mean`` for VideoMAE and V-JEPA 2, ``cls`` for TimeSformer and ViViT, ``native`` for
    X-CLIP and PE, whose pooled vector is the checkpoint's embedding. TimeSformer and X-CLIP cannot drop tokens, since
    they attend along the axes of their grid; PE cannot either. A token of PE is a whole frame.
    """

    Config = HFVideoConfig
    supports = frozenset({"tokens", "drop_tokens", "layers"})

    def __init__(self, config: HFVideoConfig, files: Path | None = None) -> None:
        if files is not None and (files / "config.json").is_file():
            source, options = str(files), {"local_files_only": True}
            model, hf_config = rebuild(files, choose)
            lacks = set()
        else:
            source = locate(config.path)
            options = {"revision": config.revision, "local_files_only": config.local_files_only}
            model, hf_config, lacks = load_pretrained(
                source, choose, noun="video", may_lack=("pooler.",), ignore=("predictor.",), **options
            )
        if config.pooler and (lacks or getattr(model, "pooler", None) is None):
            raise ValueError(f"path {config.path!r}: pooler is asked for, but the checkpoint has no values for one")
        family: Family = FAMILIES[hf_config.model_type]
        own = hf_config if family.own is None else getattr(hf_config, family.own)
        processor = _processor(source, family, **options)
        frames = _frames(config, family, own, processor)
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(Sampling)}
        super().__init__(config, files, sampling=Sampling(**{**fields, "frames": frames}))
        self.processor = processor
        if hasattr(model, "pooler") and not config.pooler:
            model.pooler = None
        if family.unpool is not None and not config.projection:
            family.unpool(model)
        self.family, self.hf_config, self.own, self.special = family, hf_config, own, family.special(own)
        self.model: Any = model if family.part is None else getattr(model, family.part)
        self.width, self.depth = own.hidden_size, own.num_hidden_layers
        self.pooled_width = getattr(hf_config, "pooler_output_size", None) if config.pooler else None
        if family.pool is not None and config.projection:
            self.pooled_width = family.pooled_width(hf_config)
        if not family.drops:
            self.supports = self.supports - {"drop_tokens"}

    def prepare_frame(self, frame: Image.Image) -> np.ndarray:
        """As an array, [H, W, 3]; the processor takes all frames at once.

        Raises:
            BadSampleError: it is so long and thin that the resized frame would exceed ``max_pixels``.
        """
        side, (short, long) = getattr(self.processor.size, "shortest_edge", None) or 0, sorted(frame.size)
        if side * side * long / short > self.sampling.max_pixels:
            raise BadSampleError(
                "extreme shape", f"{frame.size} pixels, resized to {side} on the shorter side, are many"
            )
        return np.asarray(frame)

    def prepare_frames(self, frames: Sequence[np.ndarray]) -> Inputs:
        """The processor's resizing and cropping: uint8 [N, 3, H, W]."""
        options: dict[str, Any] = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_last"}
        if self.family.images:
            made = self.processor(list(frames), return_tensors="pt", **options)
        else:
            made = self.processor([np.stack(frames)], do_sample_frames=False, return_tensors="pt", **options)
        values = next(iter(made.values()))
        return {"frames": values.reshape(-1, *values.shape[-3:])}

    def normalize(self, frames: Tensor) -> Tensor:
        """Uint8, or float in 0..1, [B, T, 3, H, W], by the processor's own arithmetic."""
        p = self.processor
        frames = frames if frames.dtype == torch.uint8 else frames * 255
        out = p.rescale_and_normalize(
            frames.flatten(0, 1), p.do_rescale, p.rescale_factor, p.do_normalize, p.image_mean, p.image_std
        )
        return out.view(frames.shape).to(next(self.model.parameters()).dtype)

    def clip_tokens(self, inputs: Inputs) -> Tokens:
        """``{"frames": [B, T, 3, H, W]}`` to embeddings; positions are added (V-JEPA 2 turns by them later instead)."""
        frames = inputs["frames"]
        B, T, _, H, W = frames.shape
        t, h, w = self.family.tubelet(self.own)
        shape = (T // t, H // (h or H), W // (w or W))
        some = frames if B else frames.new_zeros(1, *frames.shape[1:])  # the library cannot run on none
        if self.family.side is not None and shape[1:] != (self.family.side(self.own),) * 2:
            raise ValueError(f"frames of {H} x {W}: this model reads {self.own.crop_size} x the same")
        values = self.family.embed(self.model, self.normalize(some))
        if self.family.time_last:
            values = self._turned(values, shape[1] * shape[2])
        return Tokens(values[:B], Grid.regular(B, shape, special=self.special, device=values.device))

    def encode_clips(self, tokens: Tokens, layers: Sequence[int]) -> Encoding:
        """The model's blocks and last norm; layers are block outputs, not normed.

        The library knows no padding here: samples of equally many tokens go together.
        """
        grid, values = tokens.grid, tokens.values
        if grid.shape is not None:
            outs = self._run(
                values if len(values) else values.new_zeros(1, *values.shape[1:]), grid.shape, None, layers
            )
        else:
            outs = self._by_count(values, grid.valid, self._places(grid), layers)
        some, *asked = (out[: len(values)] for out in outs)
        pooled = self._pooled(outs[0])
        return Encoding(Tokens(some, grid), None if pooled is None else pooled[: len(values)], tuple(asked))

    def layer_modules(self) -> list[nn.Module]:
        """See `Encoder.layer_modules`."""
        return list(self.family.blocks(self.model))

    def save_files(self, folder: Path) -> None:
        """Write the model's own config and its processor's."""
        self.hf_config.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def no_weight_decay(self) -> set[str]:
        """Learned positions and class tokens."""
        ends = (
            "position_embeddings",
            "time_embeddings",
            "cls_token",
            "position_embedding",
            "position_embedding.weight",
        )
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def _pooled(self, values: Tensor) -> Tensor | None:
        if self.family.pool is not None:
            return self.family.pool(self.model, values)
        pooler = getattr(self.model, "pooler", None)
        return None if pooler is None else pooler(values)

    def _by_count(self, values: Tensor, valid: Tensor, places: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """`_run` on the valid tokens alone; zeros at padding."""
        counts = valid.sum(1)
        order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
        outs = [values * 0 for _ in range(1 + len(layers))]
        for count in counts.unique().tolist():
            if count:
                rows = (counts == count).nonzero()
                at = order[rows[:, 0], :count]
                found = self._run(values[rows, at], None, places[rows, at], layers)
                outs = [out.index_put((rows, at), new.to(out.dtype)) for out, new in zip(outs, found, strict=True)]
        return outs

    def _run(
        self, values: Tensor, shape: tuple[int, ...] | None, places: Tensor | None, layers: Sequence[int]
    ) -> list[Tensor]:
        """Blocks and norm on tokens without padding: the last output, normed, and those of ``layers``."""
        times = shape[0] if self.family.time_last and shape is not None else 0
        values = self._turned(values, times) if times else values
        found: dict[int, Tensor] = {}
        told = places if self.family.told is None else self.family.told(self.model, values)
        for number, block in enumerate(self.family.blocks(self.model), start=1):
            values = self.family.block(block, values, told)
            found[number] = values
        norm = self.family.norm(self.model)
        outs = [values if norm is None else norm(values), *(found[number] for number in layers)]
        return [self._turned(out, (out.shape[1] - self.special) // times) for out in outs] if times else outs

    def _places(self, grid: Grid) -> Tensor:
        """The place of each token in the full grid, int64 [B, N]."""
        side = 1 if self.family.side is None else self.family.side(self.own)
        time, row, column = grid.coords.long().unbind(-1)
        return (time * side + row) * side + column

    def _turned(self, values: Tensor, outer: int) -> Tensor:
        """Exchange time and place behind the class tokens; ``outer``: how many there are of what comes first now."""
        S = self.special
        cells = values[:, S:].unflatten(1, (outer, -1)).transpose(1, 2).flatten(1, 2)
        return torch.cat([values[:, :S], cells], 1)


def _processor(source: str, family: Family, **options: Any) -> Any:
    says = "how the model's frames are prepared: size, crop, mean and deviation"
    files = ("preprocessor_config.json", "processor_config.json")
    if family.images:
        return load_processor("AutoImageProcessor", source, noun="image processor", files=files, says=says, **options)
    files = ("video_preprocessor_config.json", *files)
    return load_processor("AutoVideoProcessor", source, noun="video processor", files=files, says=says, **options)


def _frames(config: HFVideoConfig, family: Family, hf_config: Any, processor: Any) -> int:
    """How many frames a clip has."""
    own = int(getattr(processor, "num_frames", None) or 16) if not family.frames else getattr(hf_config, family.frames)
    asked = own if config.frames is None else config.frames
    t = family.tubelet(hf_config)[0]
    if asked != own and not family.any_length:
        raise ValueError(f"frames={asked}: {config.path!r} reads exactly {own} frames")
    if asked % t:
        raise ValueError(f"frames={asked}: {config.path!r} reads frames by {t}, so a multiple of that")
    return asked
