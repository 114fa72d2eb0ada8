"""Bind a new modality to an existing space: ``mmrep bind MODEL --add … --data … --through …``.

The towers of the model are frozen whole and keep their embeddings to the last bit; only the new tower trains, towards
the embeddings of the modality that it is bound *through* (ImageBind, arXiv:2305.05665; LanguageBind, arXiv:2310.01852).
Everything that the old modalities are aligned with is then aligned with the new one, though they never met in the data.
As the old towers do not change, their features are computed once and kept, in memory and on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmrep._recipe_files import recipe_names, resolve
from mmrep.config import ConfigError, component
from mmrep.data.table import SUFFIXES
from mmrep.hub.start import saved_config
from mmrep.registry import encoders, near

BATCH, EPOCHS = 128, 30
HELD_OUT = 0.1
"""Share of the data that is held out where the data has no split of its own."""


def bind_recipe(
    model: str, *, add: str, data: str, through: Sequence[str], encoder: str | None = None, features: str | None = None
) -> dict[str, Any]:
    """The recipe that binds, as plain data, for ``mmrep.recipe`` to validate.

    Args:
        model: saved model (folder, run folder or hub id).
        add: the new modality, as ``modality`` or ``column=modality``; a tower of that name is added.
        data: pairs of the new modality and of what it is bound through: a table file; a YAML file of a source
            (``type: …``) or of a data section (``train: …``); or a recipe, whose data section is taken.
        through: towers of the model, each as ``tower`` or ``column=tower``.
        encoder: registered encoder of the new tower; None = the first of that modality that builds by its defaults.
        features: folder for the features of the old towers.

    Raises:
        ConfigError: no such tower, modality, column or file; a tower of the new name exists.
    """
    saved = saved_config(model)
    towers: dict[str, Any] = saved["towers"]
    column, modality = _named(add)
    if modality in towers:
        raise ConfigError([f"--add: {model!r} has a tower {modality!r} already; towers: {', '.join(towers)}"])
    pairs = [_named(name) for name in through]
    for _, tower in pairs:
        if tower not in towers:
            raise ConfigError(
                [f"--through: no tower {tower!r}{near(tower, towers)} {model!r} has: {', '.join(towers)}"]
            )
    section, known = _data(data)
    column = _column(column, modality, known, "--add")
    pairs = [(_column(name, tower, known, "--through"), tower) for name, tower in pairs]
    fields = {column: modality, **dict(pairs)}
    temperatures = {f"{column}-{name}": {} for name, _ in pairs}
    views = {name: value for name, value in section.get("views", {}).items() if name in fields}
    held_out = list(section.get("evaluation", {}))
    return {
        "about": f"{modality} bound to {model} through {', '.join(tower for _, tower in pairs)}.",
        "start": model,
        "data": {**section, "fields": fields, "views": views, "cache": True, "features": features},
        "model": {
            "towers": {
                **{name: {"frozen": "tower"} for name in towers},
                modality: {"encoder": {"type": encoder or default_encoder(modality)}},
            },
            # Its own: the temperatures of the model belong to the pairs that it was trained on.
            "temperatures": temperatures,
        },
        "objectives": [
            {
                "type": "contrastive",
                "pairs": [{"between": [column, name], "temperature": f"{column}-{name}"} for name, _ in pairs],
            }
        ],
        "train": {"epochs": EPOCHS, "batch_size": _batch_size(section["train"]), "workers": 0},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
        "evaluations": {
            f"{source} {name}": {"type": "retrieval", "data": source, "between": [name, column]}
            for source in held_out
            for name, _ in pairs
        },
    }


def default_encoder(modality: str) -> str:
    """The first registered encoder of a modality that can be built by its defaults.

    Raises:
        ConfigError: no encoder reads this modality, or none has defaults.
    """
    found = encoders.load_all()
    modalities = sorted({str(getattr(cls, "modality", "")) for cls in found.values()})
    if modality not in modalities:
        hint = near(modality, modalities)
        raise ConfigError([f"--add: no encoder reads {modality!r}{hint} Modalities: {', '.join(modalities)}"])
    able: list[str] = []
    for name, cls in found.items():
        if getattr(cls, "modality", None) == modality:
            try:
                cls.Config()
            except TypeError:  # a field without a default: a path, an inner encoder
                continue
            able.append(name)
    if not able:
        raise ConfigError([f"--encoder: say which: every {modality} encoder needs settings that have no default"])
    return able[0]


def _batch_size(train: Mapping[str, Any]) -> int:
    """`BATCH`, or half of the data where that is less."""
    source = component("sources", **{**train, "type": str(train["type"])}).build()
    return BATCH if source.streaming else max(2, min(BATCH, len(source) // 2))


def _named(text: str) -> tuple[str | None, str]:
    """``column=tower`` or ``tower``."""
    column, equals, tower = text.partition("=")
    return (column, tower) if equals else (None, text)


def _column(column: str | None, tower: str, known: Mapping[str, str | None], option: str) -> str:
    """The column that a tower reads: the one named, the one that the data says, or the one of its name."""
    if column is not None and known and column not in known:
        raise ConfigError(
            [f"{option}: the data has no column {column!r}{near(column, known)} It has: {', '.join(known)}"]
        )
    if column is not None or tower in known or not known:
        return column or tower
    same = [name for name, read_by in known.items() if read_by == tower]
    if len(same) == 1:
        return same[0]
    raise ConfigError(
        [f"{option}: which column is {tower!r}? Write {option} COLUMN={tower}. The data has: {', '.join(known)}"]
    )


def _data(data: str) -> tuple[dict[str, Any], dict[str, str | None]]:
    """A data section, and its columns with the towers that read them, as far as it says."""
    path = Path(data)
    if path.suffix.lower() in SUFFIXES:
        if not path.is_file():
            raise ConfigError([f"--data: there is no file {data!r}"])
        return _split({"type": "table", "files": data, "paths": _paths(path)})
    if path.suffix in (".yaml", ".yml") and path.is_file():
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "type" in content:
            return _split(content)
        if isinstance(content, dict) and "train" in content and "objectives" not in content:
            return content, dict(content.get("fields", {}))
    elif data not in recipe_names() and not (path / "config.yaml").is_file():
        kinds = f"a table ({', '.join(SUFFIXES)}), a YAML file, or a recipe"
        raise ConfigError([f"--data: {data!r} is no file and no recipe{near(data, recipe_names())}; give {kinds}"])
    section = resolve(data).get("data", {})
    return section, dict(section.get("fields", {}))


def _split(source: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """A data section of one source: a share of it is held out."""
    columns = component("sources", **{**source, "type": str(source["type"])}).build().columns
    part = {"type": "part", "source": source, "share": HELD_OUT}
    section = {"train": {**part, "keep": "rest"}, "evaluation": {"held_out": {**part, "keep": "held-out"}}}
    return section, dict.fromkeys(columns or ())


def _paths(table: Path) -> list[str]:
    """The columns of a table whose values are names of files beside it, by its first rows."""
    source = component("sources", "table", files=str(table)).build()
    rows = [source[i].fields for i in range(min(len(source), 20))]
    return [
        column for column in source.columns or ()
        if any(isinstance(row.get(column), str) and (table.parent / row[column]).is_file() for row in rows)
    ]  # fmt: skip
