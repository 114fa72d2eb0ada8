"""Foreign networks as the encoder contract sees them: an encoder around a trunk, and the trunk of a timm network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmrep.config import dump, parse
from mmrep.modalities.image._base import ImageEncoder
from mmrep.modalities.image._preprocess import Preprocess
from mmrep.tokens import Encoding, Grid, Inputs, Tokens


class TrunkEncoder(ImageEncoder):
    """An image encoder around a network of another library, its *trunk*; it saves what rebuilds both without a hub.

    A trunk has ``tokenize(pixels)``, ``encode(tokens, keep, layers)``, ``no_weight_decay()`` and the attributes
    ``width, pooled_width, depth, supports`` of the encoder contract.

    Args:
        config: of the encoder.
        files: as in `Encoder`.
        trunk: the wrapped network.
        made_of: JSON-able description from which the network is rebuilt.
        preprocess: how its inputs are made.

    Attributes:
        file: name of the file that holds ``made_of`` and ``preprocess`` in a saved model.
    """

    file: ClassVar[str]

    def __init__(
        self, config: Any, files: Path | None, *, trunk: Any, made_of: dict[str, Any], preprocess: Preprocess
    ) -> None:
        super().__init__(config, files, preprocess=preprocess)
        self.made_of = made_of
        self.trunk = trunk
        self.width, self.depth, self.pooled_width = trunk.width, trunk.depth, trunk.pooled_width
        self.supports = trunk.supports

    @classmethod
    def read_files(cls, folder: Path) -> tuple[dict[str, Any], Preprocess]:
        """What `save_files` wrote: ``made_of`` and ``preprocess``."""
        saved = json.loads((folder / cls.file).read_text(encoding="utf-8"))
        return saved["model"], parse(Preprocess, saved["preprocess"])

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``{"pixels": [B, C, H, W]}`` to tokens; see the trunk."""
        return self.trunk.tokenize(self.normalize(inputs["pixels"]))

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Tokens to an encoding; layers are block outputs before the final norm."""
        self.check_request(keep, layers)
        return self.trunk.encode(tokens, keep, layers)

    def save_files(self, folder: Path) -> None:
        """Write what rebuilds network and preprocessing: the model's name may mean nothing elsewhere."""
        document = {"model": self.made_of, "preprocess": dump(self.preprocess)}
        (folder / self.file).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    def no_weight_decay(self) -> set[str]:
        """What the network's library says."""
        return {f"trunk.{name}" for name in self.trunk.no_weight_decay()}


class TimmTrunk(nn.Module):
    """Wraps a timm model that was made with ``num_classes=0`` (or whose classifier is a projection).

    Two kinds of network are told apart. *ViT-like* ones (timm's ``VisionTransformer`` and ``Eva`` and what inherits
    their ``forward_features``) are cut after the position embedding: they can drop tokens and return layers, which are
    block outputs before the final norm. Of any *other* network everything up to timm's ``forward_features`` is
    tokenizing, and encoding only pools: it can do neither.

    Args:
        model: the timm model.
        size: side of its input, in pixels. channels: of its input.
        head: applied after the model's own head, as open_clip does; None for nothing.

    Attributes:
        width: D of the tokens. pooled_width: of the pooled vector. depth: number of blocks, 0 if not ViT-like.
    """

    def __init__(self, model: Any, size: int, *, channels: int = 3, head: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Identity() if head is None else head
        self.vit = _is_vit(model)
        self.depth = len(model.blocks) if self.vit else 0
        self.prefix = getattr(model, "num_prefix_tokens", 0)
        self.supports = frozenset({"tokens", "drop_tokens", "layers"} if self.vit else {"tokens"})
        self._layout = "NLC"
        # Widths are announced under many names in timm, not all of them kept: one look at the real output is sure.
        was = model.training
        self.eval()
        with torch.no_grad():
            out = self.encode(self.tokenize(torch.zeros(1, channels, size, size)))
        self.train(was)
        assert out.pooled is not None
        self.width, self.pooled_width = out.tokens.values.shape[-1], out.pooled.shape[-1]

    def tokenize(self, pixels: Tensor) -> Tokens:
        """Normalised pixels [B, C, H, W] to tokens [B, N, D']."""
        if not self.vit:
            return self._from_features(self.model.forward_features(pixels))
        patches = self.model.patch_embed(pixels)
        shape = tuple(patches.shape[1:3]) if patches.ndim == 4 else tuple(self.model.patch_embed.grid_size)
        values = self.model._pos_embed(patches)
        values = values[0] if isinstance(values, tuple) else values  # Eva adds its rotary table, see `_rope`
        return Tokens(values, Grid.regular(values.shape[0], shape, special=self.prefix, device=values.device))

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Tokens to an encoding; ``pooled`` is timm's ``forward_head(pre_logits=True)``, None if a slot is empty."""
        if not self.vit:
            return Encoding(tokens, pooled=self._pool(self._to_features(tokens)))
        kept = tokens.keep(keep)
        full = kept.grid.shape is not None or bool(kept.grid.valid.all())
        extra = {} if full else {"attn_mask": kept.grid.valid[:, None, None, :].expand(-1, 1, kept.values.shape[1], -1)}
        rope, per_block = self._rope(tokens.grid, kept.grid)
        values = self.model.norm_pre(kept.values)
        asked: dict[int, Tensor] = {}
        for i, block in enumerate(self.model.blocks):
            if rope is not None:
                extra["rope"] = rope[i] if per_block else rope
            if self.model.grad_checkpointing and torch.is_grad_enabled():
                values = checkpoint(partial(block, **extra), values, use_reentrant=False)
            else:
                values = block(values, **extra)
            if i + 1 in layers:
                asked[i + 1] = values
        values = self.model.norm(values)
        return Encoding(
            Tokens(values, kept.grid),
            pooled=self._pool(values) if full else None,
            layers=tuple(asked[n] for n in layers),
        )

    def no_weight_decay(self) -> set[str]:
        """What timm names as not to decay, of the parameters that exist."""
        named = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else set()
        return {f"model.{name}" for name, _ in self.model.named_parameters() if name in named}

    def _pool(self, features: Tensor) -> Tensor:
        if isinstance(self.head, nn.Identity):
            return self.model.forward_head(features, pre_logits=True)
        return self.head(self.model.forward_head(features))

    def _rope(self, full: Grid, kept: Grid) -> tuple[Tensor | None, bool]:
        """Rotary positions of the kept patches (of every patch, [N, C], if none was dropped), and if one per block."""
        source = getattr(self.model, "rope", None)
        if source is None:
            return None, False
        shape = full.shape or tuple(self.model.patch_embed.grid_size)
        fixed = hasattr(source, "feat_shape") and not self.model.dynamic_img_size
        table = source.get_embed() if fixed else source.get_embed(shape=shape)
        mixed = bool(getattr(self.model, "rope_mixed", False))
        if kept.shape is not None:
            return table, mixed
        from timm.layers.pos_embed_sincos import apply_keep_indices_nlc

        places = kept.coords[:, self.prefix :]
        index = (places[..., 0] * shape[1] + places[..., 1]).long()
        table = apply_keep_indices_nlc(places, table, index)
        return (table.transpose(0, 1) if mixed else table.unsqueeze(1)), mixed

    def _from_features(self, features: Any) -> Tokens:
        """What ``forward_features`` returned, in whichever layout, as tokens."""
        if not isinstance(features, Tensor):
            raise ValueError(
                f"{type(self.model).__name__} returns {type(features).__name__} as features: not supported"
            )
        B, device = features.shape[0], features.device
        if features.ndim == 4:
            self._layout = "NHWC" if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else "NCHW"
            maps = features if self._layout == "NHWC" else features.permute(0, 2, 3, 1)
            shape = tuple(maps.shape[1:3])
            return Tokens(maps.reshape(B, shape[0] * shape[1], -1), Grid.regular(B, shape, device=device))
        if features.ndim == 2:
            self._layout = "NC"
            return Tokens(features[:, None], Grid.regular(B, (1,), device=device))
        side = int((features.shape[1] - self.prefix) ** 0.5)
        square = side * side == features.shape[1] - self.prefix
        shape = (side, side) if square else (features.shape[1] - self.prefix,)
        return Tokens(features, Grid.regular(B, shape, special=self.prefix, device=device))

    def _to_features(self, tokens: Tokens) -> Tensor:
        values, shape = tokens.values, tokens.grid.shape
        if self._layout == "NC":
            return values[:, 0]
        if self._layout == "NLC":
            return values
        assert shape is not None, "a network that cannot drop tokens keeps its regular grid"
        maps = values.reshape(values.shape[0], *shape, values.shape[-1])
        return maps if self._layout == "NHWC" else maps.permute(0, 3, 1, 2)


def _is_vit(model: Any) -> bool:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return any(
        isinstance(model, c) and type(model).forward_features is c.forward_features for c in (VisionTransformer, Eva)
    )
