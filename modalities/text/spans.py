"""Spans of one document that lie near each other: an anchor and its positives (DeCLUTR, arXiv:2006.03659, section 3.1).

In a recipe, an anchor and two positives of it::

    views:
      text:
        - &span {type: text-spans, shortest: 16, longest: 64}
        - {type: text-spans, shortest: 16, longest: 64, follows: 0, number: 1}
        - {type: text-spans, shortest: 16, longest: 64, follows: 0, number: 2}
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmrep.config import ConfigError, config
from mmrep.views.view import Params, View, uniform

_WORDS = re.compile(r"\S+")
_DRAWS = 5
_ANCHOR, _POSITIVE = 4, 2
"""Beta(4, 2) and Beta(2, 4) are the fourth and the second smallest of five uniform numbers."""


class TextSpan(View):
    """Some words of a text in a row: an anchor, or a span that overlaps, touches or lies within the anchor.

    Lengths are ``shortest + Beta * (longest - shortest)``, Beta(4, 2) of an anchor and Beta(2, 4) of a positive, which
    is mostly shorter. An anchor begins anywhere; a positive at most its own length in front of the anchor and at most
    where that ends. A text that is not longer than ``shortest`` is read whole. Of several captions the first is read.
    """

    @config
    class Config:
        """shortest, longest: words (between white space) of a span; a text's own words bound the latter.

        follows: the number of the reading of this field that is the anchor, whose ``shortest`` and ``longest`` must be
        the same; null = this is an anchor. number: which positive of it: each of another number is another span.
        """

        shortest: Annotated[int, Field(ge=1)] = 32
        longest: Annotated[int, Field(ge=1)] = 512
        follows: Annotated[int, Field(ge=0)] | None = None
        number: Annotated[int, Field(ge=1)] = 1
        role: Literal["global", "local", "context", "target", "corrupt"] = "global"

        def __post_init__(self) -> None:
            if self.longest < self.shortest:
                raise ConfigError([f"longest: {self.longest} words are fewer than the shortest, {self.shortest}"])

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.role, self.follows = config.role, config.follows

    def sample(self, decoded: str | list[str], seed: int) -> str:
        """A string, or the first of a list, to a part of it."""
        text, start, stop = self._drawn(decoded, seed)
        return text[start:stop]

    def parameters(self, decoded: str | list[str], seed: int) -> Params:
        """``span`` float32 [2]: where the span begins and ends, as shares of the text's characters, in 0..1."""
        text, start, stop = self._drawn(decoded, seed)
        return {"span": torch.tensor([start, stop], dtype=torch.float32) / len(text)}

    def _drawn(self, decoded: str | list[str], seed: int) -> tuple[str, int, int]:
        text = decoded if isinstance(decoded, str) else decoded[0]
        words = [match.span() for match in _WORDS.finditer(text)]
        if len(words) <= self.config.shortest:
            return text, 0, len(text)
        length, place = self._draw(seed, 0, len(words), _ANCHOR)
        first = int(place * (len(words) - length + 1))
        if self.follows is not None:
            end = first + length
            length, place = self._draw(seed, self.config.number, len(words), _POSITIVE)
            low, high = max(first - length, 0), min(end, len(words) - length)
            first = low + int(place * (high - low + 1))
        return text, words[first][0], words[first + length - 1][1]

    def _draw(self, seed: int, stream: int, words: int, which: int) -> tuple[int, float]:
        """A length in words, and where in 0..1 of what is allowed the span begins."""
        *u, place = uniform(torch.tensor([seed]), _DRAWS + 1, stream=stream)[0].tolist()
        spare = min(self.config.longest, words) - self.config.shortest
        return self.config.shortest + min(int(sorted(u)[which - 1] * (spare + 1)), spare), place
