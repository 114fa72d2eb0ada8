"""The image tower of any open_clip model (github.com/mlfoundations/open_clip), with its own preprocessing.

In a recipe::

    encoder: {type: open-clip-image, model: ViT-B-32, pretrained: laion2b_s34b_b79k}
    pool: native
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmrep.config import config
from mmrep.hub.open_clip_folder import open_clip_folder
from mmrep.modalities.image._preprocess import Overrides, has_bands
from mmrep.modalities.image._trunks import TimmTrunk, TrunkEncoder
from mmrep.modalities.image.timm import check_safetensors
from mmrep.registry import near
from mmrep.tokens import Encoding, Grid, Tokens


class OpenClipImage(TrunkEncoder):
    """``model.visual`` of open_clip, without the text tower.

    ``pooled`` is what open_clip's ``encode_image`` returns, projected, of width ``pooled_width``; with a `native` pool
    and an `identity` projector the embedding is open_clip's. Tokens are those before pooling, after the final norm.
    """

    @config
    class Config(Overrides):
        """Fields of an ``open-clip-image`` encoder, beside what it may override of the model's preprocessing.

        model: a name of ``open_clip.list_models()``; or ``local-dir:path`` or ``hf-hub:organisation/name``, which bring
        their weights. pretrained: a tag of ``open_clip.list_pretrained()`` (a download),
        or None for random weights. checkpoint: a ``.safetensors`` file of open_clip weights to load instead.
        quick_gelu: the activation x * sigmoid(1.702 x) that OpenAI's weights were trained with; None = as the weights
        (or the model) say. The wrong one costs accuracy and raises no error.
        """

        model: str = "ViT-B-32"
        pretrained: str | None = None
        checkpoint: str | None = None
        quick_gelu: bool | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if has_bands(self):
                raise ValueError(
                    "channels, bands: open_clip's image towers read RGB pictures alone; for other channels use encoder "
                    "{type: timm, channels: …}, image-vit or image-cnn"
                )
            if sum(map(bool, (self.pretrained, self.checkpoint, ":" in self.model))) > 1:
                raise ValueError("give one of a pretrained tag, a checkpoint, and a folder or repository as the model")
            check_safetensors(self.checkpoint)

    file = "open_clip.json"
    # What its vision transformers can do; an instance narrows it to what its model can.
    supports = frozenset({"tokens", "drop_tokens", "layers"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        if files is not None:
            made_of, preprocess = self.read_files(files)
            visual = _visual(made_of)
        else:
            made_of, own = _resolve(config)
            visual = _visual(made_of)
            preprocess = config.over(own, config.model)
            whole = open_clip_folder(config.model)
            if whole is not None:
                mine = {key: value for key, value in whole.state().items() if key.startswith("visual.")}
                visual.load_state_dict({key.removeprefix("visual."): value for key, value in mine.items()})
            elif config.pretrained:
                visual.load_state_dict(_pretrained(config, made_of))
            elif config.checkpoint:
                _load(visual, config.checkpoint)
        super().__init__(config, files, trunk=_trunk(visual, preprocess.size), made_of=made_of, preprocess=preprocess)


class _ViTTrunk(nn.Module):
    """open_clip's own vision transformer."""

    supports = frozenset({"tokens", "drop_tokens", "layers"})

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self.depth = len(visual.transformer.resblocks)
        self.width, self.pooled_width = visual.positional_embedding.shape[1], visual.output_dim

    def tokenize(self, pixels: Tensor) -> Tokens:
        visual = self.visual
        patches = visual.conv1(pixels)
        B, _, *shape = patches.shape
        special = visual.class_embedding.to(patches.dtype).expand(B, 1, -1)
        values = torch.cat([special, patches.flatten(2).transpose(1, 2)], dim=1)
        values = values + visual.positional_embedding.to(values.dtype)
        return Tokens(values, Grid.regular(B, tuple(shape), special=1, device=values.device))

    def encode(self, tokens: Tokens, keep: Tensor | None, layers: Sequence[int]) -> Encoding:
        visual, kept = self.visual, tokens.keep(keep)
        full = kept.grid.shape is not None or bool(kept.grid.valid.all())
        mask = None if full else self._mask(kept)
        values = visual.ln_pre(kept.values)
        asked: dict[int, Tensor] = {}
        for number, block in enumerate(visual.transformer.resblocks, start=1):
            if visual.transformer.grad_checkpointing and torch.is_grad_enabled():
                values = checkpoint(block, values, use_reentrant=False, attn_mask=mask)
            else:
                values = block(values, attn_mask=mask)
            if number in layers:
                asked[number] = values
        pooled, _ = visual._pool(values) if full else (None, None)
        if pooled is not None and visual.proj is not None:
            pooled = pooled @ visual.proj
        values = values if visual.attn_pool is not None else visual.ln_post(values)
        return Encoding(Tokens(values, kept.grid), pooled=pooled, layers=tuple(asked[n] for n in layers))

    def _mask(self, kept: Tokens) -> Tensor:
        """Additive, [B * heads, N, N]: torch's MultiheadAttention wants the heads spelt out."""
        heads = self.visual.transformer.resblocks[0].attn.num_heads
        hidden = torch.zeros_like(kept.grid.valid, dtype=kept.values.dtype).masked_fill(~kept.grid.valid, float("-inf"))
        return hidden[:, None, None, :].expand(-1, heads, hidden.shape[1], -1).flatten(0, 1)

    def no_weight_decay(self) -> set[str]:
        return {f"visual.{name}" for name in self.visual.no_weight_decay()}


class _ResNetTrunk(nn.Module):
    """CLIP's modified ResNet: tokens are the cells of its last map, pooled by its attention pool."""

    supports = frozenset({"tokens"})
    depth = 0

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self.width, self.pooled_width = visual.attnpool.v_proj.in_features, visual.output_dim

    def tokenize(self, pixels: Tensor) -> Tokens:
        features = self.visual.stem(pixels)
        for stage in (self.visual.layer1, self.visual.layer2, self.visual.layer3, self.visual.layer4):
            features = stage(features)
        B, _, *shape = features.shape
        return Tokens(features.flatten(2).transpose(1, 2), Grid.regular(B, tuple(shape), device=features.device))

    def encode(self, tokens: Tokens, keep: Tensor | None, layers: Sequence[int]) -> Encoding:
        shape = tokens.grid.shape
        assert shape is not None, "it cannot drop tokens, so the grid is regular"
        features = tokens.values.transpose(1, 2).unflatten(2, shape)
        return Encoding(tokens, pooled=self.visual.attnpool(features))

    def no_weight_decay(self) -> set[str]:
        return {"visual.attnpool.positional_embedding"}


def _trunk(visual: Any, size: int) -> Any:
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, TimmModel):
        return TimmTrunk(visual.trunk, size, head=visual.head)
    return _ViTTrunk(visual) if isinstance(visual, VisionTransformer) else _ResNetTrunk(visual)


def _resolve(config: OpenClipImage.Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the tower is made of, and the preprocessing that it brings."""
    open_clip = import_module("open_clip")  # by name: static checkers take the plain import for this very file
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    whole = open_clip_folder(config.model)
    found = open_clip.get_model_config(config.model) if whole is None else whole.model
    if found is None:
        names = open_clip.list_models()
        raise ValueError(
            f"open_clip has no model {config.model!r}{near(config.model, names)}; see open_clip.list_models()"
        )
    tag: dict[str, Any] = {} if whole is None else whole.preprocess
    if config.pretrained:
        tags = open_clip.list_pretrained_tags_by_model(config.model)
        if config.pretrained not in tags:
            raise ValueError(
                f"{config.model} has no pretrained {config.pretrained!r}{near(config.pretrained, tags)}; it has: "
                f"{', '.join(tags) or 'none'}. A file of your own goes into `checkpoint`"
            )
        tag = open_clip.get_pretrained_cfg(config.model, config.pretrained)
    vision = {**found["vision_cfg"], "timm_model_pretrained": False, "patch_dropout": 0.0, "output_tokens": False}
    if config.size is not None:
        vision["image_size"] = config.size
    quick = (
        config.quick_gelu if config.quick_gelu is not None else tag.get("quick_gelu", found.get("quick_gelu", False))
    )
    brought = merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), found.get("preprocess_cfg", {})), tag)
    size = vision.get("image_size", 224)
    if isinstance(size, (list, tuple)):
        if size[0] != size[1]:
            raise ValueError(f"{config.model} reads pictures of {size}, which are not square; set `size`")
        size = size[0]
    resize = {"shortest": "crop", "squash": "squash"}.get(brought["resize_mode"])
    if resize is None and config.resize is None:
        raise ValueError(f"{config.model} was trained with {brought['resize_mode']!r} resizing; set `resize`")
    own = {"size": size, "resize": resize, **{key: brought[key] for key in ("interpolation", "mean", "std")}}
    made_of = {"embed_dim": found["embed_dim"], "vision_cfg": vision, "quick_gelu": bool(quick), "size": config.size}
    return made_of, own


def _visual(made_of: dict[str, Any]) -> Any:
    from open_clip.model import _build_vision_tower  # the only maker of a visual tower without a text tower

    visual: Any = _build_vision_tower(made_of["embed_dim"], made_of["vision_cfg"], made_of["quick_gelu"])
    if made_of["size"] is not None and hasattr(visual, "set_input_size"):  # a timm tower ignores image_size until told
        visual.set_input_size(made_of["size"])
    return visual


def _pretrained(config: OpenClipImage.Config, made_of: dict[str, Any]) -> dict[str, Tensor]:
    """The visual part of the published weights; open_clip converts them (and resizes positions)."""
    whole = import_module("open_clip").create_model(
        config.model,
        pretrained=config.pretrained,
        force_quick_gelu=made_of["quick_gelu"],
        force_image_size=config.size,
        pretrained_text=False,
    )
    return whole.visual.state_dict()


def _load(visual: Any, path: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"checkpoint: there is no file {path!r}")
    try:
        state = load_file(path)
        if any(key.startswith("visual.") for key in state):
            state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        visual.load_state_dict(state)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path!r} cannot be loaded: {error}") from error
