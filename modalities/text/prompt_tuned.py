"""A frozen text encoder steered by a few learned vectors: a context in front of every text, and words of one's own.

In a recipe::

    encoder:
      type: prompt-tuned-text
      encoder: {type: hf-text, path: openai/clip-vit-base-patch32}
      context: a photo of a
    frozen: ["encoder.inner.*", "projector.*"]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import Component, Of, config
from mmrep.modalities.text._wrapped import WrappedText
from mmrep.tokens import Encoding, Inputs, Tokens
from mmrep.views import View


class PromptTunedText(WrappedText):
    """A text encoder that reads learned vectors among its tokens; what is learned is saved with the model.

    The context (CoOp, Zhou et al. 2022, arXiv:2109.01134) stands behind the begin token of every text. A word of
    ``words`` is read, wherever its tokens stand in a text, as vectors of its own (Learning to Name Classes, Parisot et
    al. 2023), as many as it has tokens, which begin as the embeddings of these tokens: before training nothing has
    changed. Texts keep their tails less as many tokens as the context has.
    """

    @config
    class Config:
        """Fields of a ``prompt-tuned-text`` encoder.

        encoder: any text encoder that pads no further than its longest text. context: the text whose tokens the context
        begins as, or how many vectors it has, drawn at random with deviation 0.02 (as CoOp does); 0 = none. words:
        class names, say, that get vectors of their own.
        """

        encoder: Annotated[Component, Of("encoders")]
        context: str | Annotated[int, Field(ge=0)] = 16
        words: tuple[str, ...] = ()

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, purpose="that reads a context")
        inner, table = self.inner, self.inner.vectors()
        if table is None:
            raise ValueError(
                f"encoder: {config.encoder.type!r} has no table of token vectors that others can stand among"
            )
        if getattr(inner, "full_length", False):
            raise ValueError(f"encoder: {config.encoder.type!r} reads its padding, which leaves no room for a context")
        self.vocabulary = table.num_embeddings
        start = inner.pieces(config.context) if isinstance(config.context, str) else [-1] * config.context
        if len(start) >= inner.room:
            raise ValueError(f"context: {len(start)} vectors, and the encoder reads {inner.room} tokens in all")
        names = [inner.pieces(word) for word in config.words]
        if bad := [word for word, ids in zip(config.words, names, strict=True) if not ids]:
            raise ValueError(f"words: the tokenizer leaves nothing of {bad[0]!r}")
        self.length_of_context = len(start)
        self.context_width = table.embedding_dim if start else 0
        self._names = sorted(_numbered(names, self.vocabulary + len(start)), key=lambda pair: -len(pair[0]))
        self._pieces = [*start, *(piece for ids in names for piece in ids)]
        self.learned = nn.Parameter(0.02 * torch.randn(len(self._pieces), table.embedding_dim))
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """What begins as a text is the text again, in the vectors that the encoder within has now."""
        table = self.inner.vectors()
        assert table is not None, "it was refused"
        for row, piece in enumerate(self._pieces):
            if piece >= 0:
                self.learned[row] = table.weight[piece]

    def no_weight_decay(self) -> set[str]:
        """The learned vectors, and those of the encoder within."""
        return {"learned", *super().no_weight_decay()}

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """As the inner encoder; ids from its vocabulary's size on are places of learned vectors."""
        plain = self.inner.prepare(raw, view=view, seed=seed)  # refuses what cannot be read
        before, after = self.inner.frame
        ids = plain["ids"].tolist()
        text = ids[len(before) : len(ids) - len(after)][: self.inner.room - self.length_of_context]
        context = list(range(self.vocabulary, self.vocabulary + self.length_of_context))
        coded, special = self.inner.framed(context + self._with_words(text))
        item = {"ids": torch.tensor(coded), "special": torch.tensor(special, dtype=torch.bool)}
        if "prompt" in plain:
            marks = plain["prompt"][len(before) :][: len(text)].tolist()
            item["prompt"] = torch.tensor([False] * (len(before) + len(context)) + marks + [False] * len(after))
        return item

    def untuned(self, raw: Any) -> Inputs:
        """A text as the inner encoder alone reads it, without context and learned words: prepared, for `collate`."""
        return self.inner.prepare(raw)

    def tokenize(self, inputs: Inputs) -> Tokens:
        """As the inner encoder, with learned vectors where ids are places of them.

        ``inputs["shift"]``, if there, is added to every context vector of a text: float [B, context_width].
        """
        table = self.inner.vectors()
        assert table is not None, "it was refused"
        places = inputs["ids"] - self.vocabulary
        known = {**inputs, "ids": torch.where(places >= 0, self.inner.pad_id, inputs["ids"])}
        shift = known.pop("shift", None)
        moved = None if shift is None else shift[:, None] * (places < self.length_of_context)[..., None]
        handle = table.register_forward_hook(partial(_put, learned=self.learned, places=places, moved=moved))
        try:
            tokens = self.inner.tokenize(known)
            return Tokens(tokens.values, tokens.grid)  # what is learned is not to be hidden
        finally:
            handle.remove()

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """As the inner encoder, which is asked for layers alone."""
        self.check_request(keep, layers)
        return self.inner.encode(tokens, None, layers)

    def _with_words(self, ids: list[int]) -> list[int]:
        """Ids of text with those of the words replaced by places of learned vectors; longer words first."""
        out: list[int] = []
        at = 0
        while at < len(ids):
            found = next(((name, own) for name, own in self._names if ids[at : at + len(name)] == name), None)
            out += [ids[at]] if found is None else found[1]
            at += 1 if found is None else len(found[0])
        return out


def _numbered(names: list[list[int]], first: int) -> list[tuple[list[int], list[int]]]:
    """Each name's ids and the ids of its learned vectors."""
    found: list[tuple[list[int], list[int]]] = []
    for ids in names:
        found.append((ids, list(range(first, first + len(ids)))))
        first += len(ids)
    return found


def _put(
    table: nn.Module, arguments: Any, values: Tensor, *, learned: Tensor, places: Tensor, moved: Tensor | None
) -> Tensor:
    """What the table gives, with learned vectors at their places."""
    chosen = learned[places.clamp_min(0)] if len(learned) else torch.zeros_like(values)
    chosen = chosen if moved is None else chosen + moved
    return torch.where((places >= 0)[..., None], chosen.to(values.dtype), values)
