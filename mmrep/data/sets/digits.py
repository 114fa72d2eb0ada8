"""Handwritten digits, 1,797 pictures of 8 x 8 pixels, which come with scikit-learn.

(Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", the test part; CC-BY 4.0.) Small enough for
unlabelled pretraining in seconds, which is what it is here for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrep.config import config
from mmrep.data.sets._packages import python_version
from mmrep.data.sets._rows import RowSource
from mmrep.data.sets._split import SplitConfig, part_of

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("the digit {}", "a handwritten {}", "the number {} in ink", "someone wrote a {} here", "{}")


@config
class DigitsConfig(SplitConfig):
    """See `SplitConfig`; pictures are split one by one, since the data does not say who wrote them."""

    label: str | None = "digit"


class Digits(RowSource):
    """One row per picture; the id is its number.

    Columns: ``image`` (uint8 [8, 8], 0 is paper), ``digit`` (0 to 9), ``name`` (its English word) and ``caption`` (some
    ways to say what is seen, of which a view may choose).
    """

    Config = DigitsConfig
    columns = ("image", "digit", "name", "caption")
    media_columns = ("image",)
    config: DigitsConfig

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__(config)
        from sklearn.datasets import load_digits

        pixels, digits = load_digits(return_X_y=True)
        self._pictures = np.rint(np.asarray(pixels).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        words = {i: {"digit": i, "name": word, "caption": [text.format(word) for text in CAPTIONS]}
                 for i, word in enumerate(NAMES)}  # fmt: skip
        rows = [(str(i), words[int(digit)]) for i, digit in enumerate(digits)]
        self.set_rows(
            [row for row in rows if config.split in ("all", part_of(row[0], config))],
            f"split: no picture falls in {config.split!r}",
        )

    def media(self, index: int) -> Mapping[str, Any]:
        """The picture."""
        return {"image": self._pictures[int(self._ids[index])]}

    def fingerprint(self) -> str:
        """The config and the version of scikit-learn."""
        return f"digits:{self.config}:{python_version('scikit-learn')}"
