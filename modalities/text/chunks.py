"""A random part of a long text or program; two of them are positives of each other (DeCLUTR, arXiv:2006.03659).

In a recipe, two chunks of up to 40 lines of each program::

    views: {code: [{type: text-chunk, unit: lines, length: 40}, {type: text-chunk, unit: lines, length: 40}]}
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmrep.config import config
from mmrep.views.view import Params, View, uniform

_UNITS = {"words": re.compile(r"\S+"), "characters": re.compile(r"\S"), "lines": re.compile(r"[^\r\n]*\S[^\r\n]*")}


class TextChunk(View):
    """Read a chunk of a text, at a place that the seed chooses; a text that is not longer is read whole.

    A chunk begins with a word, a line with a word in it, or a character that is no blank, and what lies between is
    left as it is: the indentation of code, blank lines, line ends. Of several captions one is chosen first.
    """

    @config
    class Config:
        """length: how many units a chunk has. unit: words (between white space), characters that are no white space, or
        whole lines that are not blank. role: what the reading is for.
        """

        length: Annotated[int, Field(ge=1)] = 128
        unit: Literal["words", "characters", "lines"] = "words"
        role: Literal["global", "local", "context", "target", "corrupt"] = "global"

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.role = config.role

    def sample(self, decoded: str | list[str], seed: int) -> str:
        """A string, or one of a list, to a part of it."""
        text, start, stop = self._drawn(decoded, seed)
        return text[start:stop]

    def parameters(self, decoded: str | list[str], seed: int) -> Params:
        """``span`` float32 [2]: where the chunk begins and ends, as shares of the text's characters, in 0..1."""
        text, start, stop = self._drawn(decoded, seed)
        return {"span": torch.tensor([start, stop], dtype=torch.float32) / len(text)}

    def _drawn(self, decoded: str | list[str], seed: int) -> tuple[str, int, int]:
        u = uniform(torch.tensor([seed]), 2)[0].tolist()
        text = decoded if isinstance(decoded, str) else decoded[int(u[0] * len(decoded))]
        units = [match.span() for match in _UNITS[self.config.unit].finditer(text)]
        spare = len(units) - self.config.length
        if spare <= 0:
            return text, 0, len(text)
        first = int(u[1] * (spare + 1))
        return text, units[first][0], units[first + self.config.length - 1][1]
