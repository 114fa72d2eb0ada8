"""An encoder of plain numbers: vectors that something else computed, table rows, sets or sequences of them.

In a recipe::

    encoder: {type: features, inputs: 512, width: 256, hidden: 512}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.encoder import BadSampleError, Encoder
from mmrep.tokens import Encoding, Grid, Inputs, Tokens
from mmrep.views import View

_LARGEST = 1e15  # a layer norm squares it in float32
_NUMBERS = (bool, int, float, np.integer, np.floating, np.bool_)


class Features(Encoder):
    """Rows of numbers to tokens, one a row: a linear map or a small MLP, then, if asked for, a transformer.

    Without a transformer (``depth`` 0) the tokens are what the map gives, not normed, and rows do not know of each
    other; so there are no layers and nothing to be gained by dropping tokens. Coordinates are the row numbers.
    """

    @config
    class Config:
        """Fields of ``features``.

        inputs: D of the rows. width: of the tokens. hidden: units of the MLP that maps a row to a token; 0 is a linear
        map. depth, heads, mlp_ratio: size of the transformer; depth 0 is none. positions: none (the rows are a set) or
        the sines of the row number (a sequence; ``width`` is even then). class_token: put a class token in front; needs
        a transformer. max_rows: more are refused. dropout, drop_path: probabilities, in the transformer; drop_path
        rises linearly with depth.
        """

        inputs: Annotated[int, Field(ge=1)] = 16
        width: Annotated[int, Field(ge=1)] = 64
        hidden: Annotated[int, Field(ge=0)] = 0
        depth: Annotated[int, Field(ge=0)] = 0
        heads: Annotated[int, Field(ge=1)] = 4
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
        positions: Literal["none", "sincos"] = "none"
        class_token: bool = False
        max_rows: Annotated[int, Field(ge=1)] = 4096
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0

        def __post_init__(self) -> None:
            if self.depth and self.width % self.heads:
                raise ValueError(f"heads={self.heads} does not divide width={self.width}")
            if self.class_token and not self.depth:
                raise ValueError("class_token: without a transformer (depth: 0) it would never see a row")
            if self.positions == "sincos" and self.width % 2:
                raise ValueError(f"positions='sincos' needs an even width, got {self.width}")

    modality = "features"
    # What it can do with a transformer; an instance without one narrows it.
    supports = frozenset({"tokens", "drop_tokens", "layers"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files)
        self.width, self.depth = config.width, config.depth
        self.map: nn.Module = nn.Linear(config.inputs, config.width)
        if config.hidden:
            first, last = nn.Linear(config.inputs, config.hidden), nn.Linear(config.hidden, config.width)
            self.map = nn.Sequential(first, nn.GELU(), last)
        self.special = nn.Parameter(0.02 * torch.randn(1, 1, config.width)) if config.class_token else None
        self.transformer = self.norm = None
        if config.depth:
            self.transformer = Transformer(
                config.width, config.depth, config.heads, config.mlp_ratio, config.dropout, config.drop_path
            )
            self.norm = nn.LayerNorm(config.width)
        else:
            self.supports = frozenset({"tokens"})

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """One vector [D] or matrix [N, D] to ``{"rows": float32 [N, D]}``; a vector is one row.

        Args:
            raw: an array, tensor or list of bools, integers or floats.
            view: its ``sample`` gets and gives a float32 array [N, D].
            seed: the view's seed.

        Raises:
            BadSampleError: ``not numbers``, ``wrong shape``, ``wrong width`` (D is not ``inputs``), ``empty``, ``too
                long``, ``not finite`` or ``value range`` (beyond 1e15).
        """
        rows = _rows(raw)
        if rows.ndim not in (1, 2):
            raise BadSampleError("wrong shape", f"an array of shape {rows.shape}, not [D] or [N, D]")
        if rows.shape[-1] != self.config.inputs and rows.size:
            detail = f"rows of {rows.shape[-1]} numbers, where this encoder reads {self.config.inputs}"
            turned = rows.ndim == 2 and rows.shape[0] == self.config.inputs
            raise BadSampleError("wrong width", detail + ("; rows stand first: transpose it" if turned else ""))
        if not rows.size:
            raise BadSampleError("empty", f"an array of shape {rows.shape}")
        rows = np.atleast_2d(rows)
        if len(rows) > self.config.max_rows:
            raise BadSampleError("too long", f"{len(rows)} rows are more than max_rows={self.config.max_rows}")
        if not np.isfinite(rows).all():
            raise BadSampleError("not finite", "NaN or infinity among the numbers")
        if np.abs(rows.astype(np.float64)).max() > _LARGEST:
            raise BadSampleError("value range", f"a number beyond {_LARGEST:g}; use a larger unit")
        rows = rows.astype(np.float32)
        if view is not None:
            rows = np.ascontiguousarray(view.sample(rows, seed), dtype=np.float32)
        return {"rows": torch.from_numpy(rows)}

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad below: ``rows`` float32 [B, N, D] and ``valid`` bool [B, N]."""
        longest = max((len(item["rows"]) for item in items), default=1)
        rows = torch.zeros(len(items), longest, self.config.inputs)
        valid = torch.zeros(len(items), longest, dtype=torch.bool)
        for place, item in enumerate(items):
            rows[place, : len(item["rows"])] = item["rows"]
            valid[place, : len(item["rows"])] = True
        return {"rows": rows, "valid": valid}

    def length(self, item: Inputs) -> int:
        """The number of rows."""
        return len(item["rows"])

    def tokenize(self, inputs: Inputs) -> Tokens:
        """Rows [B, N, D] to tokens [B, (1 +) N, width]."""
        values, valid = self.map(inputs["rows"]), inputs["valid"]
        B, N = valid.shape
        grid = Grid.sequence(valid)
        if self.config.positions == "sincos":
            values = values + _sincos(N, self.width, values.device).to(values.dtype)
        if self.special is not None:
            mark = valid.new_ones(B, 1)
            values = torch.cat([self.special.to(values.dtype).expand(B, -1, -1), values], 1)
            coords = torch.cat([grid.coords.new_zeros(B, 1, 1), grid.coords], 1)
            grid = Grid(coords, torch.cat([mark, valid], 1), torch.cat([mark, grid.special], 1))
        return Tokens(values, grid)

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Tokens to an encoding: normed after a transformer; the layers are block outputs, not normed."""
        self.check_request(keep, layers)
        if self.transformer is None or self.norm is None:
            return Encoding(tokens)
        kept = tokens.keep(keep)
        values, asked = self.transformer(kept.values, kept.grid.valid, layers)
        return Encoding(Tokens(self.norm(values), kept.grid), layers=asked)

    def preview(self, raw: Any) -> str:
        """The shape and the first numbers."""
        rows = _rows(raw)
        head = ", ".join(f"{number:.3g}" for number in rows.reshape(-1)[:6].tolist())
        return f"[{' x '.join(map(str, rows.shape))}] {head}{', …' if rows.size > 6 else ''}"

    def examples(self, n: int, seed: int) -> list[Any]:
        """Vectors and matrices of several kinds and row numbers: array, list, tensor, integers."""
        return [_EXAMPLES[i % 4](_numbers(1 + (3 * i + seed) % 7, self.config.inputs, seed * 31 + i)) for i in range(n)]

    def oddities(self, seed: int) -> dict[str, Any]:
        """Empty, foreign, infinite, turned, huge and tiny numbers."""
        rows = _numbers(3, self.config.inputs, seed)
        return {
            "no row": rows[:0],
            "no number": rows[:, :0],
            "zero": rows * 0,
            "NaN": np.where(rows == rows.max(), np.nan, rows),
            "infinity": np.where(rows == rows.max(), np.inf, rows),
            "one number too many": np.concatenate([rows, rows[:, :1]], 1),
            "turned": rows.T,
            "three axes": rows[None],
            "scalar": np.array(1.0),
            "strings": [["1"] * self.config.inputs],
            "complex": rows * 1j,
            "ragged": [[1.0], [1.0, 2.0]],
            "None": [None] * self.config.inputs,
            "huge": rows * 4e14,
            "beyond float32": rows * 1e200,
            "denormal": rows * 1e-42,
            "int64": np.full((2, self.config.inputs), 2**62),
        }

    def no_weight_decay(self) -> set[str]:
        """The class token."""
        return set() if self.special is None else {"special"}


def _rows(raw: Any) -> np.ndarray:
    """Anything like an array of numbers to a numeric array.

    Raises:
        BadSampleError: ``not numbers`` or ``wrong shape``.
    """
    if isinstance(raw, torch.Tensor):
        raw = raw.detach().cpu()
        raw = (raw.float() if raw.dtype == torch.bfloat16 else raw).numpy()
    if not isinstance(raw, (np.ndarray, list, tuple)):
        raise BadSampleError("not numbers", f"a value of type {type(raw).__name__}")
    try:
        array = np.asarray(raw)
    except ValueError as error:
        raise BadSampleError("wrong shape", f"rows of different lengths: {error}") from error
    if array.dtype == object and all(isinstance(entry, _NUMBERS) for entry in array.flat):
        array = np.array([float(entry) for entry in array.flat]).reshape(array.shape)
    if array.dtype.kind not in "biuf":
        raise BadSampleError("not numbers", f"dtype {array.dtype}; allowed: bool, integer, float")
    return array


def _sincos(rows: int, width: int, device: torch.device) -> Tensor:
    """The sines, then the cosines of Vaswani et al. (arXiv:1706.03762, section 3.5): float32 [rows, width]."""
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float32, device=device) * 2 / width)
    angle = torch.arange(rows, dtype=torch.float32, device=device)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


def _numbers(rows: int, width: int, seed: int) -> np.ndarray:
    """Float64 [rows, width] in -2..2, by integer arithmetic: the same on every machine."""
    row, column = np.mgrid[:rows, :width].astype(np.int64)
    return ((row * 37 + column * 101 + seed * 53 + row * column * 7) % 257 - 128) / 64


_EXAMPLES = (
    lambda numbers: numbers,
    lambda numbers: numbers.tolist(),
    lambda numbers: torch.from_numpy(numbers[0]).float(),
    lambda numbers: np.rint(numbers * 2).astype(np.int8),
)
