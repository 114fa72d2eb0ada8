"""A text of which words are left out: what a denoising autoencoder of sentences reads (TSDAE, arXiv:2104.06979).

In a recipe, the damaged text and the whole one beside it::

    views: {name: [{type: text-delete, ratio: 0.6}, {type: text-choice}]}
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmrep.config import config
from mmrep.views.view import View, uniform

_WORDS = re.compile(r"\S+")


class TextDelete(View):
    """Every word (between white space) is deleted with one probability; of a text that loses all, one word stays.

    What stays keeps its order, with one blank between words. Of several captions the first is read, so that another
    view can read the same one whole.
    """

    @config
    class Config:
        """ratio: probability of deleting a word; 0.6 works best in TSDAE (section 4). role: what the reading is for."""

        ratio: Annotated[float, Field(ge=0, lt=1)] = 0.6
        role: Literal["global", "local", "context", "target", "corrupt"] = "corrupt"

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.role = config.role

    def sample(self, decoded: str | list[str], seed: int) -> str:
        """A string, or the first of a list, to what is left of it."""
        text = decoded if isinstance(decoded, str) else decoded[0]
        words = _WORDS.findall(text)
        saved, *u = uniform(torch.tensor([seed]), len(words) + 1)[0].tolist()
        kept = [word for word, point in zip(words, u, strict=True) if point >= self.config.ratio]
        return " ".join(kept or words[int(saved * len(words)) :][:1])
