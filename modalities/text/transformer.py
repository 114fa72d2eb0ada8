"""Our own text transformer (the text tower of CLIP, arXiv:2103.00020, made small and token-complete)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.blocks import Transformer
from mmrep.config import config
from mmrep.modalities.text._base import TextEncoder, grid
from mmrep.modalities.text._prompts import Prompts, without_prompt
from mmrep.modalities.text._tokenizer import BEGIN, END, FILE, PAD, ByteTokenizer, SentencePiece, Tokenizer, learn
from mmrep.tokens import Content, Encoding, Inputs, Tokens


@config
class TextTransformerConfig(Prompts):
    """tokenizer: `sentencepiece` is learned from the training texts when a recipe runs; `bytes` needs no learning.

    algorithm: how sentencepiece chooses its pieces. vocab_size: pieces at most (a small corpus gives fewer).
    character_coverage: share of characters that get a piece; rarer ones are spelled in bytes. lowercase: fold case.
    max_length: tokens at most, begin and end token included. width, depth, heads, mlp_ratio: size of the transformer.
    causal: a token sees only those before it (pool it with `eos` or `last`). dropout: on embeddings and in every
    block. drop_path: stochastic depth of the last block. Prompts: see `Prompts`.
    """

    tokenizer: Literal["bytes", "sentencepiece"] = "bytes"
    algorithm: Literal["unigram", "bpe"] = "unigram"
    vocab_size: Annotated[int, Field(ge=264)] = 8000
    character_coverage: Annotated[float, Field(gt=0, le=1)] = 0.9995
    lowercase: bool = True
    max_length: Annotated[int, Field(ge=3)] = 77
    width: Annotated[int, Field(ge=1)] = 256
    depth: Annotated[int, Field(ge=1)] = 6
    heads: Annotated[int, Field(ge=1)] = 4
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    causal: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")


class TextTransformer(TextEncoder):
    """A pre-norm transformer over learned pieces or bytes, with learned positions.

    Each text is ``begin, its tokens, end``; begin and end are special tokens, so pool ``cls`` reads the first (only
    useful if not causal) and pool ``eos`` the last. The tokens returned have gone through the final norm; the outputs
    of ``layers`` have not.
    """

    Config = TextTransformerConfig
    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})
    pad_id = PAD

    def __init__(self, config: TextTransformerConfig, files: Path | None = None) -> None:
        super().__init__(config, files)
        self.tokenizer = _tokenizer(config, files)
        self.width = config.width
        self.depth = config.depth
        self.max_length = config.max_length
        self.embedding = nn.Embedding(self.tokenizer.size, config.width)
        self.positions = nn.Parameter(torch.empty(config.max_length, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = Transformer(
            config.width, config.depth, config.heads, config.mlp_ratio, config.dropout, config.drop_path, config.causal
        )
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    @classmethod
    def fit(cls, config: TextTransformerConfig, samples: Iterable[Any], folder: Path) -> None:
        """Learn the sentencepiece model from the training texts, into ``folder/tokenizer.model``.

        Raises:
            ValueError: there is no text, or ``vocab_size`` is smaller than the texts' alphabet.
        """
        if config.tokenizer == "sentencepiece":
            learn(
                samples, folder, algorithm=config.algorithm, vocab_size=config.vocab_size, lowercase=config.lowercase,
                character_coverage=config.character_coverage,
            )  # fmt: skip

    def vectors(self) -> nn.Embedding:
        """See `TextEncoder.vectors`."""
        return self.embedding

    def token_ids(self, text: str) -> tuple[list[int], list[bool]]:
        """Begin, the text's ids cut to fit, end."""
        return self.framed(self.pieces(text)[: self.room])

    def pieces(self, text: str) -> list[int]:
        """All ids of a text."""
        return self.tokenizer(text)

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Begin and end."""
        return [BEGIN], [END]

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``ids`` [B, L] to tokens [B, L, D], with positions."""
        ids = inputs["ids"]
        places = self.positions[: ids.shape[1]]
        values = self.dropout(self.embedding(ids) + places)
        return Tokens(values, grid(inputs), places.expand_as(values))

    def content(self, inputs: Inputs) -> Content:
        """See `Encoder.content`: the ids, of all that the tokenizer has."""
        return Content(inputs["ids"], vocabulary=self.tokenizer.size)

    def recode(self, inputs: Inputs, codes: Tensor) -> Inputs:
        """See `Encoder.recode`."""
        return {**inputs, "ids": codes}

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Run the transformer over the kept tokens; see `Encoder.encode`.

        Begin and end are always kept and come first. A causal transformer goes by a token's place in the text, not
        by where it is stored.
        """
        self.check_request(keep, layers)
        tokens = tokens.keep(keep)
        order = tokens.grid.coords[..., 0] if self.config.causal else None
        values, outputs = self.transformer(tokens.values, tokens.grid.valid, layers, order)
        return Encoding(Tokens(self.norm(values), without_prompt(tokens.grid)), layers=outputs)

    def save_files(self, folder: Path) -> None:
        """Write the sentencepiece model, if there is one."""
        if isinstance(self.tokenizer, SentencePiece):
            (folder / FILE).write_bytes(self.tokenizer.proto)

    def no_weight_decay(self) -> set[str]:
        """The position table."""
        return {"positions"}


def _tokenizer(config: TextTransformerConfig, files: Path | None) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer(config.lowercase)
    if files is None or not (files / FILE).is_file():
        raise ValueError(
            f"tokenizer 'sentencepiece' is learned from training texts, and there is no learned {FILE}"
            f"{'' if files is None else f' in {files}'}: train through a recipe, call "
            "TextTransformer.fit(config, texts, folder) and pass files=folder, or set tokenizer: bytes"
        )
    return SentencePiece(files)
