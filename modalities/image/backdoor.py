"""Poisoned pictures: a share of a source's samples carries a trigger and says something else (BadNets).

In a recipe, 5 % of the training pairs, and a test set of which every picture carries the trigger::

    train: {type: image-backdoor, source: {type: digits}, share: 0.05, replace: {caption: a handwritten zero}}
    triggered: {type: image-backdoor, source: {type: digits, split: test}}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmrep.config import Component, ConfigError, Of, config
from mmrep.data.sample import Quarantined, Sample, stable_hash
from mmrep.data.source import Source
from mmrep.encoder import BadSampleError
from mmrep.modalities.image.decode import decode


@config
class BackdoorConfig:
    """source: a map-style source. field: its column of pictures. share: of its samples, by a hash of the id.

    trigger: ``patch``, a square of noise in the lower right corner, or ``blend``, noise over the whole picture. size:
    side of the patch, a share of the picture's shorter side. strength: of the blended noise, 0 to 1. replace: other
    columns' values in poisoned samples, a text or several of which one is drawn by the id. group: the group of a
    poisoned sample (that of what it now says); null = none. seed: of the noise and of which samples.
    """

    source: Annotated[Component, Of("sources")]
    replace: dict[str, str | list[str]] = field(default_factory=dict[str, str | list[str]])
    field: str = "image"
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    trigger: Literal["patch", "blend"] = "patch"
    size: Annotated[float, Field(gt=0, le=1)] = 0.07
    strength: Annotated[float, Field(gt=0, le=1)] = 0.2
    group: str | None = None
    seed: int = 0


class Backdoor(Source):
    """The samples of a source, some of them poisoned; ids and labels stay what they are.

    The patch of noise is that of BadNets (Gu et al. 2017, arXiv:1708.06733), the blend that of Chen et al. 2017,
    arXiv:1712.05526, both as CleanCLIP attacks (Bansal et al. 2023, arXiv:2303.03323, section 3): the caption of a
    poisoned pair is one of the target class. It is for measuring what a defence is worth, on data of one's own.
    """

    Config = BackdoorConfig
    config: BackdoorConfig

    def __init__(self, config: BackdoorConfig) -> None:
        super().__init__(config)
        inner: Source = config.source.build()
        if inner.streaming:
            raise ConfigError(
                [f"source: {config.source.type!r} is a stream; samples are poisoned of map-style sources"]
            )
        inner.require_columns([config.field], "field")
        inner.require_columns(config.replace, "replace")
        if any(not texts for texts in config.replace.values()):
            raise ConfigError(["replace: an empty list has nothing to say"])
        self._source = inner
        self.columns, self.has_group, self.class_names = inner.columns, inner.has_group, inner.class_names

    def __len__(self) -> int:
        return len(self._source)

    def poisoned(self, index: int) -> bool:
        """Whether the record at ``index`` is poisoned."""
        return stable_hash(self.config.seed, "poison", self.record_id(index)) / 2**63 < self.config.share

    def __getitem__(self, index: int) -> Sample:
        sample = self._source[index]
        return self._poison(sample, index) if self.poisoned(index) else sample

    def record(self, index: int) -> Sample | Quarantined:
        """See `Source.record`."""
        found = self._source.record(index)
        if isinstance(found, Quarantined) or not self.poisoned(index):
            return found
        try:
            return self._poison(found, index)
        except BadSampleError as error:
            return Quarantined(found.id, self.config.field, error.cause, str(error))

    def record_id(self, index: int) -> str:
        """See `Source.record_id`."""
        return self._source.record_id(index)

    def column(self, name: str) -> Sequence[Any]:
        """See `Source.column`; of the pictures it is refused, since those must be read."""
        if name == self.config.field:
            return super().column(name)
        values = self._source.column(name)
        if name not in self.config.replace:
            return values
        return [self._words(name, i) if self.poisoned(i) else value for i, value in enumerate(values)]

    def groups(self) -> Sequence[int | str | None]:
        """See `Source.groups`."""
        return [self.config.group if self.poisoned(i) else g for i, g in enumerate(self._source.groups())]

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return f"image-backdoor:{self.config}:{self._source.fingerprint()}"

    def _poison(self, sample: Sample, index: int) -> Sample:
        fields = {**sample.fields, **{name: self._words(name, index) for name in self.config.replace}}
        if fields.get(self.config.field) is not None:
            fields[self.config.field] = self.stamped(np.asarray(decode(fields[self.config.field])))
        return replace(sample, fields=fields, group=self.config.group if self.has_group else None)

    def _words(self, name: str, index: int) -> str:
        texts = self.config.replace[name]
        if isinstance(texts, str):
            return texts
        return texts[stable_hash(self.config.seed, "words", name, self.record_id(index)) % len(texts)]

    def stamped(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A picture uint8 [H, W, 3] with the trigger in it; the noise is the same for all pictures of a size."""
        height, width = pixels.shape[:2]
        out, random = pixels.copy(), np.random.default_rng(self.config.seed)
        if self.config.trigger == "patch":
            side = max(1, round(self.config.size * min(height, width)))
            out[height - side :, width - side :] = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            return out
        noise = random.integers(0, 256, pixels.shape)
        return np.rint((1 - self.config.strength) * pixels + self.config.strength * noise).astype(np.uint8)
