"""What every text encoder shares: reading a raw value, and padding on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrep.encoder import BadSampleError, Encoder
from mmrep.modalities.text._examples import examples, oddities
from mmrep.tokens import Encoding, Grid, Inputs, Tokens
from mmrep.views import View


class TextEncoder(Encoder):
    """Reads ``str``, UTF-8 ``bytes``, or a list of them (several captions of one thing: a view may choose).

    The inputs of a batch are ``ids`` int64 [B, L], ``valid`` bool [B, L] and ``special`` bool [B, L]; padding is on
    the right. A special token is one that the encoder added itself (begin, end, class, separator), never one that
    the text spells out.

    Attributes:
        max_length: the most tokens of one text, special tokens included; longer texts lose their tail but keep
            their end token.
        pad_id: the id that fills the padding; padding is known by ``valid``, never by this id.
    """

    modality = "text"
    max_length: int
    pad_id: int = 0

    def token_ids(self, text: str) -> tuple[list[int], list[bool]]:
        """One text to ids of at most ``max_length`` tokens, and which of them are special tokens."""
        raise NotImplementedError

    def preview(self, raw: Any) -> str:
        """The text that is read without a view, shortened."""
        read = read_text(raw)
        text = " ".join((read if isinstance(read, str) else read[0]).split())
        return text if len(text) <= 120 else text[:117] + "…"

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """Text to ``ids`` int64 [L] and ``special`` bool [L].

        Args:
            raw: a string, UTF-8 bytes, or a list of them. Blank entries of a list do not count.
            view: called with the string or the list of strings; without a view (or if it returns a list) the first
                string of a list is read.
            seed: the view's seed.

        Raises:
            BadSampleError: ``"empty text"`` (nothing but white space) or ``"not text"`` (another type, wrong UTF-8).
        """
        text = read_text(raw)
        if view is not None:
            text = view.sample(text, seed)
        if not isinstance(text, str):
            text = text[0]
        ids, special = self.token_ids(text)
        if not ids:
            raise BadSampleError("empty text", f"the tokenizer leaves nothing of {text[:40]!r}")
        return {"ids": torch.tensor(ids), "special": torch.tensor(special, dtype=torch.bool)}

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad on the right to the longest text: ``ids``, ``valid`` and ``special``, each [B, L]."""
        return self.pad(items, max((len(item["ids"]) for item in items), default=1))

    def pad(self, items: Sequence[Inputs], length: int) -> Inputs:
        """Pad on the right to ``length`` tokens."""
        ids = torch.full((len(items), length), self.pad_id)
        valid = torch.zeros(len(items), length, dtype=torch.bool)
        special = torch.zeros(len(items), length, dtype=torch.bool)
        for row, item in enumerate(items):
            n = len(item["ids"])
            ids[row, :n] = item["ids"]
            valid[row, :n] = True
            special[row, :n] = item["special"]
        return {"ids": ids, "valid": valid, "special": special}

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
    return Grid.sequence(inputs["valid"], inputs["special"])


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
