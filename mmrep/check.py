"""What ``mmrep check`` does: contract checks of an encoder, verification of a saved model, validation of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmrep._recipe_files import recipe_names
from mmrep.config import ConfigError
from mmrep.registry import encoders, near


def check(what: str) -> Iterator[str]:
    """Check the encoder, saved model, or recipe called ``what``; yields one line for each thing that holds.

    Raises:
        ConfigError: nothing is called that, or the recipe is wrong.
        ModelFolderError: the saved model cannot be used.
        AssertionError: the encoder breaks its contract; the message says how.
    """
    if what in encoders:
        yield from _encoder(what)
    elif (Path(what) / "config.json").is_file():
        yield from _model(what)
    elif what in recipe_names() or Path(what).suffix in {".yaml", ".yml"} or (Path(what) / "config.yaml").is_file():
        yield from _recipe(what)
    else:
        known = [*encoders.names(), *recipe_names()]
        raise ConfigError([f"{what!r} is no encoder, recipe, recipe file or saved model{near(what, known)}"])


def _encoder(name: str) -> Iterator[str]:
    from mmrep.testing import check_encoder

    cls = encoders.get(name)
    check_encoder(cls(cls.Config()))
    yield f"encoder {name}: keeps the contract ({cls.__module__}.{cls.__qualname__})"


def _model(folder: str) -> Iterator[str]:
    from mmrep.hub.folder import load
    from mmrep.model import parameter_counts

    model = load(folder)
    yield f"model {folder}: config, weights and fingerprint belong together"
    for name, (total, _) in parameter_counts(model).items():
        yield f"tower {name}: {total:,} parameters, {model.tower(name).modality} → {model.dim} dimensions"


def _recipe(name: str) -> Iterator[str]:
    from mmrep.describe import describe
    from mmrep.recipe import read_recipe
    from mmrep.run import Run

    recipe = read_recipe(name)
    yield f"recipe {name}: valid"
    yield describe(Run(recipe)).rsplit("\n\n", 1)[-1]
