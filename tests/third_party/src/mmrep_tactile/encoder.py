"""Frames of a pressure sensor, [T, 8, 8] newtons, T as it comes: one token a frame."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mmrep import BadSampleError, Encoder
from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.tokens import Encoding, Grid, Tokens

SIDE = 8


class Tactile(Encoder):
    """A linear map of each frame, sine positions in time, a small transformer."""

    @config
    class Config:
        """width: D. depth: blocks. heads: attention heads."""

        width: int = 32
        depth: int = 2
        heads: int = 2

    modality = "tactile"
    supports = frozenset({"tokens", "drop_tokens", "layers"})

    def __init__(self, config, files=None):
        super().__init__(config, files)
        self.width, self.depth = config.width, config.depth
        self.embed = nn.Linear(SIDE * SIDE, config.width)
        self.blocks = Transformer(config.width, config.depth, config.heads)
        self.norm = nn.LayerNorm(config.width)

    def examples(self, n, seed):
        generator = np.random.default_rng(seed)
        return [generator.uniform(0, 2, (2 + i % 3, SIDE, SIDE)) for i in range(n)]

    def oddities(self, seed):
        return {
            "one frame": np.ones((1, SIDE, SIDE)),
            "no frame": np.zeros((0, SIDE, SIDE)),
            "another sensor": np.zeros((2, 4, 4)),
            "NaN": np.full((2, SIDE, SIDE), np.nan),
            "text": "press",
        }

    def prepare(self, raw, *, view=None, seed=0):
        if not isinstance(raw, (np.ndarray, list)):
            raise BadSampleError("not tactile", type(raw).__name__)
        frames = np.asarray(raw, dtype=np.float32)
        if frames.ndim != 3 or frames.shape[1:] != (SIDE, SIDE) or not len(frames):
            raise BadSampleError("wrong shape", f"{frames.shape}, not [T, {SIDE}, {SIDE}]")
        if not np.isfinite(frames).all():
            raise BadSampleError("not finite", "NaN or infinity among the pressures")
        if view is not None:
            frames = view.sample(frames, seed)
        return {"frames": torch.from_numpy(np.ascontiguousarray(frames))}

    def length(self, item):
        return len(item["frames"])

    def collate(self, items):
        longest = max((len(item["frames"]) for item in items), default=1)
        frames = torch.zeros(len(items), longest, SIDE, SIDE)
        valid = torch.zeros(len(items), longest, dtype=torch.bool)
        for row, item in enumerate(items):
            frames[row, : len(item["frames"])] = item["frames"]
            valid[row, : len(item["frames"])] = True
        return {"frames": frames, "valid": valid}

    def tokenize(self, inputs):
        grid = Grid.sequence(inputs["valid"])
        rates = torch.arange(1, self.width + 1, device=grid.coords.device) / 7
        positions = (grid.coords * rates).sin()
        weights = self.embed.weight.dtype
        return Tokens(self.embed(inputs["frames"].flatten(2).to(weights)) + 0.1 * positions.to(weights), grid)

    def encode(self, tokens, keep=None, layers=()):
        self.check_request(keep, layers)
        kept = tokens.keep(keep)
        values, asked = self.blocks(kept.values, kept.grid.valid, layers)
        return Encoding(Tokens(self.norm(values), kept.grid), layers=asked)
