"""Raw values as a page shows them: a small picture as a data URI, or one line of clean text."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mmrep.report.data import PairSet

if TYPE_CHECKING:
    from PIL.Image import Image

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Text on one line, without the characters that HTML and UTF-8 cannot hold (controls, lone surrogates)."""
    return " ".join(_CONTROL.sub("\ufffd", text).split())


def clean_lines(text: str) -> str:
    """As `clean`, but lines, indentation and spaces stay."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


def shorten(text: str, length: int) -> str:
    """At most ``length`` characters, with an ellipsis for the rest."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def thumbnail(picture: Image, size: int = 64, colors: int = 128) -> str:
    """A picture of any mode as the ``data:`` URI of a palette PNG of at most ``size`` x ``size`` pixels.

    A palette of 128 colours cannot be told from the original at this size and takes a third of the bytes.
    """
    from PIL.Image import Quantize, Resampling

    small = _eight_bit(picture)
    small.thumbnail((size, size), Resampling.LANCZOS)
    small = small.quantize(colors, method=Quantize.FASTOCTREE)  # the only method of Pillow's that keeps transparency
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _eight_bit(picture: Image) -> Image:
    """RGB or RGBA; modes of more than 8 bits are stretched over their range, since a plain conversion clips them."""
    from PIL import Image

    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        low, high = values.min(), values.max()
        return Image.fromarray(np.uint8(255 * (values - low) / ((high - low) or 1))).convert("RGB")
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


@dataclass(frozen=True)
class Shown:
    """One raw value as shown.

    Attributes:
        text: a line of text; of a picture, what it is a picture of.
        picture: a ``data:`` URI, or empty.
    """

    text: str
    picture: str = ""


class Viewer:
    """Shows the values of a set, each made once.

    Args:
        pairs: the set.
    """

    def __init__(self, pairs: PairSet) -> None:
        self.pairs = pairs
        self._previews: dict[tuple[int, str], Any] = {}

    @cached_property
    def pictured(self) -> frozenset[str]:
        """The fields whose values are pictures, judged by the first sample that has both."""
        first = int(self.pairs.paired()[0])
        return frozenset(name for name in self.pairs.fields if not isinstance(self._preview(first, name), str))

    def text(self, index: int, field: str) -> str:
        """A line of text for a value; for a picture, the text of the other field, or else the sample's id."""
        preview = self._preview(index, field)
        if isinstance(preview, str):
            return clean(preview)
        encoded = self.pairs.encoded
        for other in self.pairs.fields:
            if other != field and encoded.present[other][index]:
                caption = self._preview(index, other)
                if isinstance(caption, str):
                    return clean(caption)
        return clean(f"{field} of {encoded.samples[index].id}")

    def show(self, index: int, field: str, size: int = 64) -> Shown:
        """A value with its picture, if it is one."""
        preview = self._preview(index, field)
        picture = "" if isinstance(preview, str) else thumbnail(preview, size)
        return Shown(self.text(index, field), picture)

    def _preview(self, index: int, field: str) -> Image | str:
        key = (index, field)
        if key not in self._previews:
            try:
                self._previews[key] = self.pairs.preview(field, self.pairs.encoded.raw(index, field))
            except (OSError, ValueError) as error:  # a file that moved since; the page says so in its place
                self._previews[key] = f"(cannot be shown: {error})"
        return self._previews[key]
