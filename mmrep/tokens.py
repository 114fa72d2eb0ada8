"""What flows between encoder, head and objective: token values, where each token sits, and named index sets.

There are no bare boolean masks whose polarity must be guessed: a `Mask` holds the indices that are *visible* and the
indices that are *target*, and an empty slot in an index set is ``-1``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
"""One collated batch of one field, as its encoder made it. Every tensor has the batch first."""


@dataclass(frozen=True)
class Grid:
    """The geometry of a batch of tokens.

    Attributes:
        coords: float [B, N, C]; where each token sits, in the modality's own units (patch row and column, seconds,
            metres, position in the sentence). Special tokens have coordinates of zero.
        valid: bool [B, N]; False is padding.
        special: bool [B, N]; True for class, register and query tokens, which are never masked and always kept.
        shape: the regular shape of the non-special tokens, such as (rows, columns), or None where they are ragged
            or some were dropped.
        edges: int64 [2, E], for graphs only: pairs of indices into the flattened [B * N] tokens.
    """

    coords: Tensor
    valid: Tensor
    special: Tensor
    shape: tuple[int, ...] | None = None
    edges: Tensor | None = None

    def __post_init__(self) -> None:
        B, N = self.valid.shape
        if self.coords.shape[:2] != (B, N) or self.special.shape != (B, N):
            raise ValueError(
                f"a Grid needs coords [B, N, C], valid [B, N] and special [B, N]; got {tuple(self.coords.shape)}, "
                f"{tuple(self.valid.shape)} and {tuple(self.special.shape)}"
            )

    @classmethod
    def regular(
        cls, batch: int, shape: tuple[int, ...], *, special: int = 0, device: torch.device | None = None
    ) -> Grid:
        """A full grid of ``shape``, in raster order, behind ``special`` leading special tokens."""
        axes = [torch.arange(n, dtype=torch.float32, device=device) for n in shape]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(shape))
        coords = torch.cat([coords.new_zeros(special, len(shape)), coords])
        marks = torch.arange(len(coords), device=device) < special
        return cls(
            coords=coords.expand(batch, -1, -1),
            valid=torch.ones(batch, len(coords), dtype=torch.bool, device=device),
            special=marks.expand(batch, -1),
            shape=shape,
        )

    @classmethod
    def sequence(cls, valid: Tensor, special: Tensor | None = None) -> Grid:
        """A ragged sequence: ``valid`` bool [B, N]; a token's coordinate is its index."""
        B, N = valid.shape
        coords = torch.arange(N, dtype=torch.float32, device=valid.device).expand(B, N)[..., None]
        return cls(coords=coords, valid=valid, special=torch.zeros_like(valid) if special is None else special)

    def select(self, index: Tensor) -> Grid:
        """The grid of the tokens at ``index`` int64 [B, K]; -1 makes an invalid token. Graph edges are induced."""
        present = index >= 0
        at = index.clamp_min(0)
        return Grid(
            coords=self.coords.gather(1, at[..., None].expand(-1, -1, self.coords.shape[-1])),
            valid=self.valid.gather(1, at) & present,
            special=self.special.gather(1, at) & present,
            shape=None,
            edges=None if self.edges is None else self._induced(index),
        )

    def repeat(self, times: int) -> Grid:
        """Every sample ``times`` times, one after the other."""
        edges = self.edges
        if edges is not None:
            N = self.valid.shape[1]
            sample, token = edges // N, edges % N
            edges = torch.cat([(sample * times + k) * N + token for k in range(times)], 1)
        return Grid(
            coords=self.coords.repeat_interleave(times, 0),
            valid=self.valid.repeat_interleave(times, 0),
            special=self.special.repeat_interleave(times, 0),
            shape=self.shape,
            edges=edges,
        )

    def _induced(self, index: Tensor) -> Tensor:
        """Keep the edges whose two ends are both in ``index``, renumbered to the new token positions."""
        assert self.edges is not None
        (B, N), K = self.valid.shape, index.shape[1]
        moved = torch.full((B * N,), -1, dtype=torch.long, device=index.device)
        rows = torch.arange(B, device=index.device)[:, None].expand(-1, K)
        slots = torch.arange(B * K, device=index.device).view(B, K)
        present = index >= 0
        moved[(rows * N + index)[present]] = slots[present]
        edges = moved[self.edges]
        return edges[:, (edges >= 0).all(0)]


@dataclass(frozen=True)
class Tokens:
    """Token values with their geometry.

    Attributes:
        values: float [B, N, D]; positions have been added already.
        grid: where the tokens sit.
        positions: float [B, N, D]; the part of ``values`` that says where a token is, and nothing of what is there. An
            encoder that supports ``"mask_token"`` gives it: a hidden token is a learned vector plus its position.
    """

    values: Tensor
    grid: Grid
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.shape[:2] != self.grid.valid.shape:
            raise ValueError(f"values {tuple(self.values.shape)} do not match a grid of {tuple(self.grid.valid.shape)}")
        if self.positions is not None and self.positions.shape != self.values.shape:
            raise ValueError(f"positions {tuple(self.positions.shape)} do not match values {tuple(self.values.shape)}")

    def keep(self, index: Tensor | None) -> Tokens:
        """Drop every token that is neither special nor named in ``index``.

        Args:
            index: int64 [B, K], positions among this object's tokens; -1 is an empty slot. None keeps all.
                Special tokens may be left out of it: they are kept in any case, in front.

        Raises:
            ValueError: an index past the last token, or samples with different numbers of special tokens.
        """
        if index is None:
            return self
        full = keep_special(index, self.grid)
        at = full.clamp_min(0)[..., None].expand(-1, -1, self.values.shape[-1])
        positions = None if self.positions is None else self.positions.gather(1, at)
        return Tokens(self.values.gather(1, at), self.grid.select(full), positions)

    def hide(self, index: Tensor, token: Tensor) -> Tokens:
        """Replace what is at ``index`` by ``token``, in place: only the position stays.

        Args:
            index: int64 [B, K], positions among this object's tokens; -1 is an empty slot.
            token: float [D], the learned mask token.

        Raises:
            ValueError: the encoder that made these tokens does not give positions.
        """
        if self.positions is None:
            raise ValueError("these tokens come without positions: their encoder does not support 'mask_token'")
        hidden = indicator(index, self.values.shape[1])[..., None]
        return replace(self, values=torch.where(hidden, token.to(self.values.dtype) + self.positions, self.values))

    def unplace(self, index: Tensor, token: Tensor) -> Tokens:
        """Replace where the tokens at ``index`` are by ``token``: only what they are made of stays.

        Args:
            index: int64 [B, K], positions among this object's tokens; -1 is an empty slot.
            token: float [D], the learned stand-in for a position.

        Raises:
            ValueError: the encoder that made these tokens does not give positions.
        """
        if self.positions is None:
            raise ValueError("these tokens come without positions: their encoder does not support 'mask_token'")
        lost = indicator(index, self.values.shape[1])[..., None]
        return replace(self, values=torch.where(lost, self.values - self.positions + token, self.values))

    def repeat(self, times: int) -> Tokens:
        """Every sample ``times`` times, one after the other: [B * times, N, D]."""
        if times == 1:
            return self
        positions = None if self.positions is None else self.positions.repeat_interleave(times, 0)
        return Tokens(self.values.repeat_interleave(times, 0), self.grid.repeat(times), positions)


@dataclass(frozen=True)
class Content:
    """What each token of a batch was made from, before anything was learned: what a masked objective may ask for.

    Attributes:
        values: float [B, N, P] (the pixels of a patch, the points of a group), or int64 [B, N] codes below
            ``vocabulary``, or int64 [B, N, C] of C codebooks. N is as in what ``tokenize`` returns; what is at special
            and padded tokens means nothing.
        observed: bool, as ``values``; False where nothing was measured (a gap in a series, beyond the end of a clip).
            None = everything was.
        vocabulary: number of codes; None for float values.
        points: the values of a token are an unordered set of points with this many figures each; None = they are not.
    """

    values: Tensor
    observed: Tensor | None = None
    vocabulary: int | None = None
    points: int | None = None


def indicator(index: Tensor, n: int) -> Tensor:
    """Bool [B, n], True at ``index`` int64 [B, K]; -1 is an empty slot."""
    marks = torch.zeros(len(index), n + 1, dtype=torch.bool, device=index.device)
    return marks.scatter_(1, index.masked_fill(index < 0, n), True)[:, :n]


def index_set(marks: Tensor) -> Tensor:
    """Where bool [B, N] is True: int64 [B, K] in ascending order, -1 behind the last; K is the largest count."""
    K = int(marks.sum(1).max()) if len(marks) else 0
    order = (~marks).to(torch.int8).argsort(dim=1, stable=True)[:, :K]
    return order.masked_fill(~marks.gather(1, order), -1)


def keep_special(index: Tensor, grid: Grid) -> Tensor:
    """Put every special token of ``grid`` in front of ``index`` int64 [B, K] (which may name some already).

    Raises:
        ValueError: an index past the last token, or samples with different numbers of special tokens.
    """
    N = grid.valid.shape[1]
    if index.numel() and int(index.max()) >= N:
        raise ValueError(f"keep index {int(index.max())} is past the last of {N} tokens")
    counts = grid.special.sum(1)
    if counts.numel() == 0 or int(counts.max()) == 0:
        return index
    count = int(counts[0])
    if bool((counts != count).any()):
        raise ValueError(f"samples have different numbers of special tokens ({_listed(counts)}): name them in keep")
    special = grid.special.nonzero()[:, 1].view(-1, count)
    named = grid.special.gather(1, index.clamp_min(0)) & (index >= 0)
    rest = index.masked_fill(named, -1)
    if bool(named.any()):  # close the gaps, so that no slot is spent on a token that stands in front already
        order = (rest < 0).to(torch.int8).argsort(dim=1, stable=True)
        rest = rest.gather(1, order)[:, : int((rest >= 0).sum(1).max())]
    return torch.cat([special, rest], dim=1)


def _listed(counts: Tensor) -> str:
    return ", ".join(str(int(count)) for count in counts)


@dataclass(frozen=True)
class Mask:
    """Named index sets over the tokens of one grid, several groups of each per sample.

    Attributes:
        visible: int64 [B, Gv, Nv]; what the student sees. -1 is an empty slot.
        target: int64 [B, Gt, Nt]; what is to be predicted. -1 is an empty slot.
    """

    visible: Tensor
    target: Tensor

    def __post_init__(self) -> None:
        for name in ("visible", "target"):
            index: Tensor = getattr(self, name)
            if index.ndim != 3 or index.dtype != torch.long:
                raise ValueError(f"Mask.{name} must be int64 [B, groups, N]; got {index.dtype} {tuple(index.shape)}")

    def counts(self, name: str) -> Tensor:
        """How many slots of ``"visible"`` or ``"target"`` are filled: int64 [B, groups]."""
        index: Tensor = getattr(self, name)
        return (index >= 0).sum(-1)


@dataclass(frozen=True)
class Encoding:
    """What an encoder returns.

    Attributes:
        tokens: the tokens after the last layer, [B, N', D].
        pooled: [B, D]; the encoder's own pooled vector, if its architecture has one.
        layers: tokens after each requested layer, each [B, N', D].
        extra: named tensors that a special head needs, such as a log-variance.
    """

    tokens: Tokens
    pooled: Tensor | None = None
    layers: tuple[Tensor, ...] = ()
    extra: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def with_values(self, values: Tensor) -> Encoding:
        """The same encoding with other token values."""
        return replace(self, tokens=Tokens(values, self.tokens.grid))
