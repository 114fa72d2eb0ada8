"""Random rotation, scale, place, jitter and loss of points, a whole batch at once on the device.

In a recipe::

    views: {cloud: [{type: point-augment, rotate: up, up: y, scale: [0.8, 1.25], drop: 0.3}]}
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.tokens import Inputs
from mmrep.views.view import Params, View, uniform

Share = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[float, Field(ge=0)]
_DRAWS = 16
_AXES = {"x": 0, "y": 1, "z": 2}


class PointAugment(View):
    """Crop and drop points, then one affine map of space per cloud, then jitter per point.

    Every number is drawn from the sample's seed (and a point's place in its cloud) alone, so a cloud is changed in the
    same way alone or in any batch. The map is ``x -> scale * (R @ x) + translation`` with R = rotation @ mirror, about
    the origin, which is the centroid of a cloud that was normalised to the unit sphere. Normals go through R, colours
    stay. Points that are lost are no longer ``valid``; a cloud keeps one point at least. It is not normalised again.
    """

    @config
    class Config:
        """Ranges, in the units of the prepared points; at their neutral values the view changes nothing.

        rotate: "up" turns about the ``up`` axis, "so3" by any rotation, all equally likely; "none". up: the axis.
        angle: for "up", up to so many degrees either way. scale: factor, lowest and highest, log-uniform. translate:
        up to so far either way, along each axis. mirror: probability of mirroring one axis at random of those that are
        not ``up``. jitter: standard deviation of normal noise on every coordinate. jitter_clip: its largest size. crop:
        share of the points to keep, lowest and highest; they are the nearest to one of the cloud's points, chosen at
        random. drop: each cloud loses up to this share of what the crop left, at random points. role: what the reading
        is for.
        """

        rotate: Literal["none", "up", "so3"] = "up"
        up: Literal["x", "y", "z"] = "y"
        angle: Annotated[float, Field(ge=0, le=180)] = 180.0
        scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.8, 1.25)
        translate: Length = 0.1
        mirror: Share = 0.0
        jitter: Length = 0.01
        jitter_clip: Length = 0.05
        crop: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (1.0, 1.0)
        drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
        role: Literal["global", "local", "context", "target", "corrupt"] = "global"

        def __post_init__(self) -> None:
            for name in ("scale", "crop"):
                low, high = getattr(self, name)
                if low > high:
                    raise ValueError(f"{name}: the lowest, {low}, is above the highest, {high}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config: PointAugment.Config = config
        self.role = config.role

    def batch(self, inputs: Inputs, seeds: Tensor) -> tuple[Inputs, Params]:
        """Change ``points`` float [B, N, 3], ``normals`` if there are any, and ``valid`` bool [B, N].

        Returns:
            The inputs, points in float32, and the parameters, each with the batch first:

            - ``matrix`` [B, 3, 3]: R, orthogonal; of determinant -1 where mirrored.
            - ``scale`` [B], ``translation`` [B, 3], ``mirror`` bool [B].
            - ``jitter`` [B, N, 3]: what was added to each point, after the map.
            - ``centre`` int64 [B]: the point around which the crop lies. ``kept`` bool [B, N]: the points left.
        """
        points, valid = inputs["points"].float(), inputs["valid"]
        seeds = seeds.to(points.device)
        u = uniform(seeds, _DRAWS)
        params = {**self._map(u), **self._loss(u, seeds, points, valid), "jitter": self._noise(seeds, points)}
        return self.apply(inputs, params), params

    def apply(self, inputs: Inputs, params: Params) -> Inputs:
        """Repeat a change on inputs of the same shape (another field of the same points)."""
        valid = inputs["valid"] & params["kept"]
        turned = turn(inputs["points"].float(), params["matrix"])
        moved = params["scale"][:, None, None] * turned + params["translation"][:, None] + params["jitter"]
        out = {**inputs, "valid": valid, "points": _blank(moved, valid)}
        if "normals" in inputs:
            out["normals"] = _blank(turn(inputs["normals"].float(), params["matrix"]), valid)
        return out

    def _map(self, u: Tensor) -> Params:
        c = self.config
        up = _AXES[c.up]
        low, high = math.log(c.scale[0]), math.log(c.scale[1])
        if c.rotate == "so3":
            rotation = any_rotation(u[:, :3])
        else:
            angle = math.radians(c.angle) * _signed(u[:, 0]) if c.rotate == "up" else torch.zeros_like(u[:, 0])
            rotation = about_axis(angle, up)
        mirror = u[:, 3] < c.mirror
        first = u[:, 4] < 0.5
        sign = torch.ones_like(u[:, :3])
        for axis, picked in zip([a for a in range(3) if a != up], (first, ~first), strict=True):
            sign[:, axis] = torch.where(mirror & picked, -1.0, 1.0)
        return {
            "matrix": rotation * sign[:, None, :],
            "scale": torch.exp(low + (high - low) * u[:, 5]),
            "translation": c.translate * _signed(u[:, 6:9]),
            "mirror": mirror,
        }

    def _loss(self, u: Tensor, seeds: Tensor, points: Tensor, valid: Tensor) -> Params:
        """Which points stay: the nearest to the centre of the crop, and of these those of the lowest random numbers."""
        c = self.config
        count = valid.sum(1)
        order = valid.cumsum(1)  # the n-th valid point has n, from 1
        wanted = (u[:, 9] * count).long().clamp(max=(count - 1).clamp_min(0)) + 1
        centre = (order == wanted[:, None]).int().argmax(1)  # the first of that number is the point itself
        kept = valid
        if c.crop[0] < 1:
            share = c.crop[0] + (c.crop[1] - c.crop[0]) * u[:, 10]
            place = points.gather(1, centre[:, None, None].expand(-1, 1, 3))
            x, y, z = (points - place).unbind(2)
            kept = lowest(x * x + y * y + z * z, kept, share)
        if c.drop > 0:
            kept = lowest(uniform(seeds, valid.shape[1], stream=1), kept, 1 - c.drop * u[:, 11])
        return {"kept": kept, "centre": centre}

    def _noise(self, seeds: Tensor, points: Tensor) -> Tensor:
        c = self.config
        N = points.shape[1]
        if c.jitter == 0 or c.jitter_clip == 0:
            return torch.zeros_like(points)
        # Each coordinate has a stream of its own, since a point's number must not depend on the length of the padding.
        pairs = [[uniform(seeds, N, stream=2 + 2 * axis + half) for half in range(2)] for axis in range(3)]
        normal = [normal_of(first, second) for first, second in pairs]
        return (c.jitter * torch.stack(normal, 2)).clamp(-c.jitter_clip, c.jitter_clip)


def turn(vectors: Tensor, matrix: Tensor) -> Tensor:
    """``matrix`` [B, 3, 3] times each of ``vectors`` [B, N, 3]: the same to the last bit in any batch.

    A matrix product would also lose digits under autocast, and on some GPUs without it.
    """
    x, y, z = (vectors[..., axis : axis + 1] * matrix[:, None, :, axis] for axis in range(3))
    return x + y + z


def any_rotation(u: Tensor) -> Tensor:
    """Rotation matrices [B, 3, 3], uniform over SO(3) for ``u`` [B, 3] uniform in the cube: a random unit quaternion.

    Shoemake, "Uniform random rotations", Graphics Gems III (1992).
    """
    a, b = (1 - u[:, 0]).sqrt(), u[:, 0].sqrt()
    one, two = 2 * math.pi * u[:, 1], 2 * math.pi * u[:, 2]
    x, y, z, w = a * one.sin(), a * one.cos(), b * two.sin(), b * two.cos()
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, 1).view(-1, 3, 3)


def about_axis(angle: Tensor, axis: int) -> Tensor:
    """Rotations [B, 3, 3] by ``angle`` [B] in radians about coordinate axis 0, 1 or 2, by the right-hand rule."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    out = torch.zeros(len(angle), 3, 3, device=angle.device)
    out[:, axis, axis] = 1
    out[:, first, first] = out[:, second, second] = angle.cos()
    out[:, second, first] = angle.sin()
    out[:, first, second] = -angle.sin()
    return out


def lowest(values: Tensor, among: Tensor, share: Tensor) -> Tensor:
    """Keep ``share`` [B] of the points of ``among`` bool [B, N], rounded, at least one: those of the lowest values."""
    count = (share * among.sum(1)).round().long().clamp_min(1)
    order = values.masked_fill(~among, torch.inf).argsort(dim=1, stable=True)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return among & (rank < count[:, None])


def normal_of(u: Tensor, v: Tensor) -> Tensor:
    """Standard normal numbers of two uniform ones in [0, 1) each (Box and Muller, 1958)."""
    return (-2 * torch.log1p(-u)).sqrt() * (2 * math.pi * v).cos()


def _blank(values: Tensor, valid: Tensor) -> Tensor:
    return values.masked_fill(~valid[..., None], 0)


def _signed(u: Tensor) -> Tensor:
    """From [0, 1) to [-1, 1)."""
    return 2 * u - 1
