"""A random reading of a video: a clip, its speed and direction, and one crop, flip and colour for all of its frames.

In a recipe::

    views: {video: [{type: video-augment, clip: [0.5, 1.0], crop: [0.5, 1.0], flip: 0.5, speeds: [1, 2, 4]}]}
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from mmrep.config import config
from mmrep.modalities.video._base import VIEWED
from mmrep.modalities.video.decode import Video
from mmrep.tokens import Inputs
from mmrep.views.view import Params, View, uniform

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class VideoAugment(View):
    """Time is changed before anything is decoded (`sample`); space and colour on the device (`batch`).

    All frames of a video, and so all its clips, are changed alike. Every number is drawn from the sample's seed, so a
    video is changed in the same way alone or in any batch. The changes themselves are torchvision's (transforms.v2).
    """

    @config
    class Config:
        """Ranges; with every range at its neutral value, and ``jitter`` off, the view changes nothing.

        within: the part of the video, from where to where in 0..1, in which the window lies. clip: lowest and highest
        share of that part's frames that a random window has; every window of that length is equally likely, the first
        and the last included. jitter: draw the phase of the encoder's sampling: a random
        frame in each part (sampling "uniform"), or a random place of the clip (sampling "fps"). speeds: one is drawn.
        The window of speed s is s / (highest speed) as long and is played s times as fast, so that videos of all speeds
        seem equally long. reverse: probability of playing backwards. drop: probability of each frame to be left out;
        one stays. crop: lowest and highest share of the area. ratio: width over height of the crop, as against the
        frame's own, lowest and highest, log-uniform. flip: probability of mirroring left-right. brightness, contrast,
        saturation: factor in 1 - x .. 1 + x. hue: up to this share of a full turn either way. grayscale: probability.
        role: what the reading is for.
        """

        clip: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.5, 1.0)
        within: tuple[Share, Share] = (0.0, 1.0)
        jitter: bool = True
        speeds: tuple[Positive, ...] = (1.0,)
        reverse: Share = 0.0
        drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
        crop: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.5, 1.0)
        ratio: tuple[Positive, Positive] = (0.75, 4 / 3)
        flip: Share = 0.5
        brightness: Share = 0.2
        contrast: Share = 0.2
        saturation: Share = 0.2
        hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
        grayscale: Share = 0.0
        role: Literal["global", "local", "context", "target", "corrupt"] = "global"

        def __post_init__(self) -> None:
            if self.within[0] == self.within[1]:
                raise ValueError(f"within: from {self.within[0]:g} to {self.within[1]:g} there is no video")
            for name in ("clip", "within", "crop", "ratio"):
                low, high = getattr(self, name)
                if low > high:
                    raise ValueError(f"{name}: the lowest, {low}, is above the highest, {high}")
            if not self.speeds:
                raise ValueError("speeds: at least one; [1] for no change")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config: VideoAugment.Config = config
        self.role = config.role

    def sample(self, decoded: Any, seed: int) -> Video:
        """Choose a window of an open `Video`, and how it is played; nothing is decoded.

        The result's ``params`` are ``start`` and ``length``, the window's share of the frames; ``speed`` and
        ``speed_label``, its place among ``speeds``; ``reverse`` and ``phase``.
        """
        c, video = self.config, decoded
        assert isinstance(video, Video)
        key = torch.tensor([seed % 2**63])
        u = uniform(key, 6, stream=1)[0].tolist()
        label = min(int(u[0] * len(c.speeds)), len(c.speeds) - 1)
        speed = c.speeds[label]
        share = (c.clip[0] + (c.clip[1] - c.clip[0]) * u[1]) * speed / max(c.speeds)
        total = len(video)
        begin = min(int(c.within[0] * total), total - 1)
        part = max(int(c.within[1] * total) - begin, 1)
        count = max(round(share * part), 1)
        first = begin + min(int(u[2] * (part - count + 1)), part - count)
        video = video.window(first, count)
        if c.drop:
            gone = (uniform(key, count, stream=2)[0] < c.drop).numpy()
            gone[int(u[3] * count) % count] = False
            video = video.without(gone)
        reverse = u[4] < c.reverse
        video = (video.reversed() if reverse else video).faster(speed)
        phase = u[5] if c.jitter else 0.5
        noted = {"start": first / total, "length": count / total, "speed": float(speed), "speed_label": label,
                 "reverse": reverse, "phase": phase}  # fmt: skip
        return replace(video, phase=phase, params=noted)

    def batch(self, inputs: Inputs, seeds: Tensor) -> tuple[Inputs, Params]:
        """Change ``inputs["frames"]``: uint8, or float in 0..1, [B, …, 3, H, W], to float32 in 0..1.

        Returns:
            The inputs, without what `sample` noted, and the parameters:

            - what `sample` noted, each [B];
            - ``crop`` [B, 4]: left, top, right, bottom in 0..1; ``flip`` bool [B], done after it;
            - ``brightness``, ``contrast``, ``saturation``: factors [B]; ``hue`` [B], in turns; ``grayscale`` bool [B];
              done in this order.
        """
        noted = {name.removeprefix(VIEWED): value for name, value in inputs.items() if name.startswith(VIEWED)}
        rest = {name: value for name, value in inputs.items() if not name.startswith(VIEWED)}
        frames = rest["frames"]
        frames = frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()
        params = self._draw(seeds.to(frames.device), *frames.shape[-2:])
        if len(frames):
            frames = torch.stack([self._change(one, params, row) for row, one in enumerate(frames)])
        return {**rest, "frames": frames}, {**noted, **params}

    def _draw(self, seeds: Tensor, height: int, width: int) -> Params:
        c, u = self.config, uniform(seeds, 10)
        area = c.crop[0] + (c.crop[1] - c.crop[0]) * u[:, 0]
        low, high = math.log(c.ratio[0]), math.log(c.ratio[1])
        ratio = torch.exp(low + (high - low) * u[:, 1])
        wide, tall = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)
        size = torch.tensor([width, height], device=u.device)
        sides = (torch.stack([wide, tall], 1) * size).round().clamp_min(1)
        corner = torch.minimum((u[:, 2:4] * (size - sides + 1)).floor(), size - sides)
        factor = 2 * u[:, 4:8] - 1
        return {
            "crop": torch.cat([corner, corner + sides], 1) / size.repeat(2),
            "flip": u[:, 8] < c.flip,
            "brightness": 1 + factor[:, 0] * c.brightness,
            "contrast": 1 + factor[:, 1] * c.contrast,
            "saturation": 1 + factor[:, 2] * c.saturation,
            "hue": factor[:, 3] * c.hue,
            "grayscale": u[:, 9] < c.grayscale,
        }

    def _change(self, frames: Tensor, params: Params, row: int) -> Tensor:
        """One video [..., 3, H, W], float in 0..1."""
        (H, W), c = frames.shape[-2:], self.config
        edges = params["crop"][row] * frames.new_tensor([W, H, W, H])
        left, top, right, bottom = (round(edge) for edge in edges.tolist())
        if (left, top, right, bottom) != (0, 0, W, H):
            frames = V.resized_crop(frames, top, left, bottom - top, right - left, [H, W], antialias=True)
        frames = V.horizontal_flip(frames) if params["flip"][row] else frames
        for name, change in _COLOURS.items():
            if getattr(c, name):
                frames = change(frames, float(params[name][row]))
        return V.rgb_to_grayscale(frames, num_output_channels=3) if params["grayscale"][row] else frames


_COLOURS = {
    "brightness": V.adjust_brightness,
    "contrast": V.adjust_contrast,
    "saturation": V.adjust_saturation,
    "hue": V.adjust_hue,
}
