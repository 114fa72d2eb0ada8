"""A toy modality for tests of the core: a raw value is a short list of numbers, each number is one token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mmrep.config import config
from mmrep.encoder import BadSampleError, Encoder
from mmrep.registry import encoders
from mmrep.tokens import Encoding, Grid, Tokens


@config
class ToyConfig:
    width: int = 8
    depth: int = 2
    dropout: float = 0.0


@encoders.register("toy")
class ToyEncoder(Encoder):
    Config = ToyConfig
    modality = "numbers"
    supports = frozenset({"tokens", "drop_tokens", "layers"})

    def __init__(self, config, files=None):
        super().__init__(config, files)
        self.width = config.width
        self.depth = config.depth
        self.embed = nn.Linear(1, config.width)
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.dropout = nn.Dropout(config.dropout)

    def examples(self, n, seed):
        return [[((7 * i + 3 * j + seed) % 11) / 5 - 1 for j in range(1 + (i + seed) % 4)] for i in range(n)]

    def prepare(self, raw, *, view=None, seed=0):
        if not isinstance(raw, (list, tuple)):
            raise BadSampleError("not numbers", repr(raw))
        if not raw:
            raise BadSampleError("empty list")
        if view is not None:
            raw = view.sample(raw, seed)
        return {"values": torch.tensor(raw, dtype=torch.float32)}

    def length(self, item):
        return len(item["values"])

    def collate(self, items: Sequence[dict]):
        longest = max(len(i["values"]) for i in items)
        values = torch.zeros(len(items), longest)
        valid = torch.zeros(len(items), longest, dtype=torch.bool)
        for row, item in enumerate(items):
            values[row, : len(item["values"])] = item["values"]
            valid[row, : len(item["values"])] = True
        return {"values": values, "valid": valid}

    def tokenize(self, inputs):
        grid = Grid.sequence(inputs["valid"])
        return Tokens(self.embed(inputs["values"][..., None]) + grid.coords * 0.1, grid)

    def encode(self, tokens, keep=None, layers=()):
        self.check_request(keep, layers)
        tokens = tokens.keep(keep)
        x, kept = tokens.values, []
        for number, block in enumerate(self.blocks, 1):
            x = self.dropout(torch.tanh(block(x))) + x
            kept.append(x) if number in layers else None
        return Encoding(Tokens(x, tokens.grid), layers=tuple(kept))
