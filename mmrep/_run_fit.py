"""What the encoders of a run learn from its training samples before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmrep.data.sample import Sample
from mmrep.data.source import Source
from mmrep.recipe import Recipe
from mmrep.training.collectives import world
from mmrep.training.engine import barrier

_SAMPLES = 100_000
_DONE = ".fitted"


@dataclass(frozen=True)
class RawValues:
    """The raw training values of some fields, for `Encoder.fit` and `Objective.fit`: read only if they ask."""

    source: Callable[[], Source]
    fields: tuple[str, ...]

    def __iter__(self) -> Iterator[Any]:
        for sample in islice(self.source().stream(), _SAMPLES):
            if isinstance(sample, Sample):
                yield from (sample.fields[name] for name in self.fields if sample.fields.get(name) is not None)


def fit_encoders(
    recipe: Recipe, source: Callable[[], Source], base: Path, *, skip: Collection[str] = ()
) -> dict[str, Path]:
    """Let every encoder learn what it needs (a tokenizer, statistics), once a run folder. Every process calls it.

    Args:
        recipe: its towers.
        source: the training samples; asked for only if an encoder reads them.
        base: what tower ``name`` learned is in ``base / name``.
        skip: towers that learned elsewhere.

    Returns:
        By tower, the folder of what it learned; those that learn nothing have none.
    """
    files: dict[str, Path] = {}
    for name, tower in recipe.model.towers.items():
        if name in skip:
            continue
        folder = base / name
        if world().rank == 0 and not (folder / _DONE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            fields = tuple(field for field, read_by in recipe.data.fields.items() if read_by == name)
            tower.encoder.cls.fit(tower.encoder.config, RawValues(source, fields), folder)
            if any(folder.iterdir()):
                (folder / _DONE).touch()
            else:
                folder.rmdir()
        barrier()
        if (folder / _DONE).is_file():
            files[name] = folder
    return files
