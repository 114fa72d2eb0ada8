"""Tokens of other fields of a sample, as company for the visible tokens of the one that is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmrep.model import Model
from mmrep.step import Step, idle
from mmrep.tokens import Encoding, Grid, Tokens


class Given(nn.Module):
    """The encoder's tokens of each given field, mapped to the width of the context, plus a vector for the field.

    A sample that lacks a field has nothing of it. As they sit in another geometry they are marked special, so that no
    predictor gives them a position of its own.

    Args:
        names: the given fields.
        model, fields: where their towers are.
        width: of the context's tokens.
    """

    def __init__(self, names: Sequence[str], model: Model, fields: dict[str, str], width: int) -> None:
        super().__init__()
        self.names = tuple(names)
        encoders = [model.tower(fields[name]).encoder for name in names]
        self.maps = nn.ModuleList(nn.Linear(encoder.width, width) for encoder in encoders)
        self.marks = nn.ParameterList(nn.Parameter(0.02 * torch.randn(width)) for _ in names)

    def forward(self, step: Step, field: str, context: Tokens, index: Tensor, groups: int) -> tuple[Tokens, Tensor]:
        """The context [B * groups, Nc, D] of the samples that have ``field``, and its ``index``, with the company."""
        here = step.present(field)
        values, valid, coords = [context.values], [context.grid.valid], [context.grid.coords]
        special, indices = [context.grid.special], [index]
        for name, linear, mark in zip(self.names, self.maps, self.marks, strict=True):
            if not step.has(name):
                encoder = step.tower(name).encoder
                values[0] = values[0] + idle(encoder) + idle(linear) + mark.sum() * 0
                continue
            found: Encoding = step.encoding(name)
            there, n = step.present(name), found.tokens.values.shape[1]
            rows = torch.full((len(here),), -1, device=here.device)
            rows[there] = torch.arange(int(there.sum()), device=here.device)
            rows = rows[here]
            at = rows.clamp_min(0)
            mapped = (linear(found.tokens.values) + mark)[at]
            known = found.tokens.grid.valid[at] & (rows >= 0)[:, None]
            values.append(mapped.masked_fill(~known[..., None], 0).repeat_interleave(groups, 0))
            valid.append(known.repeat_interleave(groups, 0))
            coords.append(coords[0].new_zeros(len(index), n, coords[0].shape[-1]))
            special.append(torch.ones_like(valid[-1]))
            indices.append(torch.full_like(valid[-1], -1, dtype=torch.long))
        grid = Grid(coords=torch.cat(coords, 1), valid=torch.cat(valid, 1), special=torch.cat(special, 1))
        joined = torch.cat([v.to(values[0].dtype) for v in values], 1)
        return replace(context, values=joined, grid=grid, positions=None), torch.cat(indices, 1)
