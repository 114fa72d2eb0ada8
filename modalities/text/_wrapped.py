"""What text encoders share that stand around another one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mmrep.config import Component
from mmrep.encoder import Encoder
from mmrep.modalities.text._base import TextEncoder
from mmrep.tokens import Inputs
from mmrep.views import View


class WrappedText(Encoder):
    """A text encoder around the one that its config calls ``encoder``, which does whatever is not done differently.

    Args:
        config: with a field ``encoder``.
        files: what the encoder within learned or saved.
        purpose: what the encoder within must be good for, in words.

    Raises:
        ValueError: it is no text encoder.
    """

    modality = "text"
    # What it can hand on; an instance narrows it to what its encoder can.
    supports = frozenset({"tokens", "layers"})
    inner: TextEncoder

    def __init__(self, config: Any, files: Path | None = None, *, purpose: str) -> None:
        super().__init__(config, files)
        inner = config.encoder.build(files=files)
        if not isinstance(inner, TextEncoder):
            raise ValueError(f"encoder: {config.encoder.type!r} is no text encoder {purpose}")
        self.inner = inner
        self.width, self.pooled_width, self.depth = inner.width, inner.pooled_width, inner.depth
        self.supports = inner.supports & {"tokens", "layers"}

    @classmethod
    def wrapped(cls, config: Any) -> Component:
        """See `Encoder.within`."""
        return config.encoder

    @classmethod
    def fit(cls, config: Any, samples: Iterable[Any], folder: Path) -> None:
        """Let the encoder within learn what it needs."""
        config.encoder.cls.fit(config.encoder.config, samples, folder)

    def save_files(self, folder: Path) -> None:
        """Write the files of the encoder within."""
        self.inner.save_files(folder)

    def no_weight_decay(self) -> set[str]:
        """Those of the encoder within."""
        return {f"inner.{name}" for name in self.inner.no_weight_decay()}

    def layer_modules(self) -> list[nn.Module]:
        """Those of the encoder within."""
        return self.inner.layer_modules()

    def preview(self, raw: Any) -> str:
        """As the encoder within."""
        return self.inner.preview(raw)

    def prompted(self, raw: Any, name: str | Sequence[str] | None, prompt: str | None) -> Any:
        """As the encoder within."""
        return self.inner.prompted(raw, name, prompt)

    def examples(self, n: int, seed: int) -> list[str]:
        """Those of the encoder within."""
        return self.inner.examples(n, seed)

    def oddities(self, seed: int) -> dict[str, Any]:
        """Those of the encoder within."""
        return self.inner.oddities(seed)

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """As the encoder within."""
        return self.inner.prepare(raw, view=view, seed=seed)

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """As the encoder within."""
        return self.inner.collate(items)

    def length(self, item: Inputs) -> int:
        """The number of tokens."""
        return len(item["ids"])
