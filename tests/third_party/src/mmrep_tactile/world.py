"""Things that are touched, seen and named; of some samples a field is missing."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mmrep.config import config
from mmrep.data.source import Source, SourceConfig

NAMES = [
    f"{size} {kind}" for size in ("small", "large") for kind in ("ring", "plate", "bar", "post", "corner", "cross")
]


@config
class WorldConfig(SourceConfig):
    """seed: of noise and of what is missing. n: samples. holes: share of missing fields."""

    seed: int = 0
    n: int = 240
    holes: float = 0.2
    group: str | None = "name"
    label: str | None = "name"


class World(Source):
    """Columns ``touch`` [T, 8, 8], ``image`` and ``name``."""

    Config = WorldConfig
    columns = ("touch", "image", "name")

    def __len__(self):
        return self.config.n

    def __getitem__(self, index):
        random = np.random.default_rng([self.config.seed, index])
        name = NAMES[index % len(NAMES)]
        pressure = shape(name)
        frames = [
            pressure * strength + random.normal(0, 0.05, (8, 8)) for strength in np.linspace(0.5, 1, 2 + index % 3)
        ]
        picture = np.clip(255 * (0.1 + 0.8 * pressure) + random.normal(0, 8, (8, 8)), 0, 255).astype(np.uint8)
        row = {"touch": np.stack(frames), "image": Image.fromarray(picture).resize((16, 16)), "name": name}
        for field in ("touch", "image"):
            if random.uniform() < self.config.holes:
                row[field] = None
        return self.make_sample(row, f"{self.config.seed}-{index}")


def shape(name):
    """The pressure of a thing, [8, 8] of 0 and 1."""
    size, kind = name.split()
    y, x = np.mgrid[:8, :8] - 3.5
    reach = 3.6 if size == "large" else 2.1
    distance = np.maximum(abs(x), abs(y))
    inside = distance <= reach
    return {
        "ring": inside & (distance > reach - 1.2),
        "plate": inside,
        "bar": inside & (abs(y) < 1),
        "post": (abs(x) < 1) & (abs(y) < reach),
        "corner": inside & ((x < -reach + 2) | (y > reach - 2)),
        "cross": inside & ((abs(x) < 1) | (abs(y) < 1)),
    }[kind].astype(float)
