"""A small line plot of one series, drawn with PIL alone."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

_SIZE, _MARGIN, _FINER = (240, 120), 4, 2
# Okabe and Ito's colours, told apart by the colour-blind too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def plot(values: np.ndarray, times: np.ndarray) -> Image.Image:
    """Draw each channel over time, scaled to its own range: an RGB image of 240 x 120.

    Args:
        values: float [L, C] with NaN for gaps, at which the line breaks; the first eight channels are drawn.
        times: float [L], not decreasing.
    """
    image = Image.new("RGB", (_SIZE[0] * _FINER, _SIZE[1] * _FINER), "white")
    draw = ImageDraw.Draw(image)
    width, height = (edge - 2 * _MARGIN * _FINER for edge in image.size)
    span = times[-1] - times[0]
    x = _MARGIN * _FINER + width * ((times - times[0]) / span if span > 0 else np.full(len(times), 0.5))
    for channel, color in zip(values.T.astype(np.float64), _COLORS, strict=False):
        seen = ~np.isnan(channel)
        if not seen.any():
            continue
        low, high = channel[seen].min(), channel[seen].max()
        share = (channel - low) / (high - low) if high > low else np.where(seen, 0.5, np.nan)
        y = _MARGIN * _FINER + height * (1 - share)
        for run in _runs(seen):
            points = [(float(x[i]), float(y[i])) for i in run]
            if len(points) == 1:
                (cx, cy), r = points[0], 1.5 * _FINER
                draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=color)
            else:
                draw.line(points, fill=color, width=_FINER, joint="curve")
    return image.resize(_SIZE, Image.Resampling.BOX)


def _runs(seen: np.ndarray) -> list[np.ndarray]:
    """The indices of each unbroken run of True."""
    at = np.flatnonzero(seen)
    return np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
