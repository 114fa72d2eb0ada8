"""Rows of a table of numbers, with gaps: one token a column (T-JEPA, arXiv:2410.05016, section 3)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mmrep import BadSampleError, Encoder
from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.tokens import Content, Encoding, Grid, Tokens


class Tabular(Encoder):
    """A value times its column's vector, plus the column's place; a gap is padding. One token in front regularises."""

    @config
    class Config:
        """columns: of the table. width: D. depth: blocks. heads: attention heads."""

        columns: int = 30
        width: int = 32
        depth: int = 2
        heads: int = 2

    modality = "tabular"
    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})

    def __init__(self, config, files=None):
        super().__init__(config, files)
        self.width, self.depth = config.width, config.depth
        self.scale = nn.Parameter(torch.randn(config.columns, config.width))
        self.place = nn.Parameter(torch.randn(config.columns, config.width))
        self.special = nn.Parameter(0.02 * torch.randn(1, 1, config.width))
        self.blocks = Transformer(config.width, config.depth, config.heads)
        self.norm = nn.LayerNorm(config.width)

    def examples(self, n, seed):
        rows = np.random.default_rng(seed).normal(size=(n, self.config.columns))
        for i, row in enumerate(rows):
            row[1 : 1 + i % 3] = np.nan
        return list(rows)

    def oddities(self, seed):
        columns = self.config.columns
        return {
            "one known value": np.where(np.arange(columns) == 2, 1.0, np.nan),
            "nothing known": np.full(columns, np.nan),
            "another table": np.zeros(columns + 1),
            "infinite": np.full(columns, np.inf),
            "text": "3, 4",
        }

    def prepare(self, raw, *, view=None, seed=0):
        if not isinstance(raw, (np.ndarray, list)):
            raise BadSampleError("not a row", type(raw).__name__)
        row = np.asarray(raw, dtype=np.float32)
        if row.shape != (self.config.columns,):
            raise BadSampleError("wrong shape", f"{row.shape}, not [{self.config.columns}]")
        if np.isinf(row).any() or np.isnan(row).all():
            raise BadSampleError("no numbers", "an infinite value, or none at all")
        row = torch.from_numpy(row if view is None else view.sample(row, seed))
        return {"row": row.nan_to_num(), "known": ~row.isnan()}

    def summary(self, item):
        return item["row"]

    def tokenize(self, inputs):
        row = inputs["row"].to(self.scale.dtype)
        places = self.place.expand(len(row), -1, -1)
        values = row[..., None] * self.scale + places
        front = self.special.expand(len(row), -1, -1)
        values, places = (torch.cat([front, part], 1) for part in (values, places))
        index = torch.arange(-1, row.shape[1], device=row.device).clamp_min(0)
        coords = index.to(torch.float32)[None, :, None].expand(len(row), -1, -1)
        special = (torch.arange(row.shape[1] + 1, device=row.device) == 0).expand(len(row), -1)
        return Tokens(values, Grid(coords, nn.functional.pad(inputs["known"], (1, 0), value=True), special), places)

    def content(self, inputs):
        row, known = (nn.functional.pad(inputs[key], (1, 0))[..., None] for key in ("row", "known"))
        return Content(row, known)

    def encode(self, tokens, keep=None, layers=()):
        self.check_request(keep, layers)
        kept = tokens.keep(keep)
        values, asked = self.blocks(kept.values, kept.grid.valid, layers)
        return Encoding(Tokens(self.norm(values), kept.grid), layers=asked)

    def no_weight_decay(self):
        return {"scale", "place", "special"}
