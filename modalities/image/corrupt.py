"""Pictures that are ruined on purpose, for an objective that asks what they were: noise, and missing frequencies.

In a recipe, with a clean reading of the same crop for the target (see `mmrep.views.chain`)::

    views:
      image:
        - &clean {type: image-augment, rotation: 15}
        - {type: chain, of: [*clean, {type: image-frequency, radius: 2}], follows: 0}
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.tokens import Inputs
from mmrep.views.view import Params, View, uniform

Role = Literal["global", "local", "context", "target", "corrupt"]


@config
class ImageFrequencyConfig:
    """radius: in cycles per picture; frequencies up to it are the low ones. low: probability of removing these, rather
    than the others. role: what the reading is for.
    """

    radius: Annotated[float, Field(ge=0)] = 16.0
    low: Annotated[float, Field(ge=0, le=1)] = 0.5
    role: Role = "corrupt"


class ImageFrequency(View):
    """Low or high frequencies are taken out (MFM, Xie et al. 2022, arXiv:2206.07706, section 3.2).

    The result may leave 0..1.
    """

    Config = ImageFrequencyConfig

    def __init__(self, config: ImageFrequencyConfig) -> None:
        super().__init__(config)
        self.radius, self.low, self.role = config.radius, config.low, config.role

    def batch(self, inputs: Inputs, seeds: Tensor) -> tuple[Inputs, Params]:
        """Change ``inputs["pixels"]``: uint8, or float in 0..1, [B, C, H, W], to float32.

        Returns:
            The inputs, and ``removed`` bool [B, H, W]: which frequencies were, in the order of `torch.fft.fft2`.
        """
        pixels = as_float(inputs["pixels"])
        H, W = pixels.shape[-2:]
        rows, columns = (torch.fft.fftfreq(n, 1 / n, device=pixels.device) for n in (H, W))
        inside = torch.hypot(rows[:, None], columns) <= self.radius
        low = uniform(seeds.to(pixels.device), 1)[:, :, None] < self.low
        removed = torch.where(low, inside, ~inside)
        spectrum = torch.fft.fft2(pixels).masked_fill(removed[:, None], 0)
        return {**inputs, "pixels": torch.fft.ifft2(spectrum).real}, {"removed": removed}


@config
class ImageNoiseConfig:
    """steps: of the diffusion; the share of noise at each is that of a cosine schedule. lowest, highest: of them is
    drawn, both included. role: what the reading is for.
    """

    steps: Annotated[int, Field(ge=1)] = 1000
    lowest: Annotated[int, Field(ge=0)] = 1
    highest: Annotated[int, Field(ge=0)] = 1000
    role: Role = "corrupt"

    def __post_init__(self) -> None:
        if not self.lowest <= self.highest <= self.steps:
            raise ValueError(f"lowest={self.lowest}, highest={self.highest}: in order, and at most steps={self.steps}")


class ImageNoise(View):
    """The forward process of a diffusion: ``sqrt(a_t) x + sqrt(1 - a_t) e`` of pixels in -1..1, e normal.

    (Ho et al. 2020, arXiv:2006.11239, equation 4; ``a_t = cos^2(pi / 2 * (t / T + s) / (1 + s)) / a_0``, s = 0.008:
    Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17.) The result is in 0..1 as the input, or beyond.
    """

    Config = ImageNoiseConfig

    def __init__(self, config: ImageNoiseConfig) -> None:
        super().__init__(config)
        self.config: ImageNoiseConfig = config
        self.role = config.role

    def batch(self, inputs: Inputs, seeds: Tensor) -> tuple[Inputs, Params]:
        """Change ``inputs["pixels"]``: uint8, or float in 0..1, [B, C, H, W], to float32.

        Returns:
            The inputs, and ``level`` [B]: t / T, 0 to 1.
        """
        c, pixels = self.config, as_float(inputs["pixels"])
        seeds = seeds.to(pixels.device)
        t = c.lowest + (uniform(seeds, 1)[:, 0] * (c.highest - c.lowest + 1)).floor().clamp_max(c.highest - c.lowest)
        kept = signal(t / c.steps)[:, None, None, None]
        size = pixels[0].numel() if len(pixels) else 0
        # Box and Muller 1958: two uniform numbers make a normal one.
        u = uniform(seeds, 2 * size, stream=1).view(len(pixels), 2, *pixels.shape[1:])
        noise = (-2 * u[:, 0].clamp_min(2.0**-25).log()).sqrt() * (2 * torch.pi * u[:, 1]).cos()
        noised = kept.sqrt() * (2 * pixels - 1) + (1 - kept).sqrt() * noise
        return {**inputs, "pixels": (noised + 1) / 2}, {"level": t / c.steps}


def signal(level: Tensor) -> Tensor:
    """The share of the variance that is signal, ``a_t``, of ``t / T``."""

    def share(at: Tensor) -> Tensor:
        return (torch.pi / 2 * (at + 0.008) / 1.008).cos().square()

    return (share(level) / share(torch.zeros_like(level))).clamp(0, 1)


def as_float(pixels: Tensor) -> Tensor:
    """Uint8, or float in 0..1, to float32 in 0..1."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
