"""Long texts whole: any text encoder reads them window by window, and the windows' tokens are joined again.

In a recipe::

    encoder: {type: chunked-text, overlap: 32, encoder: {type: hf-text, path: intfloat/e5-small-v2}}
    pool: mean
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrep.config import Component, Of, config
from mmrep.encoder import BadSampleError
from mmrep.modalities.text._base import grid
from mmrep.modalities.text._examples import examples
from mmrep.modalities.text._prompts import shared_start
from mmrep.modalities.text._wrapped import WrappedText
from mmrep.tokens import Encoding, Grid, Inputs, Tokens
from mmrep.views import View


class ChunkedText(WrappedText):
    """A text encoder that loses nothing of a text past its ``max_length``.

    What does not fit is cut into windows that overlap, each between special tokens of its own and behind the prompt, if
    there is one; a window is read as a text is. Of the results each token of the text is kept once, from the window in
    which it stands farther from the edge, between the first window's begin and the last one's end: so every pool sees
    one long text, and a text that fits gives exactly what the inner encoder gives. ``pooled`` is the windows' mean,
    weighted by the tokens that are kept of each. Coordinates are places in the whole text.

    The inputs are W windows a sample: those of the inner encoder with one more axis, [B, W, L], and ``present`` bool
    [B, W] and ``counted`` bool [B, W, L], which tokens are kept.
    """

    @config
    class Config:
        """Fields of a ``chunked-text`` encoder.

        encoder: any text encoder. overlap: tokens that a window shares with the one before. max_windows: what lies
        beyond is lost, so that one book does not take the memory of a batch; None = no limit.
        """

        encoder: Annotated[Component, Of("encoders")]
        overlap: Annotated[int, Field(ge=0)] = 16
        max_windows: Annotated[int, Field(ge=1)] | None = 64

    def __init__(self, config: Config, files: Path | None = None) -> None:
        super().__init__(config, files, purpose="that can be read in windows")
        if config.overlap >= self.inner.room:
            raise ValueError(f"overlap={config.overlap}: a window has {self.inner.room} tokens of text; choose fewer")

    def examples(self, n: int, seed: int) -> list[str]:
        """As of all text encoders; the third is several windows long."""
        return examples(n, seed, 2 * self.inner.room)

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """A text to its windows, one after the other: the inner items' tensors [T], and ``lengths`` int64 [W].

        Raises:
            BadSampleError: as the inner encoder, and ``"prompt too long"``: it leaves no room for the text.
        """
        prompt, text = self.inner.reading(raw, view, seed)
        ids = self.inner.pieces(prompt + text)
        if len(ids) <= self.inner.room:
            item = self.inner.prepare(raw, view=view, seed=seed)
            return {**item, "counted": torch.ones_like(item["special"]), "lengths": torch.tensor([len(item["ids"])])}
        start = shared_start(self.inner.pieces(prompt), ids) if prompt else 0
        windows = self._windows(ids[:start], ids[start:])
        joined = {key: torch.cat([window[key] for window in windows]) for key in windows[0]}
        return {**joined, "lengths": torch.tensor([len(window["ids"]) for window in windows])}

    def _windows(self, prompt: list[int], text: list[int]) -> list[Inputs]:
        room = self.inner.room - len(prompt)
        if room <= self.config.overlap:
            raise BadSampleError("prompt too long", f"{len(prompt)} tokens, of the {self.inner.room} in a window")
        starts = list(range(0, len(text) - self.config.overlap, room - self.config.overlap))[: self.config.max_windows]
        ends = [min(start + room, len(text)) for start in starts]
        # The middle of each overlap: what is left of it counts in the earlier window, the rest in the later.
        seams = [0, *(start + (end - start) // 2 for end, start in zip(ends[:-1], starts[1:], strict=True)), ends[-1]]
        windows: list[Inputs] = []
        for start, end, (low, high) in zip(starts, ends, pairwise(seams), strict=True):
            ids, special = self.inner.framed(prompt + text[start:end])
            places = torch.arange(len(ids)) - len(self.inner.frame[0]) - len(prompt) + start
            first, last = not windows, end == ends[-1]
            counted = ((places >= low) | torch.tensor(first)) & ((places < high) | torch.tensor(last))
            window = {"ids": torch.tensor(ids), "special": torch.tensor(special, dtype=torch.bool), "counted": counted}
            if not self.inner.config.prompt_pooled:
                window["prompt"] = (places < start) & (places >= start - len(prompt))
            windows.append(window)
        return windows

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Pad to the most windows, and each as the inner encoder does: see the class."""
        lengths = [item["lengths"].tolist() for item in items]
        counts = torch.tensor([len(own) for own in lengths])
        present = torch.arange(max([1, *counts.tolist()])) < counts[:, None]
        parts: list[Inputs] = []
        for item, own in zip(items, lengths, strict=True):
            cut = {key: value.split(own) for key, value in item.items() if key != "lengths"}
            parts += [{key: windows[number] for key, windows in cut.items()} for number in range(len(own))]
        flat = self.inner.collate(parts)
        L = flat["ids"].shape[1]
        # Padding that the inner encoder takes for tokens (SigLIP) counts as it does there.
        padded = [F.pad(part["counted"], (0, L - len(part["counted"])), value=True) for part in parts]
        flat["counted"] = torch.stack(padded) if parts else torch.ones(0, L, dtype=torch.bool)
        batch = {key: value.new_zeros(*present.shape, *value.shape[1:]) for key, value in flat.items()}
        for key, value in flat.items():
            batch[key][present] = value
        return {**batch, "present": present}

    def tokenize(self, inputs: Inputs) -> Tokens:
        """Windows [B, W, L] to tokens [B, W * L, D], as the inner encoder makes them."""
        tokens = self.inner.tokenize(_flat(inputs))
        where = self._grid(inputs, tokens.grid)
        return Tokens(where.spread(tokens.values), where)

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Encode each window that is there, and join them; see the class."""
        self.check_request(keep, layers)
        where = tokens.grid
        assert isinstance(where, _Windows), "tokens of a chunked text come from its tokenize"
        return self._join(self.inner.encode(Tokens(where.gathered(tokens.values), where.inner), layers=layers), where)

    def forward(self, inputs: Inputs) -> Encoding:
        """As the inner encoder's own forward, window by window."""
        flat = _flat(inputs)
        return self._join(self.inner(flat), self._grid(inputs, grid(flat)))

    def _grid(self, inputs: Inputs, inner: Grid) -> _Windows:
        empty = torch.zeros_like(inputs["counted"])
        valid, special = empty.clone(), empty.clone()
        valid[inputs["present"]] = inner.valid
        special[inputs["present"]] = inner.special
        valid = (valid & inputs["counted"]).flatten(1)
        coords = (valid.long().cumsum(1) - 1).clamp_min(0).float()[..., None]
        return _Windows(coords, valid, special.flatten(1) & valid, inner=inner, present=inputs["present"])

    def _join(self, out: Encoding, where: _Windows) -> Encoding:
        final = self._final(where, out.tokens.grid)
        pooled = None
        if out.pooled is not None:
            weight = final.valid.unflatten(1, where.layout).sum(2) * where.present
            weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
            pooled = (where.spread(out.pooled) * weight.to(out.pooled.dtype)[..., None]).sum(1)
        values = where.spread(out.tokens.values)
        return Encoding(Tokens(values, final), pooled, tuple(where.spread(layer) for layer in out.layers))

    def _final(self, where: _Windows, inner: Grid) -> Grid:
        """The joined grid without what the inner encoder leaves out of its own (a prompt)."""
        valid = torch.zeros_like(where.valid).unflatten(1, where.layout)
        valid[where.present] = inner.valid
        return Grid(where.coords, where.valid & valid.flatten(1), where.special)


@dataclass(frozen=True)
class _Windows(Grid):
    """A joined grid that knows the windows it was joined from: S of them, in a batch of B samples of up to W.

    Attributes:
        inner: the grid of the windows, [S, L].
        present: bool [B, W].
    """

    inner: Grid = field(kw_only=True)
    present: Tensor = field(kw_only=True)

    @property
    def layout(self) -> tuple[int, int]:
        """W and L."""
        return self.present.shape[1], self.inner.valid.shape[1]

    def spread(self, values: Tensor) -> Tensor:
        """[S, L, D] to [B, W * L, D], or [S, D] to [B, W, D], zero where there is no window."""
        out = values.new_zeros(*self.present.shape, *values.shape[1:])
        return out.index_put((self.present,), values).flatten(1, -2)

    def gathered(self, values: Tensor) -> Tensor:
        """The inverse of `spread` of tokens."""
        return values.unflatten(1, self.layout)[self.present]


def _flat(inputs: Inputs) -> Inputs:
    """The windows that are there as a batch of the inner encoder."""
    return {key: value[inputs["present"]] for key, value in inputs.items() if key not in ("present", "counted")}
