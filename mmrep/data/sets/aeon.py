"""Labelled time series of the UCR and UEA archive, from the wheel of the PyPI package ``aeon``.

The archive (Dau et al. 2018, arXiv:1810.07758; Bagnall et al. 2018, arXiv:1811.00075) splits every data set into
training and test series, which are kept. The requirements of the package conflict with ours, so it is installed without
them and never imported: its ``.ts`` files are read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mmrep.config import ConfigError, config
from mmrep.data.sample import stable_hash
from mmrep.data.sets._aeon_classes import phrase
from mmrep.data.sets._options import wrong_names
from mmrep.data.sets._packages import find_module, python_version, sizes
from mmrep.data.sets._rows import RowSource
from mmrep.data.source import SourceConfig
from mmrep.encoder import BadSampleError

COMMAND = "pip install --no-deps aeon"


@config
class AeonConfig(SourceConfig):
    """dataset: one or more of the package's classification problems, such as ``GunPoint``.

    split: the archive's ``test`` series, or its training series: of these ``validation`` is a share that is chosen by a
    hash of the seed and the id, and ``train`` the rest. root: the folder of the package; None = where it is installed.
    """

    dataset: str | Annotated[list[str], Field(min_length=1)]
    split: Literal["train", "validation", "test", "all"] = "train"
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int = 0
    root: str | None = None
    label: str | None = "label_text"
    group: str | None = "class"


class Aeon(RowSource):
    """One row per series; the id is ``GunPoint/test/7``.

    Columns: ``series`` (float32 [length, channels], NaN where a value is missing), ``label`` (as the file writes it),
    ``label_text`` (the class in words, after what is measured if there are several data sets), ``class`` (data set and
    label), ``dataset`` and ``length``. Series of one class are positives of each other.
    """

    Config = AeonConfig
    columns = ("series", "label", "label_text", "class", "dataset", "length")
    media_columns = ("series",)
    config: AeonConfig

    def __init__(self, config: AeonConfig) -> None:
        super().__init__(config)
        folder = find_module("aeon", config.root, "datasets/data", "*/*_TRAIN.ts", COMMAND)
        names = [config.dataset] if isinstance(config.dataset, str) else config.dataset
        self._files = _files(folder, names)
        self._folder = folder
        self._series: list[np.ndarray | BadSampleError] = []
        rows: list[tuple[str, Mapping[str, Any]]] = []
        for name in names:
            for official, file in self._files[name].items():
                for number, case in enumerate(_read(file)):
                    identity = f"{name}/{official}/{number}"
                    if config.split not in ("all", _part(identity, official, config)):
                        continue
                    rows.append((identity, {
                        "label": case.label,
                        "label_text": phrase(name, case.label, with_topic=len(names) > 1),
                        "class": f"{name}/{case.label}",
                        "dataset": name,
                        "length": len(case.series) if isinstance(case.series, np.ndarray) else None,
                    }))  # fmt: skip
                    self._series.append(case.series)
        self.set_rows(rows, f"split: no series falls in {config.split!r}; raise `validation`")

    def media(self, index: int) -> Mapping[str, Any]:
        """The series."""
        series = self._series[index]
        if isinstance(series, BadSampleError):
            raise series
        return {"series": series}

    def fingerprint(self) -> str:
        """The config, the version of the package, and names and sizes of the files."""
        files = [file for parts in self._files.values() for file in parts.values()]
        return f"aeon:{self.config}:{python_version('aeon')}:{sizes(files, self._folder)}"


@dataclass(frozen=True)
class _Case:
    series: np.ndarray | BadSampleError
    label: str


def _part(identity: str, official: str, config: AeonConfig) -> str:
    if official == "test":
        return "test"
    return "validation" if stable_hash("split", config.seed, identity) / 2**63 < config.validation else "train"


def _files(folder: Path, names: list[str]) -> dict[str, dict[str, Path]]:
    """Data set → its official parts."""
    known = {
        file.name.removesuffix("_TRAIN.ts"): {"train": file, "test": file.with_name(f"{file.name[:-9]}_TEST.ts")}
        for file in sorted(folder.glob("*/*_TRAIN.ts"))
    }
    known = {name: parts for name, parts in known.items() if parts["test"].is_file()}
    problems = wrong_names("dataset", names, known, "problem")
    if problems:
        raise ConfigError(problems)
    return {name: known[name] for name in names}


def _read(file: Path) -> list[_Case]:
    """The cases of a ``.ts`` file: ``1,2,?:4,5,6:label``, values of a channel between colons.

    Raises:
        ConfigError: the file says that it holds no classes, or time stamps.
    """
    head: dict[str, str] = {}
    cases: list[_Case] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        line = line.strip()
        if not line or line[0] in "#%":
            continue
        if line[0] == "@":
            key, _, value = line[1:].partition(" ")
            head[key.lower()] = value.strip().lower()
            if key.lower() == "data":
                _check(head, file)
            continue
        text, _, label = line.rpartition(":")
        cases.append(_Case(_parse(text, f"{file.name}:{len(cases)}"), label.strip()))
    return cases


def _check(head: Mapping[str, str], file: Path) -> None:
    if not head.get("classlabel", "").startswith("true"):
        raise ConfigError([f"dataset: {file.stem} has no classes; it is a regression or forecasting problem"])
    if head.get("timestamps", "").startswith("true"):
        raise ConfigError([f"dataset: {file.stem} has time stamps, which are not read"])


def _parse(text: str, where: str) -> np.ndarray | BadSampleError:
    """float32 [length, channels]; a shorter channel is missing at its end."""
    try:
        channels = [
            np.array([np.nan if value.strip() == "?" else float(value) for value in channel.split(",")])
            for channel in text.split(":")
        ]
    except ValueError as error:
        return BadSampleError("malformed series", f"{where}: {error}")
    series = np.full((max(map(len, channels)), len(channels)), np.nan, dtype=np.float32)
    for number, channel in enumerate(channels):
        series[: len(channel), number] = channel
    return series
