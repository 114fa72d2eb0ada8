"""Vision transformers of Hugging Face as the encoder contract sees them: embeddings, blocks, norm and pooling apart."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.modalities.image._hf_models import Family
from mmrep.modalities.image._native import ragged_grid
from mmrep.tokens import Content, Encoding, Grid, Inputs, Tokens

_BLOCKS = ("layers", "layer", "encoder.layers", "encoder.layer", "model.layer")


class ViTTrunk(nn.Module):
    """The vision part of one checkpoint; its modules are called one after the other, as the library's ``forward`` does.

    Tokens are the class token and what stands beside it (DeiT's distillation token, registers), then the patches in
    raster order. Positions are added before any token is dropped; what turns or weighs attention by places (DINOv3) is
    computed for the full grid, and each kept token has its own.

    Args:
        model: the library's vision model.
        config: the config of the vision part.
        family: how it is taken apart.
        projection: into a joint space, applied to the pooled vector; None for none.
    """

    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})

    def __init__(self, model: Any, config: Any, family: Family, projection: nn.Module | None) -> None:
        super().__init__()
        if hasattr(model, "pooler") and not getattr(config, "add_pooling_layer", True):
            model.pooler = None
        if getattr(model.embeddings, "mask_token", None) is not None:
            model.embeddings.mask_token = None  # of the pretraining; it would get no gradient
        if getattr(config, "mask_ratio", None):  # of MAE's pretraining; a copy, so that the checkpoint's config stays
            model.embeddings.config = copy.copy(config)
            model.embeddings.config.mask_ratio = 0.0
        self.model, self.projection = model, projection
        self.config, self.family = config, family
        self.width, self.depth = config.hidden_size, config.num_hidden_layers
        self.patch: int = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
        self.special, self.native = family.special(config), family.native
        self.pooled_width: int | None = None if projection is None else config.projection_dim
        if getattr(model, "pooler", None) is not None:
            self.pooled_width = getattr(config, "pooler_output_size", None)
        if family.relation == "bias":
            for block in self.blocks():
                told = _told if hasattr(block.attention, "attention") else _biased
                block.__class__ = told(type(block))
        size = getattr(config, "image_size", None)
        self.trained = (size, size) if isinstance(size, int) else tuple(size or ())

    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return _blocks(self.model)

    def tokenize(self, pixels: Tensor) -> Tokens:
        """Normalised pixels [B, 3, H, W] to embeddings and their positions."""
        B, _, H, W = pixels.shape
        shape = (H // self.patch, W // self.patch)
        embeddings = self.model.embeddings
        fitted = self.family.any_size or (H, W) == self.trained
        some = pixels if B else pixels.new_zeros(1, *pixels.shape[1:])  # parts of the library cannot run on none
        values = self.family.embed(embeddings, some, **({} if fitted else {"interpolate_pos_encoding": True}))
        places = self._positions(values, H, W, table_as_it_is=fitted and not self.family.any_size)
        grid = Grid.regular(B, shape, special=self.special, device=values.device)
        return Tokens(values[:B], grid, places.to(values.dtype).expand(B, -1, -1))

    def tokenize_patches(self, inputs: Inputs, patches: Tensor) -> Tokens:
        """Normalised patches [B, N, 3 * patch * patch], channels first, to embeddings and their positions."""
        embeddings, (B, N, _) = self.model.embeddings, patches.shape
        channels_last = patches.view(B, N, 3, self.patch, self.patch).permute(0, 1, 3, 4, 2).reshape(patches.shape)
        side = embeddings.position_embedding_size
        table = embeddings.position_embedding.weight.view(side, side, -1)
        places = embeddings.resize_positional_embeddings(table, inputs["shape"], max_length=N)
        values = embeddings.patch_embedding(channels_last) + places
        shapes = [(rows, columns) for rows, columns in inputs["shape"].tolist()]
        return Tokens(values, ragged_grid(inputs, shapes, 0), places.to(values.dtype))

    def encode(self, tokens: Tokens, keep: Tensor | None, layers: Sequence[int]) -> Encoding:
        """Blocks, norm and pooling over the kept tokens; layers are block outputs, before the norm."""
        kept = tokens.keep(keep)
        full = kept.grid.shape is not None or bool(kept.grid.valid.all())
        valid = None if full else kept.grid.valid
        rows = kept.values.shape[0]
        values = kept.values if rows else kept.values.new_zeros(1, *kept.values.shape[1:]) + kept.values.sum()
        valid = valid if rows else None
        if hasattr(self.model, "pre_layrnorm"):
            values = self.model.pre_layrnorm(values)
        mask = None if valid is None else _additive(valid, values.dtype)
        if self.family.relation is not None and tokens.grid.shape is None:
            raise ValueError("these tokens were cut before they came here; give all of them, and keep")
        extra = {"rotary": self._angles, "bias": self._biases}.get(self.family.relation or "", _no_relation)(
            tokens.grid, kept.grid
        )
        asked: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks(), start=1):
            values = block(values, mask, **extra)
            asked[number] = values
        values = values if self.family.norm is None else getattr(self.model, self.family.norm)(values)
        pooled = self.family.pool(self.model, values, valid)
        if pooled is not None and self.projection is not None:
            pooled = self.projection(pooled)
        return Encoding(
            Tokens(values[:rows], kept.grid),
            None if pooled is None else pooled[:rows],
            tuple(asked[number][:rows] for number in layers),
        )

    def content(self, pixels: Tensor) -> Content:
        """The normalised pixels of each patch, [B, N, 3 * patch * patch], channels first."""
        H, W = (side - side % self.patch for side in pixels.shape[2:])
        values = F.unfold(pixels[:, :, :H, :W], self.patch, stride=self.patch).transpose(1, 2)
        return Content(F.pad(values, (0, 0, self.special, 0)))

    def no_weight_decay(self) -> set[str]:
        """Learned positions, class and register tokens, and the query of a pooling head."""
        ends = (
            "position_embeddings", "position_embedding.weight", "relative_position_bias_table", "_token", "_tokens",
            "class_embedding", "probe",
        )  # fmt: skip
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def _positions(self, values: Tensor, H: int, W: int, *, table_as_it_is: bool) -> Tensor:
        """What was added to the embeddings for their places: [1, N, D]; zeros where the blocks are told instead."""
        embeddings, bare = self.model.embeddings, self.family.registers(self.config)
        if hasattr(embeddings, "position_embedding"):
            table = embeddings.position_embedding.weight[None]
        else:
            table = getattr(embeddings, "position_embeddings", None)
        if table is None:
            return values.new_zeros(1, *values.shape[1:])
        places: Tensor = table if table_as_it_is else embeddings.interpolate_pos_encoding(values[:, bare:], H, W)
        placed = self.special - bare
        return torch.cat([places[:, :placed], places.new_zeros(1, bare, places.shape[2]), places[:, placed:]], 1)

    def _places(self, full: Grid, kept: Grid) -> Tensor:
        """The place of each kept patch in the full grid, int64 [B, K]."""
        assert full.shape is not None
        coords = kept.coords if len(kept.coords) else kept.coords.new_zeros(1, *kept.coords.shape[1:])
        return (coords[:, self.special :] @ coords.new_tensor([full.shape[1], 1.0])).long()

    def _angles(self, full: Grid, kept: Grid) -> dict[str, tuple[Tensor, Tensor]]:
        """DINOv3's cosines and sines of the kept patches: [N, C] of all, or [B, 1, K, C]."""
        assert full.shape is not None
        H, W = (side * self.patch for side in full.shape)
        blank = next(self.model.parameters()).new_empty(0, 3, H, W)  # it is asked for its size alone
        cos, sin = self.model.rope_embeddings(blank)
        if kept.shape is None:
            at = self._places(full, kept)
            cos, sin = cos[at][:, None], sin[at][:, None]
        return {"position_embeddings": (cos, sin)}

    def _biases(self, full: Grid, kept: Grid) -> dict[str, Any]:
        """BEiT's and data2vec's window, which tokens of it are kept, and the bias that all blocks share."""
        at = None if kept.shape is not None else F.pad(self._places(full, kept) + 1, (1, 0))
        shared = getattr(self.model, "shared_position_bias", None)
        if shared is None:
            shared = getattr(getattr(self.model, "encoder", None), "relative_position_bias", None)
        return {"window": full.shape, "at": at, "shared": None if shared is None else _chosen(shared(full.shape), at)}


def _no_relation(full: Grid, kept: Grid) -> dict[str, Any]:
    return {}


def _chosen(bias: Tensor, at: Tensor | None) -> Tensor:
    """A bias of attention [1, heads, N, N] among the tokens at int64 [B, K]: [B, heads, K, K]."""
    return bias if at is None else bias[0][:, at[:, :, None], at[:, None]].transpose(0, 1)


@cache
def _biased(layer: Any) -> Any:
    """A block of BEiT that can be told which tokens are kept; its own ``forward`` would make the bias of all."""

    class Biased(layer):
        def forward(
            self, values: Tensor, mask: Tensor | None = None, window: Any = None, at: Any = None, shared: Any = None
        ) -> Tensor:
            own = None if self.relative_position_bias is None else _chosen(self.relative_position_bias(window), at)
            parts = [part for part in (own, shared, mask) if part is not None]
            bias = sum(parts[1:], parts[0]) if parts else None
            seen, _ = self.attention(self.layernorm_before(values), attention_mask=bias)
            values = values + self.drop_path(self.lambda_1 * self.dropout(seen))
            return values + self.drop_path(self.lambda_2 * self.dropout(self.mlp(self.layernorm_after(values))))

    return Biased


@cache
def _told(layer: Any) -> Any:
    """The same of data2vec, whose own ``forward`` takes a bias from outside and adds it to that of the block."""

    class Told(layer):
        def forward(
            self, values: Tensor, mask: Tensor | None = None, window: Any = None, at: Any = None, shared: Any = None
        ) -> Tensor:
            attention = self.attention.attention
            attention.has_relative_position_bias = False
            table = getattr(attention, "relative_position_bias", None)
            own = None if table is None else _chosen(table(window), at)
            parts = [part for part in (own, shared, mask) if part is not None]
            return super().forward(values, relative_position_bias=sum(parts[1:], parts[0]) if parts else None)[0]

    return Told


def _blocks(model: Any) -> nn.ModuleList:
    for path in _BLOCKS:
        found = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise ValueError(f"{type(model).__name__} of this version of transformers has its blocks in none of {_BLOCKS}")


def _additive(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool [B, N], True may be attended to, to what is added to attention scores: [B, 1, N, N]."""
    N = valid.shape[1]
    visible = valid | ~valid.any(1, keepdim=True)
    mask = torch.zeros(visible.shape, dtype=dtype, device=valid.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None, None, :].expand(-1, 1, N, -1)
