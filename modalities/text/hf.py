"""Any Hugging Face text model: BERT-like encoders, decoders, the encoder of T5, the text part of joint models."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.hub.pretrained import locate
from mmrep.hub.remote_code import check, read_code, write_code
from mmrep.layers import stacked
from mmrep.modalities.text._base import TextEncoder, frame_of, grid, last_special, no_rows, one_blank
from mmrep.modalities.text._hf_load import (
    FULL_LENGTH,
    TextPart,
    first_place,
    load,
    load_tokenizer,
    max_length,
    rebuild,
    without_pooler,
)
from mmrep.modalities.text._hf_pe import Space
from mmrep.modalities.text._hf_places import Placing, mask, placing
from mmrep.modalities.text._prompts import Prompts, without_prompt
from mmrep.tokens import Content, Encoding, Grid, Inputs, Tokens


@config
class HFTextConfig(Prompts):
    """path: a folder, a hub id, or `package:name/folder` for a folder inside an installed Python package.

    revision: hub branch, tag or commit. local_files_only: never touch the network. max_length: tokens at most, None =
    what the model allows. pad: to the longest text of the batch or to max_length; SigLIP, which reads its padding, is
    padded to max_length in any case. projection: go through the projection into the joint space that the checkpoint of
    a CLIP-like model, SigLIP, ALIGN or CLAP has. pooler: keep the pooling layer of BERT-like models, for pool `native`;
    without it that layer would get no gradient. space: of PE audio-video, what its texts are compared with.
    trust_remote_code: the checkpoint needs Python code of its own; this alone does not run it, see
    `mmrep.hub.remote_code`. Prompts: see `Prompts`.
    """

    path: str
    revision: str | None = None
    local_files_only: bool = False
    max_length: Annotated[int, Field(ge=1)] | None = None
    pad: Literal["longest", "max_length"] = "longest"
    projection: bool = True
    pooler: bool = False
    space: Space | None = None
    trust_remote_code: bool = False


class HFText(TextEncoder):
    """A Hugging Face text model, its tokenizer included.

    Choose the pool at the tower: ``mean`` for sentence-transformers models, ``cls`` or ``last`` where the model card
    says so, ``eos`` or ``native`` for CLIP, ``native`` for other joint models. Padding is on the right whatever the
    tokenizer's own side is (but for SigLIP, which reads it), and is told by the mask, never by the padding id.

    `forward` calls the model with ids, exactly as transformers users do. `tokenize` gives the input embeddings,
    *without* positions, which the model adds inside `encode`. Tokens can be dropped where the model can be told the
    places of those that are kept (`mmrep.modalities.text._hf_places`); what comes out is what the whole text gives if
    nothing attends to the dropped ones. Where the embeddings are as wide as the output, tokens can be hidden. A
    projection is linear and is applied to every token, which commutes with the pools; where it changes the width,
    ``"layers"`` is not supported. CLAP's and PE's is not linear: it is applied to the pooled vector alone, of
    width ``pooled_width``, which is not of length 1 (CLAP's ``get_text_features`` makes it so).
    """

    Config = HFTextConfig
    # What most models can do; an instance narrows it to what its model can.
    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content", "attention"})

    def __init__(self, config: HFTextConfig, files: Path | None = None) -> None:
        super().__init__(config, files)
        missing: set[str] = set()
        options: dict[str, Any] = {"local_files_only": True}
        code = config.trust_remote_code
        if files is not None and (files / "config.json").is_file():
            source = str(files)
            if code:
                check(config.path, source, files=files, **options)
            self.model, self.hf_config = rebuild(files, projection=config.projection, code=code)
        else:
            source = locate(config.path)
            options = {"revision": config.revision, "local_files_only": config.local_files_only}
            if code:
                check(config.path, source, **options)
            self.model, self.hf_config, missing = load(
                source, projection=config.projection, code=code, space=config.space, **options
            )
        self._code = read_code(source, **options) if code else {}
        if not config.pooler:
            without_pooler(self.model)
        elif missing:
            raise ValueError(f"path {config.path!r}: pooler is asked for, but the checkpoint has no values for it")
        self.tokenizer: Any = load_tokenizer(source, code=code, **options)
        self.pad_id = next((n for n in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if n is not None), 0)
        self.full_length = self.hf_config.model_type in FULL_LENGTH
        if self.full_length and not config.projection:
            self._inner.head = torch.nn.Identity()
        self.max_length = self._max_length()
        hidden, kind = self.hf_config.hidden_size, self.hf_config.model_type
        last = self.hf_config.project_dim if kind == "altclip_text_model" else hidden
        self.width = getattr(self._projection, "out_features", last)
        if getattr(self.model, "pooled_projection", None) is not None:
            self.pooled_width = self.hf_config.projection_dim
        if self.width != hidden:
            self.supports = self.supports - {"layers"}
        if self._embedding.embedding_dim != self.width:  # a mask token is as wide as the encoder's output
            self.supports = self.supports - {"mask_token"}
        if isinstance(self.model, TextPart):  # a part cannot change how the whole computes attention
            self.supports = self.supports - {"attention"}
        self.placing = placing(self.hf_config)
        if self.placing is None:
            self.supports = self.supports - {"drop_tokens"}
        self.depth = self.hf_config.num_hidden_layers if "layers" in self.supports else 0
        parameters = inspect.signature(self._inner.forward).parameters
        self._is_clip = kind in ("clip_text_model", "metaclip_2_text_model", "xclip_text_model")
        self._reads_first = isinstance(self.model, TextPart) and self._projection is not None
        self._takes_embeddings = "inputs_embeds" in parameters

    def layer_modules(self) -> list[torch.nn.Module]:
        """See `Encoder.layer_modules`; also of a model whose projection keeps its layers from being asked for."""
        return stacked(self._inner, self.hf_config.num_hidden_layers)

    @property
    def _projection(self) -> torch.nn.Module | None:
        """The linear map of tokens into the checkpoint's joint space: CLIP's text_projection, SigLIP's head."""
        if self.full_length:
            return self._inner.head
        return getattr(self.model, "text_projection", None)

    @property
    def _inner(self) -> Any:
        """The model without a class that transformers puts around it in some versions."""
        return getattr(self.model, "text_model", self.model)

    def _max_length(self) -> int:
        limit = max_length(self.model, self.hf_config, self.tokenizer)
        asked = self.config.max_length
        if asked is None:
            return limit
        if asked > limit or (self.full_length and asked != limit):
            rule = "exactly" if self.full_length else "at most"
            raise ValueError(f"max_length={asked}: {self.config.path!r} reads {rule} {limit} tokens")
        return asked

    def vectors(self) -> torch.nn.Embedding | None:
        """See `TextEncoder.vectors`."""
        table = self._embedding
        return table if isinstance(table, torch.nn.Embedding) else None

    def token_ids(self, text: str) -> tuple[list[int], list[bool]]:
        """The tokenizer's ids; truncation keeps the special tokens at both ends."""
        coded = self.tokenizer(text, truncation=True, max_length=self.max_length, return_special_tokens_mask=True)
        return list(coded["input_ids"]), [bool(mark) for mark in coded["special_tokens_mask"]]

    def pieces(self, text: str) -> list[int]:
        """All ids of a text."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts around a text; its own lists of special ids may hold others."""
        return frame_of(self.tokenizer("a b")["input_ids"], self.pieces("a b"))

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad on the right; see the config's ``pad``.

        SigLIP's padding counts as tokens: it is ``valid``, and stands on the side where its tokenizer puts it.
        """
        if not self.full_length:
            return self.pad(items, self.max_length) if self.config.pad == "max_length" else super().collate(items)
        inputs = self.pad(items, self.max_length)
        counts = inputs["valid"].sum(1, keepdim=True)
        if self.tokenizer.padding_side == "left":
            turned = (torch.arange(self.max_length) + counts) % self.max_length
            inputs = {name: values.gather(1, turned) for name, values in inputs.items()}
        return {**inputs, "valid": torch.ones_like(inputs["valid"])}

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``ids`` [B, L] to input embeddings [B, L, D]; the model adds positions itself."""
        values = self._embedding(inputs["ids"])
        return Tokens(values, grid(inputs), torch.zeros_like(values) if "mask_token" in self.supports else None)

    def content(self, inputs: Inputs) -> Content:
        """See `Encoder.content`: the ids, of all that the model can embed."""
        return Content(inputs["ids"], vocabulary=self._embedding.num_embeddings)  # pyright: ignore[reportArgumentType]

    def recode(self, inputs: Inputs, codes: Tensor) -> Inputs:
        """See `Encoder.recode`."""
        return {**inputs, "ids": codes}

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Run the model on input embeddings of the kept tokens; see `Encoder.encode`.

        A token has the place that it has in the text, wherever it is stored; special tokens come first.
        """
        self.check_request(keep, layers)
        return self._encode(tokens.keep(keep), layers, None if keep is None else self.placing)

    def attended(self, tokens: Tokens) -> Encoding:
        """See `Encoder.attended`. Attention is computed the slow way, which shows it."""
        if "attention" not in self.supports:
            return super().attended(tokens)
        model: Any = self.model
        before = self.hf_config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            return self._encode(tokens, (), None, attention=True)
        finally:
            model.set_attn_implementation(before)

    def _encode(
        self, tokens: Tokens, layers: Sequence[int], how: Placing | None, *, attention: bool = False
    ) -> Encoding:
        if not len(tokens.values):
            return no_rows(self._encode(one_blank(tokens), layers, None, attention=attention))
        options: dict[str, Any] = {"output_attentions": True} if attention else {}
        if self._takes_embeddings:
            return self._run(tokens.grid, layers, how, inputs_embeds=tokens.values, **options)
        # CLIP and SigLIP take ids only: give them any, and the real embeddings where they look the ids up.
        handle = self._embedding.register_forward_hook(lambda *_: tokens.values)
        try:
            ids = torch.zeros_like(tokens.grid.valid, dtype=torch.long)
            return self._run(tokens.grid, layers, how, input_ids=ids, **options)
        finally:
            handle.remove()

    def forward(self, inputs: Inputs) -> Encoding:
        """Run the model on ids."""
        if not len(inputs["ids"]):
            return no_rows(self.forward({key: value.new_ones(1, value.shape[1]) for key, value in inputs.items()}))
        return self._run(grid(inputs), (), None, input_ids=inputs["ids"])

    def _run(self, where: Grid, layers: Sequence[int], placed: Placing | None, **values: Any) -> Encoding:
        if placed is not None:
            values["position_ids"] = where.coords[..., 0].long() + first_place(self.model)
            values["attention_mask"] = mask(placed, self.hf_config, where, next(self.model.parameters()).dtype)
        else:
            values["attention_mask"] = None if self.full_length else where.valid.long()
        out = self.model(output_hidden_states=bool(layers), return_dict=True, **values)
        hidden = out.last_hidden_state if self._projection is None else self._projection(out.last_hidden_state)
        if self._is_clip:
            # Not the library's choice, which looks for the largest id, or for an id that the config may have wrong, and
            # reads token 0 where it finds none.
            end = last_special(where.valid, where.special)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), end]
        elif self._reads_first:
            pooled = hidden[:, 0]
        else:
            pooled = getattr(out, "pooler_output", None)
        picked = tuple(out.hidden_states[n] for n in layers) if layers else ()
        extra = {"attention": torch.stack(out.attentions, 1)} if "output_attentions" in values else {}
        return Encoding(Tokens(hidden, without_prompt(where)), pooled, picked, extra)

    @property
    def _embedding(self) -> torch.nn.Module:
        return self.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]

    def save_files(self, folder: Path) -> None:
        """Write the tokenizer, the model's own config.json, and the code that it needs, if it does."""
        self.tokenizer.save_pretrained(folder)
        self.hf_config.save_pretrained(folder)
        write_code(self._code, folder)
