"""The contract of a predictor (in masked autoencoders: decoder)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmrep.tokens import Tokens


class Predictor(nn.Module):
    """Visible tokens and the places of hidden ones to a vector for each hidden one.

    Built as ``cls(config, width=D of the context, out=width of what is predicted, axes=number of coordinates,
    condition=width of the condition or 0)``.

    Attributes:
        needs_hidden: it reads the encoder's output at the hidden places too, so the encoder must have seen them as mask
            tokens (``input: mask-token``).
        blanks: what the context says at the places that are predicted is taken for unknown.
    """

    Config: ClassVar[type]
    needs_hidden: bool = False
    blanks: bool = False

    def __init__(self, config: Any, *, width: int, out: int, axes: int, condition: int = 0) -> None:
        super().__init__()
        self.config, self.out, self.axes = config, out, axes

    def forward(
        self, context: Tokens, index: Tensor, tokens: Tokens, target: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Predict.

        Args:
            context: the encoder's output, [B, Nc, D].
            index: int64 [B, Nc], where the context's tokens stand among all tokens; -1 is an empty slot.
            tokens: all tokens of the field that is predicted, as they came from ``tokenize``: [B, N, D]. Only their
                grid and positions may be used.
            target: int64 [B, Nt], which of them to predict; -1 is an empty slot.
            condition: float [B, c, k]; what else is known (a transform's parameters, an action, a time offset).

        Returns:
            [B, Nt, out]; what stands in empty slots means nothing.
        """
        raise NotImplementedError


def sincos(coords: Tensor, width: int) -> Tensor:
    """Fixed sine-cosine positions for coordinates of any number of axes: float32 [..., width] of [..., C].

    Each axis gets ``width // (2 C)`` frequencies from 1 down to 1/10000 (Vaswani et al. 2017, arXiv:1706.03762, section
    3.5), sines first; channels that remain are zero.
    """
    axes = coords.shape[-1]
    n = width // (2 * axes)
    if n == 0:
        raise ValueError(f"width {width} is too small for the positions of {axes} axes: at least {2 * axes}")
    frequencies = 10000.0 ** (-torch.arange(n, dtype=torch.float32, device=coords.device) / n)
    angles = coords.float()[..., None] * frequencies
    out = torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)
    return nn.functional.pad(out, (0, width - out.shape[-1]))


class Places(nn.Module):
    """What a predictor adds to a token for where it is: [B, N, out].

    Args:
        kind: ``sincos`` of the coordinates, ``mlp`` (a learned function of them), or ``encoder`` (a linear map of the
            encoder's own positions).
        width: of the encoder's tokens.
        axes: coordinates of a token.
        out: width of the predictor.
    """

    def __init__(self, kind: Literal["sincos", "mlp", "encoder"], *, width: int, axes: int, out: int) -> None:
        super().__init__()
        self.kind, self.out = kind, out
        self.map: nn.Module | None = None
        if kind == "mlp":
            self.map = nn.Sequential(nn.Linear(axes, out), nn.GELU(), nn.Linear(out, out))
        elif kind == "encoder":
            self.map = nn.Linear(width, out)

    def forward(self, tokens: Tokens) -> Tensor:
        """Of all tokens of a field.

        Raises:
            ValueError: the encoder does not give the positions that are asked for.
        """
        if self.map is None:
            return sincos(tokens.grid.coords, self.out).to(tokens.values.dtype)
        if self.kind == "mlp":
            return self.map(tokens.grid.coords.to(tokens.values.dtype))
        if tokens.positions is None:
            raise ValueError("positions: encoder: this encoder does not give its positions; use sincos or mlp")
        return self.map(tokens.positions)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows [B, K, ...] of ``values`` [B, N, ...] at ``index`` int64 [B, K]; an empty slot (-1) gives the first row."""
    at = index.clamp_min(0)
    return values.gather(1, at.view(*at.shape, *[1] * (values.ndim - 2)).expand(*at.shape, *values.shape[2:]))
