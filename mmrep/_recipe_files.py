"""Recipe files: finding them by name, and laying a recipe over the one that it extends. Imports nothing heavy."""

from __future__ import annotations

import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml

from mmrep.config import ConfigError, merge
from mmrep.registry import near


def recipe_names(pattern: str = "*") -> list[str]:
    """Names of the library's recipes."""
    folder = resources.files("mmrep") / "recipes"
    names = [entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))


def recipe_text(name: str) -> str:
    """The YAML of one of the library's recipes, comments included.

    Raises:
        ConfigError: no such recipe; near matches are listed.
    """
    known = recipe_names()
    if name not in known:
        hint = " A recipe of your own is given as a path, such as ./mine.yaml" if "/" not in name else ""
        raise ConfigError([f"unknown recipe {name!r}{near(name, known)} Recipes: {', '.join(known)}.{hint}"])
    return (resources.files("mmrep") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def resolve(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Plain data of a recipe with everything it extends underneath.

    Args:
        name: recipe name, path of a YAML file, or run folder.
        seen: the recipes that led here, to refuse a circle.

    Raises:
        ConfigError: no such recipe or file, not YAML, or a circle.
    """
    if name in seen:
        raise ConfigError([f"recipes extend each other in a circle: {' → '.join([*seen, name])}"])
    path = Path(name)
    if path.is_dir() and (path / "config.yaml").is_file():
        path = path / "config.yaml"
    is_path = path.suffix in {".yaml", ".yml"}
    if is_path and not path.is_file():
        raise ConfigError([f"there is no recipe file {name!r} in {Path.cwd()}"])
    text = path.read_text(encoding="utf-8") if is_path else recipe_text(name)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError([f"{name}: not valid YAML: {error}"]) from error
    if not isinstance(data, dict):
        raise ConfigError([f"{name}: expected a mapping of data, model, objectives, train; got {type(data).__name__}"])
    data = cast("dict[str, Any]", data)
    parent = data.pop("extends", None)
    if parent is None:
        return data
    base = str(path.parent / parent) if is_path and str(parent).startswith(".") else str(parent)
    under = resolve(base, (*seen, name))
    under.pop("methods", None)  # what extends a method is another one
    return cast("dict[str, Any]", merge(under, data))
