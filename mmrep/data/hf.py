"""Hugging Face datasets: from the hub, from files that its builders read, saved folders, and objects in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from mmrep.config import ConfigError, config
from mmrep.data.files import read_url
from mmrep.data.sample import Quarantined, Sample
from mmrep.data.source import Source, SourceConfig, require_unique, unwrap_media
from mmrep.encoder import BadSampleError
from mmrep.registry import near


@config
class HFDatasetConfig(SourceConfig):
    """path: hub id, folder written by ``save_to_disk``, or a builder (``csv``, ``parquet``, …) with data_files.

    name: configuration of the dataset. split: which split. streaming: read without downloading first. revision: branch,
    tag or commit. data_files, data_dir: as in ``datasets.load_dataset``.
    """

    path: str
    name: str | None = None
    split: str = "train"
    streaming: bool = False
    revision: str | None = None
    data_files: str | list[str] | None = None
    data_dir: str | None = None


class HFDataset(Source):
    """A split of a ``datasets`` dataset, map-style or streaming. Code from the hub is never run.

    Pictures and sounds are taken undecoded, so that a broken one is a bad sample of ours and not an exception of
    theirs. Ids are row numbers (``shard:row`` in a stream) unless a column is named; in a stream nothing checks that
    the ids of a column are unique.
    """

    Config = HFDatasetConfig

    def __init__(self, config: HFDatasetConfig, dataset: Any = None) -> None:
        super().__init__(config)
        dataset = _load(config) if dataset is None else dataset
        import datasets

        if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
            hint = f"; choose one of its splits: {', '.join(dataset)}" if isinstance(dataset, dict) else ""
            raise ConfigError([f"expected a datasets.Dataset or IterableDataset, got {type(dataset).__name__}{hint}"])
        self.streaming = isinstance(dataset, datasets.IterableDataset)
        self._fingerprint = getattr(dataset, "_fingerprint", None)  # before the steps below change it
        if not self.streaming:
            dataset = dataset.with_format(None)
        features = dataset.features or {}
        for name, feature in features.items():
            if getattr(feature, "decode", False) is True:
                dataset = dataset.cast_column(name, dataclasses.replace(feature, decode=False))
        self._dataset: Any = dataset
        self.columns = tuple(features) or None
        self.require_special_columns()
        names = getattr(features.get(config.label), "names", None)  # of a ClassLabel
        self.class_names = None if names is None else list(names)
        if not self.streaming and not len(self._dataset):
            raise ConfigError([f"path: the split {config.split!r} of {config.path!r} is empty"])
        if config.id is not None and not self.streaming:
            require_unique(dataset[config.id], config.id)

    @classmethod
    def wrap(
        cls, dataset: Any, *, id: str | None = None, label: str | None = None, group: str | None = None
    ) -> HFDataset:
        """A source of a ``datasets.Dataset`` or ``IterableDataset`` that is already there; arguments name columns."""
        return cls(HFDatasetConfig(path="<in memory>", id=id, label=label, group=group), dataset)

    def __len__(self) -> int:
        return super().__len__() if self.streaming else len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        return super().__getitem__(index) if self.streaming else self._sample(self._dataset[int(index)], str(index))

    def stream(self, part: int = 0, parts: int = 1, seed: int | None = None) -> Iterator[Sample | Quarantined]:
        """See `Source.stream`. Whole shards go to a part if there are enough of them, else single rows."""
        if not self.streaming:
            yield from super().stream(part, parts, seed)
            return
        shards = self._dataset.num_shards
        order = list(range(shards))
        if seed is not None:
            import torch

            order = torch.randperm(shards, generator=torch.Generator().manual_seed(seed)).tolist()
        by_shard = shards >= parts
        number = count()
        for shard in order[part::parts] if by_shard else order:
            for row, values in enumerate(self._dataset.shard(shards, shard)):
                if not by_shard and next(number) % parts != part:
                    continue
                name = f"{shard}:{row}"
                try:
                    yield self._sample(values, name)
                except BadSampleError as error:
                    yield Quarantined(name, "", error.cause, str(error))

    def column(self, name: str) -> Sequence[Any]:
        """See `Source.column`."""
        if self.streaming:
            return super().column(name)
        self.require_columns([name], "column")
        return self._dataset[name][:]

    def fingerprint(self) -> str:
        """The fingerprint that ``datasets`` keeps, or what names a stream."""
        return f"hf-dataset:{self.config}:{self._fingerprint}"

    def _sample(self, row: dict[str, Any], default_id: str) -> Sample:
        return self.make_sample({name: _content(value) for name, value in row.items()}, default_id)


def _load(config: HFDatasetConfig) -> Any:
    import datasets

    folder = Path(config.path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():
            found: Any = datasets.load_from_disk(str(folder))
            if config.split not in found:
                hint = near(config.split, found) or "."
                raise ConfigError([f"split: {config.path!r} has no {config.split!r}{hint} It has: {', '.join(found)}"])
            found = found[config.split]
        elif (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
        else:
            return datasets.load_dataset(
                config.path, config.name, split=config.split, streaming=config.streaming, revision=config.revision,
                data_files=config.data_files, data_dir=config.data_dir,
            )  # fmt: skip
    except ConfigError:
        raise
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise ConfigError([f"hf-dataset {config.path!r}, split {config.split!r}: {error}"]) from error
    return found.to_iterable_dataset() if config.streaming else found


def _content(cell: Any) -> Any:
    """The content of a media cell; a stream only names its remote files (``hf://…``, ``zip://…::https://…``)."""
    is_media = isinstance(cell, dict) and cell.keys() == {"bytes", "path"}
    if not is_media or cell["bytes"] is not None or "://" not in str(cell["path"]):
        return unwrap_media(cell)
    return read_url(cell["path"])
