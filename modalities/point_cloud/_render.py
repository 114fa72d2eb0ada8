"""A small picture of a cloud, for reports and search results."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from mmrep.modalities.point_cloud.decode import Cloud

_TURN, _TILT = math.radians(35), math.radians(20)
_BLUE = np.array([0.22, 0.42, 0.69])


def render(cloud: Cloud, size: int = 224) -> Image.Image:
    """An orthographic view, y up, turned by 35 degrees and from 20 degrees above; what is nearer is darker.

    Args:
        cloud: at most a million points or so; one pixel holds the nearest.
        size: side of the square RGB picture, in pixels.
    """
    centre = (cloud.points.max(0) + cloud.points.min(0)) / 2
    points = cloud.points - centre
    reach = np.sqrt((points**2).sum(1).max())
    points = points / reach if reach > 0 else points
    x, y, z = points.T
    across = x * math.cos(_TURN) + z * math.sin(_TURN)
    away = -x * math.sin(_TURN) + z * math.cos(_TURN)
    up = y * math.cos(_TILT) - away * math.sin(_TILT)
    depth = y * math.sin(_TILT) + away * math.cos(_TILT)  # towards the viewer
    radius = 1 if len(points) > 1500 else 2
    scale = size / 2 - radius - 1
    columns = np.rint(size / 2 + across * scale).astype(int)
    rows = np.rint(size / 2 - up * scale).astype(int)
    span = np.ptp(depth)
    near = (depth - depth.min()) / span if span > 0 else np.ones_like(depth)
    fade = (0.55 * (1 - near))[:, None]  # towards white
    colors = np.tile(_BLUE, (len(points), 1)) if cloud.colors is None else cloud.colors * 0.9
    shades = np.rint(255 * (colors * (1 - fade) + fade)).astype(np.uint8)
    order = depth.argsort(kind="stable")  # from far to near: of equal places the last assignment holds
    square = np.arange(-radius, radius + 1)
    down, right = (part.ravel() for part in np.meshgrid(square, square, indexing="ij"))
    picture = np.full((size, size, 3), 255, np.uint8)
    picture[rows[order][:, None] + down, columns[order][:, None] + right] = shades[order][:, None]
    return Image.fromarray(picture)
