"""Several clips of one video: each is encoded by itself, and the tokens of all stand side by side.

The tokens of a video of several clips have the number of their clip as first coordinate. Special tokens are the same in
every clip before the encoder; after it they are the mean over clips.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmrep.tokens import Encoding, Grid, Tokens


@dataclass(frozen=True)
class Places:
    """Where the tokens of a video went when its clips were taken apart.

    Attributes:
        grid: of the video's tokens, [B, N].
        slot: int64 [B, K, N], the place of each token in the row of each clip.
        weight: float [B, K, N], the clip's share in the token: 1 for its own, 1/K for special tokens.
    """

    grid: Grid
    slot: Tensor
    weight: Tensor


def together(tokens: Tokens, clips: int) -> Tokens:
    """Tokens of single clips, [B * K, S + n, D] with S special ones in front, to those of videos, [B, S + K * n, D]."""
    grid, values = tokens.grid, tokens.values
    rows, N = values.shape[:2]
    B = rows // clips
    if grid.shape is not None:
        S = N - torch.Size(grid.shape).numel()
    else:
        S = int(grid.special[0].sum()) if rows else 0
    n = N - S
    number = torch.arange(clips, device=values.device, dtype=grid.coords.dtype).view(1, clips, 1, 1)
    coords = grid.coords[:, S:].reshape(B, clips, n, grid.coords.shape[-1])
    coords = torch.cat([number.expand(B, clips, n, 1), coords], -1).flatten(1, 2)
    first = torch.arange(B, device=values.device) * clips
    return Tokens(
        side_by_side(values, S, clips),
        Grid(
            coords=torch.cat([coords.new_zeros(B, S, coords.shape[-1]), coords], 1),
            valid=torch.cat([grid.valid[first, :S], grid.valid[:, S:].reshape(B, clips * n)], 1),
            special=torch.cat([grid.special[first, :S], grid.special[:, S:].reshape(B, clips * n)], 1),
            shape=None if grid.shape is None else (clips, *grid.shape),
        ),
        None if tokens.positions is None else side_by_side(tokens.positions, S, clips),
    )


def side_by_side(values: Tensor, special: int, clips: int) -> Tensor:
    """[B * clips, special + n, K] to [B, special + clips * n, K]; the special ones are those of the first clip."""
    B, n = len(values) // clips, values.shape[1] - special
    return torch.cat([values[::clips, :special], values[:, special:].reshape(B, clips * n, values.shape[2])], 1)


def apart(tokens: Tokens) -> tuple[Tokens, Places]:
    """Tokens of videos, any of which may have been dropped, to rows of single clips, [B * K, M, D]."""
    grid, (B, N, D) = tokens.grid, tokens.values.shape
    clip = grid.coords[..., 0].long()
    if grid.shape is not None:
        clips = grid.shape[0]
    else:
        clips = int(clip.max()) + 1 if clip.numel() else 1
    cells = 0 if grid.shape is None else torch.Size(grid.shape[1:]).numel()
    own = clip[:, None] == torch.arange(clips, device=clip.device)[:, None]
    member = (own | grid.special[:, None]) & grid.valid[:, None]
    slot = member.cumsum(2) - 1
    counts = member.sum(2, keepdim=True)
    M = int(counts.max()) if counts.numel() else N - (clips - 1) * cells
    order = (~member).to(torch.int8).argsort(dim=2, stable=True)[..., :M]
    index = order.masked_fill(torch.arange(M, device=clip.device) >= counts, -1).flatten(1)
    picked = grid.select(index)
    values = tokens.values.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, D))
    coords = picked.coords[..., 1:].reshape(B * clips, M, grid.coords.shape[-1] - 1)
    shape = None if grid.shape is None else grid.shape[1:]
    rows = Grid(coords, picked.valid.reshape(B * clips, M), picked.special.reshape(B * clips, M), shape)
    share = torch.where(grid.special[:, None], 1 / clips, (own & member).to(values.dtype))
    return Tokens(values.reshape(B * clips, M, D), rows), Places(grid, slot.clamp_min(0), share)


def rejoin(encoding: Encoding, places: Places) -> Encoding:
    """The encoding of rows of single clips to that of the videos; ``pooled`` is the mean over clips."""
    B, clips = places.slot.shape[:2]

    def back(values: Tensor) -> Tensor:
        M, D = values.shape[1:]
        spread = values.reshape(B, clips, M, D).gather(2, places.slot[..., None].expand(-1, -1, -1, D))
        return (spread * places.weight.to(values.dtype)[..., None]).sum(1)

    return Encoding(
        Tokens(back(encoding.tokens.values), places.grid),
        None if encoding.pooled is None else encoding.pooled.unflatten(0, (B, clips)).mean(1),
        tuple(back(layer) for layer in encoding.layers),
    )
