"""Easy edits of a text: words left out, doubled and swapped (EDA, Wei and Zou 2019, arXiv:1901.11196).

In a recipe, a text and an edited reading of it::

    views: {caption: [{type: text-choice}, {type: text-edit, delete: 0.1, swap: 0.1}]}
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from mmrep.config import config
from mmrep.views.view import View, uniform

Share = Annotated[float, Field(ge=0, le=1)]


class TextEdit(View):
    """Swap words, put words in twice and leave words out, as many as a share of the text's; one word always stays.

    Of several captions one is chosen first: names of the same thing are what EDA's synonyms are for. Words are what
    stands between white space, and are put together with single blanks. In EDA, what is put in is a synonym of one of
    the words; here, without a thesaurus, it is the word itself.
    """

    @config
    class Config:
        """swap, insert: how many swaps of two words, and how many words put in again anywhere, for each word of the
        text (a share of one word is a probability). delete: probability of leaving a word out.
        """

        swap: Share = 0.1
        insert: Share = 0.1
        delete: Share = 0.1

    config: Config

    def sample(self, decoded: str | list[str], seed: int) -> str:
        """A string, or one of a list, to an edited string; texts of one word stay as they are, but for insertion."""
        if not isinstance(decoded, str):
            decoded = decoded[int(self._draw(seed, 1, 0)[0] * len(decoded))]
        words = decoded.split()
        if not words:
            return decoded
        n = len(words)
        swaps, insertions = (
            self._count(seed, share * n, i) for i, share in ((1, self.config.swap), (2, self.config.insert))
        )
        for first, second in zip(*(iter(self._draw(seed, 2 * swaps, 3)),) * 2, strict=True):
            a, b = int(first * n), int(second * n)
            words[a], words[b] = words[b], words[a]
        for which, where in zip(*(iter(self._draw(seed, 2 * insertions, 4)),) * 2, strict=True):
            words.insert(int(where * (len(words) + 1)), words[int(which * len(words))])
        kept = [w for w, p in zip(words, self._draw(seed, len(words), 5), strict=True) if p >= self.config.delete]
        return " ".join(kept or [words[int(self._draw(seed, 1, 6)[0] * len(words))]])

    def _count(self, seed: int, wanted: float, stream: int) -> int:
        """``wanted`` on average: its whole part, and one more with the rest as probability."""
        return int(wanted) + int(self._draw(seed, 1, 10 + stream)[0] < wanted % 1)

    @staticmethod
    def _draw(seed: int, n: int, stream: int) -> list[float]:
        return uniform(torch.tensor([seed]), n, stream)[0].tolist() if n else []
