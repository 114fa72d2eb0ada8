"""Learned tokens among those that some blocks of an encoder read, put in and taken out again by hooks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Injection(nn.Module):
    """Tokens R [K, width], mapped for each of n blocks to K tokens behind the block's first one.

    They are taken out of what the block returns, so that whatever looks at its output sees its own tokens alone.

    Args:
        count: K.
        width: of R.
        inner: D, of the blocks' tokens.
        blocks: n.
        rank: None: each block has a map of its own. Else a bias of its own and one map for all, to which each adds a
            product of rank ``rank`` that begins as zero.
        keep: None: each block reads fresh tokens. Else the share of the fresh ones; the rest of the sum is what the
            block before made of its own.
        dim: the mean of the tokens that the last block returns is read out to so many dimensions; 0 = not at all.
    """

    def __init__(
        self, count: int, width: int, inner: int, blocks: int, *, rank: int | None, keep: float | None, dim: int
    ) -> None:
        super().__init__()
        self.count, self.keep, self.off = count, keep, False
        self.tokens = nn.Parameter(0.02 * torch.randn(count, width))
        bound = width**-0.5  # as a linear layer of torch begins
        maps = 1 if rank is not None else blocks
        self.weight = nn.Parameter(torch.empty(maps, inner, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(maps, inner).uniform_(-bound, bound).repeat(blocks // maps, 1))
        self.left = self.right = None
        if rank is not None:
            self.left = nn.Parameter(torch.empty(blocks, inner, rank).uniform_(-1, 1) / math.sqrt(rank))
            self.right = nn.Parameter(torch.zeros(blocks, rank, width))
        self.head = nn.Linear(inner, dim, bias=False) if dim else None
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=inner**-0.5)
        self._last: Tensor | None = None

    def hook(self, blocks: Sequence[nn.Module]) -> None:
        """From now on these blocks read the tokens. The hooks are methods of this module: a copy has its own."""
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before, number), with_kwargs=True)
            block.register_forward_hook(self._after)

    def take(self) -> Tensor | None:
        """The tokens that the last block returned, [B, K, D], once."""
        found, self._last = self._last, None
        return found

    def read(self, last: Tensor) -> Tensor:
        """Their mean, each normed (without a scale, which the map has), as a vector of the head: [B, dim]."""
        assert self.head is not None
        return self.head(F.layer_norm(last, last.shape[-1:]).mean(1))

    def fresh(self, number: int) -> Tensor:
        """The tokens for a block, [K, D]."""
        weight = self.weight[number if len(self.weight) > 1 else 0]
        if self.left is not None and self.right is not None:
            weight = weight + self.left[number] @ self.right[number]
        return F.linear(self.tokens, weight, self.bias[number])

    def _before(self, number: int, block: nn.Module, args: Any, options: Any) -> Any:
        if self.off:
            return None
        named = not args
        values: Tensor = options["hidden_states"] if named else args[0]
        B, N, _ = values.shape
        mine = self.fresh(number).to(values.dtype).expand(B, -1, -1)
        if self.keep is not None and number and self._last is not None:
            mine = self.keep * mine + (1 - self.keep) * self._last
        values = torch.cat([values[:, :1], mine, values[:, 1:]], 1)
        options = {name: _widened(value, N, self.count) for name, value in options.items()}
        if named:
            return args, {**options, "hidden_states": values}
        return (values, *(_widened(value, N, self.count) for value in args[1:])), options

    def _after(self, block: nn.Module, args: Any, out: Any) -> Any:
        if self.off:
            return None
        values = cast(Tensor, out[0] if isinstance(out, tuple) else out)
        self._last = values[:, 1 : 1 + self.count]
        values = torch.cat([values[:, :1], values[:, 1 + self.count :]], 1)
        return (values, *cast("tuple[Any, ...]", out[1:])) if isinstance(out, tuple) else values


def _widened(mask: Any, n: int, k: int) -> Any:
    """A mask of attention among n tokens, [..., n or 1, n], as one among n + k; anything else as it is.

    The new tokens stand behind the first and see what it sees. Where the first sees the second (no causal mask) they
    are seen by all and see each other; where it does not, only by what stands behind them.
    """
    if not isinstance(mask, Tensor) or mask.ndim < 2 or mask.shape[-1] != n or mask.shape[-2] not in (1, n) or n < 2:
        return mask
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return mask
    own, other = mask[..., :1, :1], mask[..., :1, 1:2]
    if mask.shape[-2] == 1:
        return torch.cat([mask[..., :1], own.expand(*mask.shape[:-1], k), mask[..., 1:]], -1)
    behind = mask[..., 1:, :1].expand(*mask.shape[:-2], n - 1, k)
    first = other.expand(*mask.shape[:-2], 1, k)
    among = torch.where(torch.ones(k, k, dtype=torch.bool, device=mask.device).tril(), own, other)
    columns = torch.cat([first, among, behind], -2)
    rows = torch.cat([mask[..., :1, :], mask[..., :1, :].expand(*mask.shape[:-2], k, n), mask[..., 1:, :]], -2)
    return torch.cat([rows[..., :1], columns, rows[..., 1:]], -1)
