"""Random changes of time series, a whole batch at once on the device.

In a recipe::

    views: {imu: [{type: series-augment, jitter: 0.05, scale: [0.8, 1.25], crop: [0.6, 1.0]}]}
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.modalities.time_series._resample import at, permutation, piecewise, warp
from mmrep.modalities.time_series._stats import standardize
from mmrep.modalities.time_series.decode import LARGEST
from mmrep.tokens import Inputs
from mmrep.views.view import Params, View, uniform

Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0)]
# Independent streams of one seed; each has room for 500 000 steps, jitter's are one a channel.
_DRAWS, _WARP, _SEGMENTS, _MAGNITUDE, _REMOVE, _ADD, _CHANNELS, _NOISE = range(8)


class SeriesAugment(View):
    """Changes in this order, each of which is off at its neutral value.

    *Crop*: a window of the steps, whose times begin again at 0. *Time warp*: the series is read at a speed that changes
    from segment to segment, from end to end (Um et al., arXiv:1706.00527; piecewise constant speed, linear
    interpolation); a value is observed where both neighbours it comes from are. *Permute*: cut into equal segments,
    which change places. *Remove*, *add*: a frequency of the whole series is taken out, or a wave is added (TF-C,
    arXiv:2206.08496). *Magnitude warp*: a factor that changes along the series (arXiv:1706.00527; geometric between the
    knots). *Scale*: one factor. *Jitter*: normal noise. *Drop channels*, *gap*: values become unobserved, unless
    nothing at all would be left. TS-TCC's weak view (arXiv:2106.14112) is scale and jitter, its strong one permute and
    jitter.

    Every number is drawn from the sample's seed alone, so a series is changed in the same way alone or in any batch.
    Padding stays padding; values that are not observed stay 0.
    """

    @config
    class Config:
        """Ranges; with every one neutral the view changes nothing.

        crop: share of the steps that is kept, lowest and highest. time_warp: speed of a segment up to exp(x) times the
        usual, either way. permute: most segments; 1 leaves the order. remove: number of frequencies to take out. add:
        number of waves to add. wave: their amplitude, up to this share of the channel's spread. magnitude_warp: factor
        at a knot up to exp(x), either way. knots: segments of both warps. scale: factor, lowest and highest,
        log-uniform, one a channel. jitter: standard deviation over the channel's spread. drop_channels: probability for
        each channel. gap: up to this share of the steps, in one piece, in all channels. role: what the reading is for.
        """

        crop: tuple[Share, Share] = (1.0, 1.0)
        time_warp: Annotated[float, Field(ge=0, le=5)] = 0.0
        permute: Annotated[int, Field(ge=1, le=64)] = 1
        remove: Annotated[int, Field(ge=0)] = 0
        add: Annotated[int, Field(ge=0)] = 0
        wave: Annotated[float, Field(ge=0)] = 0.5
        magnitude_warp: Annotated[float, Field(ge=0, le=5)] = 0.0
        knots: Annotated[int, Field(ge=1)] = 4
        scale: tuple[Factor, Factor] = (0.9, 1.1)
        jitter: Annotated[float, Field(ge=0)] = 0.03
        drop_channels: Share = 0.0
        gap: Share = 0.0
        role: Literal["global", "local", "context", "target", "corrupt"] = "global"

        def __post_init__(self) -> None:
            for name in ("crop", "scale"):
                low, high = getattr(self, name)
                if low > high:
                    raise ValueError(f"{name}: the lowest, {low}, is above the highest, {high}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config: SeriesAugment.Config = config
        self.role = config.role

    def batch(self, inputs: Inputs, seeds: Tensor) -> tuple[Inputs, Params]:
        """Change ``values`` float32, ``observed`` bool [B, L, C], ``times`` and ``valid`` [B, L]; shapes stay.

        Returns:
            The inputs, and the parameters; those of a change that is off are absent.

            - ``start``, ``length`` int64 [B]: the steps of the input that were kept.
            - ``speed`` [B, knots]: of the time warp. ``source`` [B, L]: place among the kept steps that each step of
              the output was read from, after time warp and permutation.
            - ``segments`` int64 [B, permute]: which segment of the input stands at each place, -1 past the last.
            - ``removed`` int64 [B, remove]: cycles per series, 0 for none. ``added`` int64 [B, add] likewise.
            - ``magnitude`` [B, knots + 1, C], ``scale`` [B, C]: factors.
            - ``dropped`` bool [B, C]. ``gap`` int64 [B, 2]: first hidden step and number of hidden steps.
        """
        c = self.config
        values, observed = inputs["values"].float(), inputs["observed"]
        times, valid = inputs["times"], inputs["valid"]
        seeds = seeds.to(values.device)
        u = uniform(seeds, 4, _DRAWS)
        count = valid.sum(1)
        params: Params = {}

        if c.crop != (1.0, 1.0):
            share = c.crop[0] + (c.crop[1] - c.crop[0]) * u[:, 0]
            length = (share * count).round().long().clamp_min(1).minimum(count)
            start = (u[:, 1] * (count - length + 1)).long()
            steps = torch.arange(values.shape[1], device=values.device)
            inside = (steps >= start[:, None]) & (steps < (start + length)[:, None])
            possible = (observed & inside[..., None]).flatten(1).any(1)
            start, length = start * possible, torch.where(possible, length, count)
            params |= {"start": start, "length": length}
            places = steps + start[:, None]
            values, observed = at(values, places), at(observed, places)
            times, count = at(times, places), length
            times = times - times[:, :1]
            valid = steps < count[:, None]
            times, observed = times * valid, observed & valid[..., None]

        values, observed = self._move(values, observed, count, seeds, params)
        # One place for the series' own unit: jitter and waves are measured in it whatever the factors that come before.
        shape, _, spread = standardize(values, observed, dim=1)
        values = values + spread * self._frequencies(shape, count, seeds, params)
        values = self._factors(values, count, seeds, params)
        if c.jitter:
            values = values + c.jitter * spread * self._noise(values, seeds)
        observed = self._hide(observed, count, seeds, u[:, 2:], params)
        values = torch.where(observed, values.clamp(-LARGEST, LARGEST), 0.0)
        return {**inputs, "values": values, "observed": observed, "times": times, "valid": valid}, params

    def _move(
        self, values: Tensor, observed: Tensor, count: Tensor, seeds: Tensor, params: Params
    ) -> tuple[Tensor, Tensor]:
        """Time warp and permutation: where in the series each step is read."""
        c = self.config
        if not c.time_warp and c.permute == 1:
            return values, observed
        steps = torch.arange(values.shape[1], device=values.device).expand(len(seeds), -1)
        source = steps.float()
        if c.time_warp:
            speed = torch.exp(c.time_warp * _signed(uniform(seeds, c.knots, _WARP)))
            params["speed"] = speed
            source = warp(speed, count, values.shape[1])
        if c.permute > 1:
            order, moved = permutation(uniform(seeds, c.permute + 1, _SEGMENTS), count, values.shape[1])
            params["segments"] = order
            source = source.gather(1, moved)
        low = source.floor().long()
        rest = (source - low)[..., None]
        high = low + (rest[..., 0] > 0)
        seen = at(observed, low) & at(observed, high) & (steps < count[:, None])[..., None]
        possible = seen.flatten(1).any(1)[:, None]
        params["source"] = torch.where(possible, source, steps)
        moved = at(values, low) * (1 - rest) + at(values, high) * rest
        return torch.where(possible[..., None], moved, values), torch.where(possible[..., None], seen, observed)

    def _frequencies(self, shape: Tensor, count: Tensor, seeds: Tensor, params: Params) -> Tensor:
        """What to add to a standardised series (0 where it is not observed) to take out and put in frequencies."""
        c = self.config
        change = torch.zeros_like(shape)
        # Between constant and Nyquist, so that sine and cosine both exist and have the same norm.
        most = ((count - 1) // 2)[:, None]
        phase = 2 * math.pi * torch.arange(shape.shape[1], device=shape.device) / count.clamp_min(1)[:, None]
        inside = torch.arange(shape.shape[1], device=shape.device) < count[:, None]
        if c.remove:
            params["removed"] = torch.where(most > 0, 1 + (uniform(seeds, c.remove, _REMOVE) * most).long(), 0)
            for cycles in params["removed"].T:
                angle = phase * cycles[:, None]
                for wave in (angle.cos() * inside, angle.sin() * inside):
                    part = torch.einsum("bl,blc->bc", wave, shape + change) * (2 / count.clamp_min(1))[:, None]
                    part = torch.where(cycles[:, None] > 0, part, 0.0)
                    change = change - wave[..., None] * part[:, None]
        if c.add:
            u = uniform(seeds, 3 * c.add, _ADD).view(-1, c.add, 3)
            params["added"] = torch.where(most > 0, 1 + (u[..., 0] * most).long(), 0)
            for i, cycles in enumerate(params["added"].T):
                wave = (phase * cycles[:, None] + 2 * math.pi * u[:, i, 1:2]).cos()
                size = torch.where(cycles > 0, c.wave * u[:, i, 2], 0.0)
                change = change + (wave * size[:, None])[..., None]
        return change

    def _factors(self, values: Tensor, count: Tensor, seeds: Tensor, params: Params) -> Tensor:
        c = self.config
        channels = values.shape[2]
        if c.magnitude_warp:
            # A stream of numbers per channel, so that a channel's do not depend on how many others the batch has.
            u = torch.stack([uniform(seeds, c.knots + 1, _MAGNITUDE + 8 * i) for i in range(channels)], 2)
            exponent = c.magnitude_warp * _signed(u)
            params["magnitude"] = exponent.exp()
            values = values * piecewise(exponent, count, values.shape[1]).exp()
        low, high = (math.log(edge) for edge in c.scale)
        if low or high:
            params["scale"] = torch.exp(low + (high - low) * uniform(seeds, channels, _DRAWS + 8))
            values = values * params["scale"][:, None]
        return values

    @staticmethod
    def _noise(values: Tensor, seeds: Tensor) -> Tensor:
        """Standard normal numbers, by Box and Muller."""
        steps = values.shape[1]
        u = torch.stack([uniform(seeds, 2 * steps, _NOISE + 8 * i) for i in range(values.shape[2])], 2)
        radius = (-2 * torch.log1p(-u[:, 0::2])).sqrt()
        return radius * (2 * math.pi * u[:, 1::2]).cos()

    def _hide(self, observed: Tensor, count: Tensor, seeds: Tensor, u: Tensor, params: Params) -> Tensor:
        """Unobserve channels and a stretch of time; each is left out for samples of which nothing would remain."""
        c = self.config
        if c.drop_channels:
            dropped = uniform(seeds, observed.shape[2], _CHANNELS) < c.drop_channels
            dropped &= (observed & ~dropped[:, None]).any(1).any(1)[:, None]
            params["dropped"] = dropped
            observed = observed & ~dropped[:, None]
        if c.gap:
            size = (u[:, 0] * c.gap * count).round().long()
            start = (u[:, 1] * (count - size + 1)).long()
            steps = torch.arange(observed.shape[1], device=observed.device)
            hidden = (steps >= start[:, None]) & (steps < (start + size)[:, None])
            possible = (observed & ~hidden[..., None]).flatten(1).any(1)
            params["gap"] = torch.stack([start, size], 1) * possible[:, None]
            observed = observed & ~(hidden & possible[:, None])[..., None]
        return observed


def _signed(u: Tensor) -> Tensor:
    """From [0, 1) to [-1, 1)."""
    return 2 * u - 1
