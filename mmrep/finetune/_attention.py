"""torch's MultiheadAttention as a module of two linear layers, which adapters can be put into."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

NAMES = {
    "qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias", "out.weight": "out_proj.weight",
    "out.bias": "out_proj.bias",
}  # fmt: skip
"""What `nn.MultiheadAttention` calls the parameters of `CalledAttention`."""


class CalledAttention(nn.Module):
    """The same parameters and results as an `nn.MultiheadAttention` for self-attention, without its weights [B, N, N].

    That module holds queries', keys' and values' weights as a bare parameter, and reads its output layer's without
    calling it, so an adapter in the place of either would be passed by.
    """

    def __init__(self, replaced: nn.MultiheadAttention) -> None:
        super().__init__()
        self.__dict__["replaced"] = replaced  # not a child: its parameters are those of the two layers
        self.num_heads, self.dropout, self.batch_first = replaced.num_heads, replaced.dropout, replaced.batch_first
        width, bias = replaced.embed_dim, replaced.in_proj_bias is not None
        self.qkv = nn.Linear(width, 3 * width, bias=bias, device="meta")
        self.out = nn.Linear(width, width, bias=bias, device="meta")
        self.qkv.weight, self.out.weight = replaced.in_proj_weight, replaced.out_proj.weight
        if bias:
            self.qkv.bias, self.out.bias = replaced.in_proj_bias, replaced.out_proj.bias
        self.train(replaced.training)

    @staticmethod
    def can_replace(part: nn.Module) -> bool:
        """Whether ``part`` is an attention of one width, without learned or zero keys beside the tokens."""
        if not isinstance(part, nn.MultiheadAttention):
            return False
        return part._qkv_same_embed_dim and part.bias_k is None and not part.add_zero_attn

    def original(self) -> nn.MultiheadAttention:
        """The module that this one stands for, with the weights as they now are; without an adapter inside."""
        replaced: Any = self.__dict__["replaced"]
        replaced.in_proj_weight, replaced.out_proj.weight = self.qkv.weight, self.out.weight
        replaced.in_proj_bias, replaced.out_proj.bias = self.qkv.bias, self.out.bias
        return replaced.train(self.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """As `nn.MultiheadAttention.forward`, for ``query is key is value`` [B, N, D]; no weights are returned.

        Raises:
            ValueError: attention to others than itself.
        """
        if query is not key or query is not value:
            raise ValueError("an adapter in an nn.MultiheadAttention can do self-attention only; choose other targets")
        values = query if self.batch_first else query.transpose(0, 1)
        B, N, D = values.shape
        q, k, v = self.qkv(values).view(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        mask = _additive(attn_mask, values)
        if mask is not None and mask.ndim == 3:
            mask = mask.view(B, self.num_heads, N, N)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, values)
            assert padding is not None
            mask = padding[:, None, None, :] + (0 if mask is None else mask)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=is_causal and mask is None)
        out = self.out(mixed.transpose(1, 2).reshape(B, N, D))
        return (out if self.batch_first else out.transpose(0, 1)), None


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask of torch's attention, True or minus infinity where nothing is seen, as what is added to scores."""
    if mask is None or mask.is_floating_point():
        return mask if mask is None else mask.to(like.dtype)
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))
