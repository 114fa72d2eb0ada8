"""The pre-norm transformer (Vaswani et al., arXiv:1706.03762; pre-norm as in GPT-2 and ViT) that encoders share.

It knows no modality: token values in, token values out. Position embeddings, class tokens and the final norm belong
to the encoder around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training a sample's residual branch is dropped with probability ``p``.

    Branches that stay are divided by ``1 - p``, so that the expectation does not change.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        if self.p == 0 or not self.training:
            return values
        stays = torch.rand(len(values), 1, 1, device=values.device) >= self.p
        return values * (stays / (1 - self.p)).to(values.dtype)


class LayerScale(nn.Module):
    """A learned factor per channel, small at the start (arXiv:2103.17239, section 2.1)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, values: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return values * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention through `torch.nn.functional.scaled_dot_product_attention`."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """[B, N, D] to [B, N, D].

        Args:
            values: the tokens.
            mask: bool, broadcastable to [B, heads, N, N]; True where a query (row) may see a key (column).
            causal: without a mask, let a token see itself and those before it only.
        """
        B, N, D = values.shape
        q, k, v = self.qkv(values).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal and mask is None)
        return self.out(mixed.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Norm, attention, residual; norm, MLP with GELU, residual.

    Args:
        width: D.
        heads: attention heads; must divide ``width``.
        mlp_ratio: hidden width of the MLP over ``width``.
        dropout: on attention weights, on the MLP's hidden units and on both branches' outputs.
        drop_path: probability of stochastic depth.
        layer_scale: initial value of `LayerScale`, or None for none.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, values: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """[B, N, D] to [B, N, D]; ``mask`` and ``causal`` as in `Attention.forward`."""
        branch = self.dropout(self.attention(self.norm1(values), mask, causal))
        values = values + self.drop_path(self.scale1(branch))
        branch = self.dropout(self.mlp(self.norm2(values)))
        return values + self.drop_path(self.scale2(branch))


class Transformer(nn.Module):
    """A stack of `Block`. There is no final norm: the encoder adds its own.

    Args:
        width: D.
        depth: number of blocks.
        heads: attention heads; must divide ``width``.
        mlp_ratio: hidden width of the MLPs over ``width``.
        dropout: see `Block`.
        drop_path: stochastic depth of the last block; it rises linearly from 0 at the first.
        causal: a token sees only itself and those before it.
        layer_scale: see `Block`.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        causal: bool = False,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.causal = causal
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, dropout, rate, layer_scale) for rate in rates)
        self._initialise(width, depth)

    def _initialise(self, width: int, depth: int) -> None:
        """Normal weights, residual outputs smaller with depth (the initialisation of CLIP, arXiv:2103.00020)."""
        std, residual = width**-0.5, width**-0.5 * (2 * depth) ** -0.5
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attention.qkv.weight, std=std)
            nn.init.normal_(block.attention.out.weight, std=residual)
            for linear, scale in ((block.mlp[0], std * 2**-0.5), (block.mlp[3], residual)):
                assert isinstance(linear, nn.Linear)
                nn.init.normal_(linear.weight, std=scale)
                nn.init.zeros_(linear.bias)
            nn.init.zeros_(block.attention.qkv.bias)
            nn.init.zeros_(block.attention.out.bias)

    def forward(
        self, values: Tensor, valid: Tensor | None = None, layers: Sequence[int] = (), order: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the stack.

        Args:
            values: float [B, N, D].
            valid: bool [B, N], False is padding, which no token attends to; None says that every token is valid and
                spares the mask. Values at padding are finite and mean nothing.
            layers: 1-based block numbers whose outputs to return, in the order asked for.
            order: [B, N]; where each token stands in its sequence, for causal attention over tokens that are not
                stored in sequence order (after a drop). None: as stored.

        Returns:
            The last block's output [B, N, D], and the outputs of ``layers``.
        """
        mask = self._mask(values.shape[1], valid, order)
        asked: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks, start=1):
            values = block(values, mask, self.causal)
            if number in layers:
                asked[number] = values
        return values, tuple(asked[number] for number in layers)

    def _mask(self, N: int, valid: Tensor | None, order: Tensor | None) -> Tensor | None:
        """Who may see whom: bool, broadcastable to [B, 1, N, N], or None if `Attention` needs no mask."""
        if not self.causal:
            if valid is None:
                return None
            # A sample without any valid token sees all of its padding: attention over nothing is NaN on some backends.
            return (valid | ~valid.any(1, keepdim=True))[:, None, None, :]
        if valid is None and order is None:
            return None
        given = order if order is not None else valid
        assert given is not None
        places = torch.arange(N, device=given.device)[None] if order is None else order
        earlier = places[:, :, None] >= places[:, None, :]
        if valid is not None:
            # Each token sees itself, valid or not, so that no row is empty.
            earlier = (earlier & valid[:, None, :]) | torch.eye(N, dtype=torch.bool, device=valid.device)
        return earlier[:, None]
