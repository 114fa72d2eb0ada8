"""The text tower of any open_clip model, by the model's name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.config import config
from mmrep.hub.open_clip_folder import open_clip_folder
from mmrep.modalities.text._base import TextEncoder, frame_of, grid, last_special, no_rows, one_blank
from mmrep.modalities.text._prompts import Prompts, without_prompt
from mmrep.registry import near
from mmrep.tokens import Encoding, Grid, Inputs, Tokens

FILE = "open_clip_config.json"
_SMALLEST_VISION = {"layers": 1, "width": 64, "image_size": 8, "patch_size": 8}


@config
class OpenClipTextConfig(Prompts):
    """model: an open_clip model name, such as `ViT-B-32` (`open_clip.list_models()` has them all); or `local-dir:path`
    or `hf-hub:organisation/name`, which bring their weights.

    pretrained: a tag of that model (downloaded by open_clip), or a .safetensors file; None = random weights.
    projection: go through the text projection into the joint space, as `encode_text` does. Prompts: see `Prompts`.
    """

    model: str
    pretrained: str | None = None
    projection: bool = True


class OpenClipText(TextEncoder):
    """An open_clip text tower with its tokenizer.

    Pool ``native`` is what ``encode_text`` returns, before normalisation. The projection is linear and is applied to
    every token, which commutes with taking one of them; where it changes the width, ``"layers"`` is not supported.
    Layers are returned before the final norm. Tokens cannot be dropped.

    Texts of a causal CLIP tower are padded to the longest of the batch, since nothing attends to what comes after it;
    towers that attend both ways or read the last place (SigLIP, CLIPA) were trained on full-length padding and get it,
    and their padding is ``valid``.
    """

    Config = OpenClipTextConfig
    supports = frozenset({"tokens", "layers"})

    def __init__(self, config: OpenClipTextConfig, files: Path | None = None) -> None:
        super().__init__(config, files)
        open_clip = _library()
        if files is not None and (files / FILE).is_file():
            source = f"local-dir:{files}"
            self.model_config: dict[str, Any] = json.loads((files / FILE).read_text())["model_cfg"]
            text = _random(self.model_config)
        else:
            whole = open_clip_folder(config.model)
            source = config.model if whole is None else f"local-dir:{whole.folder}"
            text, self.model_config = _new(config)
        self.text: Any = text
        if not config.projection:
            self.text.text_projection = None
        self.tokenizer: Any = open_clip.get_tokenizer(source)
        self.max_length = self.text.context_length
        self.pad_id = self.text.pad_id
        self.width = self.text.width if self.text.text_projection is None else self.text.output_dim
        if self.width != self.text.width:
            self.supports = self.supports - {"layers"}
        self.depth = len(self.text.transformer.resblocks) if "layers" in self.supports else 0
        self._is_clip_tokenizer = isinstance(self.tokenizer, open_clip.SimpleTokenizer)
        causal = self.text.attn_mask is not None and self.text.pool_type in ("argmax", "eos", "first")
        self.full_length = not (causal and self._is_clip_tokenizer)

    def layer_modules(self) -> list[nn.Module]:
        """See `Encoder.layer_modules`; also of a model whose projection keeps its layers from being asked for."""
        return list(self.text.transformer.resblocks)

    def vectors(self) -> nn.Embedding:
        """See `TextEncoder.vectors`."""
        return self.text.token_embedding

    def token_ids(self, text: str) -> tuple[list[int], list[bool]]:
        """open_clip's ids; of a CLIP tokenizer without the padding after the end token, which truncation keeps."""
        ids: list[int] = self.tokenizer([text])[0].tolist()
        if self._is_clip_tokenizer and not self.full_length:
            ids = ids[: self._end(ids) + 1]
        return ids, self._special(ids)

    def pieces(self, text: str) -> list[int]:
        """All ids of a text.

        Raises:
            ValueError: open_clip puts this tokenizer's ids together in a way of its own.
        """
        if self._is_clip_tokenizer:
            return self.tokenizer.encode(text)
        if getattr(self.tokenizer, "tokenizer_mode", "") or getattr(self.tokenizer, "strip_sep_token", False):
            raise ValueError(f"{self.config.model!r}: its tokenizer gives whole texts alone, so it can neither be read "
                             "in chunks nor leave a prompt out of the pool")  # fmt: skip
        cleaned = self.tokenizer.clean_fn(text)
        return list(self.tokenizer.tokenizer(cleaned, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Begin and end of a CLIP tokenizer, or what another puts around a text."""
        if self._is_clip_tokenizer:
            return [self.tokenizer.sot_token_id], [self.tokenizer.eot_token_id]
        return frame_of(self.tokenizer.tokenizer(self.tokenizer.clean_fn("a b"))["input_ids"], self.pieces("a b"))

    def framed(self, ids: list[int]) -> tuple[list[int], list[bool]]:
        """See `TextEncoder.framed`; padded for a tower that reads its padding."""
        before, after = self.frame
        whole = [*before, *ids, *after]
        if not self._is_clip_tokenizer or self.full_length:
            fill = 0 if self._is_clip_tokenizer else self.tokenizer.tokenizer.pad_token_id
            whole += [fill] * (self.max_length - len(whole))
        return whole, self._special(whole)

    def _special(self, ids: list[int]) -> list[bool]:
        end = self._end(ids)
        return [place == end or (place == 0 and self._is_clip_tokenizer) for place in range(len(ids))]

    def _end(self, ids: list[int]) -> int:
        """The place of the end token."""
        if self._is_clip_tokenizer:  # the last one: a text may spell the token out
            return len(ids) - 1 - ids[::-1].index(self.tokenizer.eot_token_id)
        if self.text.pool_type == "eos" and self.text.eos_id in ids:
            return ids.index(self.text.eos_id)
        return max(range(len(ids)), key=ids.__getitem__) if self.text.pool_type == "argmax" else len(ids) - 1

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad on the right; see the class."""
        inputs = super().collate(items)
        return {**inputs, "valid": torch.ones_like(inputs["valid"])} if self.full_length else inputs

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``ids`` [B, L] to tokens [B, L, D], with positions."""
        ids = inputs["ids"]
        values = self.text.token_embedding(ids) + self.text.positional_embedding[: ids.shape[1]]
        return Tokens(values, grid(inputs))

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Run the transformer, the final norm and the projection; see `Encoder.encode`."""
        self.check_request(keep, layers)
        if not len(tokens.values):
            return no_rows(self.encode(one_blank(tokens), layers=layers))
        N = tokens.values.shape[1]
        mask = None if self.text.attn_mask is None else self.text.attn_mask[:N, :N]
        asked = sorted({n - 1 for n in layers})
        if asked:
            values, outputs = self.text.transformer.forward_intermediates(tokens.values, attn_mask=mask, indices=asked)
        else:
            values, outputs = self.text.transformer(tokens.values, attn_mask=mask), []
        by_layer = dict(zip(asked, outputs, strict=True))
        values = self._project(self.text.ln_final(values))
        pooled = self._pool(values, tokens.grid)
        return Encoding(Tokens(values, without_prompt(tokens.grid)), pooled, tuple(by_layer[n - 1] for n in layers))

    def _project(self, values: Tensor) -> Tensor:
        projection = self.text.text_projection
        if projection is None:
            return values
        return projection(values) if isinstance(projection, nn.Module) else values @ projection

    def _pool(self, values: Tensor, where: Grid) -> Tensor | None:
        kind = self.text.pool_type
        if kind == "first":
            return values[:, 0]
        if kind == "last":
            return values[:, -1]
        if kind == "none":
            return None
        return values[torch.arange(len(values), device=values.device), last_special(where.valid, where.special)]

    def save_files(self, folder: Path) -> None:
        """Write the tower's architecture in open_clip's own form, and the tokenizer if it is not CLIP's."""
        (folder / FILE).write_text(json.dumps({"model_cfg": self.model_config, "preprocess_cfg": {}}, indent=2))
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(str(folder))

    def no_weight_decay(self) -> set[str]:
        """The position table."""
        return {"text.positional_embedding"}


def _new(config: OpenClipTextConfig) -> tuple[nn.Module, dict[str, Any]]:
    """A tower as the config asks for, and the open_clip config that describes it."""
    open_clip = _library()
    whole = open_clip_folder(config.model)
    full = open_clip.get_model_config(config.model) if whole is None else whole.model
    if full is None:
        names = open_clip.list_models()
        raise ValueError(f"model {config.model!r} is unknown to open_clip{near(config.model, names) or '.'} "
                         "`open_clip.list_models()` has all")  # fmt: skip
    text_cfg = full["text_cfg"]
    if text_cfg.get("hf_model_name"):
        raise ValueError(
            f"model {config.model!r} has {text_cfg['hf_model_name']!r} of Hugging Face as its text tower: use encoder "
            "{type: hf-text, path: …} for that"
        )
    if text_cfg.get("embed_cls") or "multimodal_cfg" in full:
        raise ValueError(f"model {config.model!r} is a CoCa model, whose text tower open-clip-text cannot read")
    keys = ("embed_dim", "quick_gelu")
    small = {**{k: full[k] for k in keys if k in full}, "text_cfg": text_cfg, "vision_cfg": _SMALLEST_VISION}
    weights: dict[str, Tensor] | None = None
    if whole is not None:
        found = whole.state().items()
        weights = {key.removeprefix("text."): value for key, value in found if key.startswith("text.")}
    elif config.pretrained is not None:
        quick, weights = _pretrained(config)
        # A tag may come with another activation than the model's name says; a wrong one would go unnoticed.
        small["quick_gelu"] = quick or full.get("quick_gelu", False)
    text = _random(small)
    if weights is not None:
        text.load_state_dict({key: weights[key] for key in text.state_dict()})
    return text, small


def _random(model_config: dict[str, Any]) -> nn.Module:
    """The text tower that ``model_config`` describes, with random weights."""
    # The copies: open_clip takes keys out of what it is given. The image tower is needed to build, and thrown away.
    given = json.loads(json.dumps(model_config))
    return _library().CustomTextCLIP(**given).text


def _pretrained(config: OpenClipTextConfig) -> tuple[bool, dict[str, Tensor]]:
    """Whether the weights want QuickGELU, and the state of the text tower (the rest of the model is thrown away)."""
    open_clip = _library()
    pretrained = str(config.pretrained)
    tag = open_clip.get_pretrained_cfg(config.model, pretrained)
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(config.model)
        path = Path(pretrained)
        if not path.is_file():
            raise ValueError(f"pretrained {pretrained!r} is neither a file nor a tag of {config.model!r}"
                             f"{near(pretrained, tags) or '.'} Tags: {', '.join(tags) or 'none'}")  # fmt: skip
        if path.suffix != ".safetensors":
            raise ValueError(
                f"pretrained {pretrained!r} may be a pickle: reading one can run any program, so it is refused. Where "
                "you trust it, convert it to .safetensors"
            )
    quick = bool(tag.get("quick_gelu")) if tag else False
    try:
        model = open_clip.create_model(config.model, pretrained=pretrained, force_quick_gelu=quick, weights_only=True)
    except RuntimeError as error:
        raise ValueError(f"model {config.model!r} with pretrained {pretrained!r} cannot be loaded: {error}") from error
    return quick, getattr(model, "text", model).state_dict()


def _library() -> Any:
    """The open_clip package, imported when it is needed, by name: to a type checker this file has the same one."""
    return importlib.import_module("open_clip")
