"""What every text encoder shares: reading a raw value, and padding on the right."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmrep.encoder import BadSampleError, Encoder
from mmrep.modalities.text._examples import examples, oddities
from mmrep.modalities.text._prompts import PromptGrid, choose, shared_start, split
from mmrep.tokens import Encoding, Grid, Inputs, Tokens
from mmrep.views import View


class TextEncoder(Encoder):
    """Reads ``str``, UTF-8 ``bytes``, or a list of them (several captions of one thing: a view may choose).

    A dict ``{"text": …, "prompt": …}`` or ``{"text": …, "instruction": …}`` brings its own prompt; see `Prompts`, which
    the config extends.

    The inputs of a batch are ``ids`` int64 [B, L], ``valid`` bool [B, L] and ``special`` bool [B, L]; padding is on
    the right. A special token is one that the encoder added itself (begin, end, class, separator), never one that
    the text spells out. Where prompts are not pooled there is ``prompt`` bool [B, L], too.

    Attributes:
        max_length: the most tokens of one text, special tokens included; longer texts lose their tail but keep
            their end token (`ChunkedText` reads them whole).
        pad_id: the id that fills the padding; padding is known by ``valid``, never by this id.
    """

    modality = "text"
    max_length: int
    pad_id: int = 0

    def token_ids(self, text: str) -> tuple[list[int], list[bool]]:
        """One text to ids of at most ``max_length`` tokens, and which of them are special tokens."""
        raise NotImplementedError

    def pieces(self, text: str) -> list[int]:
        """All ids of a text, however long, without special tokens."""
        raise NotImplementedError

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that stand before and after the ids of every text."""
        raise NotImplementedError

    def vectors(self) -> nn.Embedding | None:
        """The table of token vectors that `tokenize` looks ids up in, None if there is no such thing."""
        return None

    @property
    def room(self) -> int:
        """How many ids of a text fit between the special tokens."""
        before, after = self.frame
        return self.max_length - len(before) - len(after)

    def framed(self, ids: list[int]) -> tuple[list[int], list[bool]]:
        """`token_ids` of at most `room` ids instead of a text."""
        before, after = self.frame
        return [*before, *ids, *after], [True] * len(before) + [False] * len(ids) + [True] * len(after)

    def preview(self, raw: Any) -> str:
        """The text that is read without a view and without a prompt, shortened."""
        read = read_text(split(raw, self.config)[0])
        text = " ".join((read if isinstance(read, str) else read[0]).split())
        return text if len(text) <= 120 else text[:117] + "…"

    def prompted(self, raw: Any, name: str | Sequence[str] | None, prompt: str | None) -> Any:
        """A raw value with the prompt that a caller of ``Model.encode`` chose; see `mmrep.modalities.text._prompts`.

        Raises:
            UnknownNameError: there is no prompt of that name.
        """
        return choose(raw, self.config, name, prompt)

    def reading(self, raw: Any, view: View | None, seed: int) -> tuple[str, str]:
        """The prompt and the text of a raw value; see `prepare`."""
        value, prompt = split(raw, self.config)
        text = read_text(value)
        if view is not None:
            text = view.sample(text, seed)
        return prompt, text if isinstance(text, str) else text[0]

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """Text to ``ids`` int64 [L] and ``special`` bool [L], with ``prompt`` bool [L] where that is not pooled.

        Args:
            raw: a string, UTF-8 bytes, or a list of them, or a dict of one and its prompt. Blank entries of a list do
                not count.
            view: called with the string or the list of strings; without a view (or if it returns a list) the first
                string of a list is read. The prompt comes in front of what it returns.
            seed: the view's seed.

        Raises:
            BadSampleError: ``"empty text"`` (nothing but white space), ``"not text"`` (another type, wrong UTF-8), or
                ``"prompt too long"`` (nothing of the text is left to be pooled).
        """
        prompt, text = self.reading(raw, view, seed)
        ids, special = self.token_ids(prompt + text)
        if not ids:
            raise BadSampleError("empty text", f"the tokenizer leaves nothing of {text[:40]!r}")
        item = {"ids": torch.tensor(ids), "special": torch.tensor(special, dtype=torch.bool)}
        if self.config.prompt_pooled:
            return item
        first = len(self.frame[0])
        count = shared_start(self.pieces(prompt), self.pieces(prompt + text)) if prompt else 0
        if prompt and count >= self.room:
            raise BadSampleError("prompt too long", f"{count} tokens, of the {self.room} that the encoder reads")
        places = torch.arange(len(ids))
        return {**item, "prompt": (places >= first) & (places < first + count)}

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad on the right to the longest text: ``ids``, ``valid`` and ``special``, each [B, L]."""
        return self.pad(items, max((len(item["ids"]) for item in items), default=1))

    def pad(self, items: Sequence[Inputs], length: int) -> Inputs:
        """Pad on the right to ``length`` tokens."""
        ids = torch.full((len(items), length), self.pad_id)
        valid = torch.zeros(len(items), length, dtype=torch.bool)
        marks = {
            name: torch.zeros_like(valid)
            for name in ("special", *(("prompt",) if not self.config.prompt_pooled else ()))
        }
        for row, item in enumerate(items):
            n = len(item["ids"])
            ids[row, :n] = item["ids"]
            valid[row, :n] = True
            for name, mark in marks.items():
                mark[row, :n] = item[name]
        return {"ids": ids, "valid": valid, **marks}

    def length(self, item: Inputs) -> int:
        """The number of tokens."""
        return len(item["ids"])

    def examples(self, n: int, seed: int) -> list[str]:
        """Texts of one to four sentences in several languages; the third is longer than ``max_length`` tokens."""
        return examples(n, seed, self.max_length)

    def oddities(self, seed: int) -> dict[str, Any]:
        """Texts without a word, of extreme length, of odd characters, wrong UTF-8, and what is no text at all."""
        return oddities(seed)


def grid(inputs: Inputs) -> Grid:
    """The geometry of padded text: a token's coordinate is its place in the text."""
    plain = Grid.sequence(inputs["valid"], inputs["special"])
    if "prompt" not in inputs:
        return plain
    return PromptGrid(plain.coords, plain.valid, plain.special, prompt=inputs["prompt"])


def frame_of(whole: Sequence[int], text: Sequence[int]) -> tuple[list[int], list[int]]:
    """What a tokenizer put before and after ``text`` to get ``whole``.

    Raises:
        ValueError: the text's ids are not in it as they are.
    """
    for start in range(len(whole) - len(text) + 1):
        if list(whole[start : start + len(text)]) == list(text):
            return list(whole[:start]), list(whole[start + len(text) :])
    raise ValueError(f"the tokenizer changes a text's ids {list(text)} among special tokens: {list(whole)}")


def last_special(valid: Tensor, special: Tensor) -> Tensor:
    """The place of the last valid special token of each row, or of the last valid token if it has none: int64 [B]."""
    places = torch.arange(valid.shape[1], device=valid.device)
    marked = valid & special
    chosen = torch.where(marked.any(1, keepdim=True), marked, valid)
    return torch.where(chosen, places, 0).amax(1)


def one_blank(tokens: Tokens) -> Tokens:
    """One row of zeros in place of a batch without rows, for libraries that cannot run on none."""
    N, D = tokens.values.shape[1:]
    valid = torch.ones(1, N, dtype=torch.bool, device=tokens.values.device)
    return Tokens(tokens.values.new_zeros(1, N, D), Grid.sequence(valid))


def no_rows(encoding: Encoding) -> Encoding:
    """An encoding without its rows; every parameter keeps a path to it, along which flow zeros."""
    where = encoding.tokens.grid
    empty = Grid(where.coords[:0], where.valid[:0], where.special[:0])
    return Encoding(
        Tokens(encoding.tokens.values[:0], empty),
        None if encoding.pooled is None else encoding.pooled[:0],
        tuple(layer[:0] for layer in encoding.layers),
        {name: value[:0] for name, value in encoding.extra.items()},
    )


def read_text(raw: Any) -> str | list[str]:
    """Decode a raw value: a string, or the non-blank strings of a list (at least one).

    Raises:
        BadSampleError: empty or not text.
    """
    if isinstance(raw, np.ndarray):  # a list column read from parquet
        raw = raw.tolist()
    if isinstance(raw, (list, tuple)):
        texts = [text for text in map(_decode, raw) if text.strip()]
        if not texts:
            raise BadSampleError("empty text", f"a list of {len(raw)} texts, none with a word in it")
        return texts
    text = _decode(raw)
    if not text.strip():
        raise BadSampleError("empty text", repr(text[:40]))
    return text


def _decode(raw: Any) -> str:
    try:
        if isinstance(raw, (bytes, bytearray)):
            return bytes(raw).decode("utf-8")
        if isinstance(raw, str):
            raw.encode("utf-8")  # a lone surrogate is half a character: every tokenizer fails on it later
            return str(raw)
    except UnicodeError as error:
        raise BadSampleError("not text", f"not valid UTF-8: {error}") from error
    raise BadSampleError("not text", f"expected a string, got {type(raw).__name__} {repr(raw)[:40]}")
