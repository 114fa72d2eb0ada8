"""The files of a run folder: whose it is, and its final model."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmrep._swap import replace_folder
from mmrep.config import ConfigError, dump
from mmrep.model import Model
from mmrep.recipe import Recipe, read_recipe, recipe_json, write_recipe
from mmrep.training.errors import CheckpointError


def claim(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Make the folder this recipe's, or refuse: a run is never mixed with another's files.

    Raises:
        ConfigError: it holds another recipe's run, this one's and ``resume`` is False, or something else.
    """
    config = folder / "config.yaml"
    if config.is_file():
        if not resume:
            raise ConfigError([f"{folder} holds a run already: add --resume to go on, or choose another --out"])
        before = read_recipe(str(config))
        if recipe_json(before) != recipe_json(recipe):
            raise ConfigError([f"{config} differs from the recipe given: {', '.join(_differences(before, recipe))}"])
        return
    draft = config.with_name(".config.yaml-new")
    if folder.exists() and any(entry != draft for entry in folder.iterdir()):
        raise ConfigError([f"{folder} is not empty and holds no run; choose another --out"])
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, draft)
    draft.replace(config)  # a run killed in between can be started again


def save_model(model: Model, folder: Path, card: Mapping[str, str]) -> None:
    """Write the model beside its final place and put it there, so that a kill leaves the old or the new one.

    Raises:
        CheckpointError: it could not be written.
    """
    fresh = folder / ".model-new"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        model.save_pretrained(fresh, model_card_kwargs=dict(card))
        replace_folder(fresh, folder / "model")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise CheckpointError(
            f"could not save the model in {folder}: {error}; the checkpoints stand: make room, and --resume "
            "evaluates and saves it"
        ) from error


def scratch_folder() -> Path:
    """A folder for a dry run, which must not write into the run folder; removed at exit."""
    folder = tempfile.mkdtemp(prefix="mmrep-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _differences(a: Recipe, b: Recipe) -> list[str]:
    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            return {
                k: v for key, part in value.items() for k, v in flat(part, f"{path}.{key}" if path else key).items()
            }
        return {path: value}

    left, right = flat(dump(a)), flat(dump(b))
    return [
        f"{k}: {left.get(k)!r} there, {right.get(k)!r} here"
        for k in sorted({*left, *right})
        if left.get(k) != right.get(k)
    ][:8]
