"""Views of text: which of several captions is read."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from mmrep.config import config
from mmrep.views.view import View, uniform


class TextChoice(View):
    """Read one of several captions of a sample, chosen by the seed. A single caption is read as it is."""

    @config
    class Config:
        """first: probability of reading the first caption; the rest is shared equally by the others.

        None = all captions are equally probable.
        """

        first: Annotated[float, Field(ge=0, le=1)] | None = None

    config: Config

    def sample(self, decoded: str | list[str], seed: int) -> str:
        """A string, or the non-blank strings of a list, to one string."""
        if isinstance(decoded, str):
            return decoded
        n = len(decoded)
        point = float(uniform(torch.tensor([seed]), 1)[0, 0])
        first = self.config.first
        if first is None:
            return decoded[int(point * n)]
        if point < first or n == 1:
            return decoded[0]
        return decoded[1 + min(int((point - first) / (1 - first) * (n - 1)), n - 2)]
