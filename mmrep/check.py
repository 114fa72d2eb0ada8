"""What ``mmrep check`` does: contract checks of an encoder or loss, verification of a saved model, or of a recipe.

And ``mmrep check gradients RECIPE``: are the gradients of several processes those of one?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmrep._recipe_files import recipe_names
from mmrep.config import ConfigError, component, override
from mmrep.registry import encoders, losses, near, tuple_losses


def check(what: str, fields: Sequence[str] = ()) -> Iterator[str]:
    """Check the encoder, loss, saved model, or recipe called ``what``; yields one line for each thing that holds.

    Args:
        what: its name or path.
        fields: ``a.b=value``, of an encoder's config: some have no default for every field.

    Raises:
        ConfigError: nothing is called that, the recipe is wrong, or the fields are not the encoder's.
        ModelFolderError: the saved model cannot be used.
        AssertionError: the encoder or loss breaks its contract; the message says how.
    """
    if fields and what not in encoders:
        raise ConfigError([f"check {what}: takes nothing more; only an encoder takes fields, and `gradients` a recipe"])
    if what in encoders:
        yield from _encoder(what, fields)
    elif what in losses or what in tuple_losses:
        yield from _loss(what)
    elif (Path(what) / "config.json").is_file():
        yield from _model(what)
    elif what in recipe_names() or Path(what).suffix in {".yaml", ".yml"} or (Path(what) / "config.yaml").is_file():
        yield from _recipe(what)
    else:
        known = [*encoders.names(), *losses.names(), *tuple_losses.names(), *recipe_names()]
        raise ConfigError([f"{what!r} is no encoder, loss, recipe, recipe file or saved model{near(what, known)}"])


def check_gradients(
    arguments: Sequence[str], *, processes: int | None = None, samples: int | None = None
) -> tuple[str, bool]:
    """Check the gradients of a recipe across processes; see `mmrep.gradients.check_gradients`.

    Args:
        arguments: the recipe's name or path, then overrides.
        processes: how many to start.
        samples: of the global batch.

    Returns:
        What to print (nothing on any process of a launch but the first), and whether all terms agree.

    Raises:
        ConfigError: no recipe is given, or it is wrong.
    """
    if not arguments:
        raise ConfigError(["check gradients: which recipe? mmrep check gradients RECIPE [a.b=value …]"])
    from mmrep.gradients import check_gradients as compare
    from mmrep.recipe import read_recipe

    name, *overrides = arguments
    report = compare(read_recipe(name, overrides), processes=processes, samples=samples)
    return ("", True) if report is None else (report.text(), report.agree)


def _encoder(name: str, fields: Sequence[str]) -> Iterator[str]:
    from mmrep.testing import check_encoder

    data: dict[str, Any] = {}
    for assignment in fields:
        data = override(data, assignment)
    chosen = component("encoders", name, **data)
    check_encoder(chosen.build())
    cls = chosen.cls
    yield f"encoder {name}: keeps the contract ({cls.__module__}.{cls.__qualname__})"


def _loss(name: str) -> Iterator[str]:
    from mmrep.testing import check_loss, check_tuple_loss

    registry = losses if name in losses else tuple_losses
    cls = registry.get(name)
    (check_loss if registry is losses else check_tuple_loss)(cls(cls.Config()))
    yield f"{registry.noun} {name}: keeps the contract ({cls.__module__}.{cls.__qualname__})"


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
