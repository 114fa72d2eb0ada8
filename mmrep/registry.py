"""Names to components: entry points, a decorator for notebooks, and errors that say what to type instead.

A component is registered by one line of package metadata, so listing names imports nothing::

    [project.entry-points."mmrep.encoders"]
    image-vit = "mmrep.modalities.image.vit:ImageViT"

or, in a notebook or script, by a decorator::

    @registry.encoders.register("my-encoder")
    class MyEncoder(Encoder): ...
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=type)


class UnknownNameError(LookupError):
    """A name that nothing is registered under; the message lists near matches."""


class DuplicateNameError(ValueError):
    """Two different components claim one name."""


class MissingPackageError(ImportError):
    """An optional package is absent; the message is the pip command that brings it."""


def near(name: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x' or 'y'?"`` for the closest of ``allowed``, or an empty string."""
    matches = difflib.get_close_matches(name, list(allowed), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: dotted name of the module to import.
        extra: the extra of mmrep that installs it.

    Raises:
        MissingPackageError: the module, or something it imports, is not installed.
    """
    try:
        with warnings.catch_warnings():  # what is deprecated inside a foreign package is its authors' business
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f'{module} needs the package {error.name!r}, which is not installed: pip install "mmrep[{extra}]"'
        ) from error


class Registry:
    """One kind of component (encoders, losses, …), looked up by name.

    Args:
        group: entry-point group, such as ``"mmrep.encoders"``.
        noun: what one entry is called in messages, such as ``"encoder"``.
    """

    def __init__(self, group: str, noun: str) -> None:
        self.group = group
        self.noun = noun
        self._local: dict[str, type] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a class decorator that registers the class under ``name``.

        Raises:
            DuplicateNameError: another component has this name. Running a notebook cell again is no duplicate.
        """

        def decorate(cls: T) -> T:
            known = self._local.get(name)
            rerun = known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
            if (known is not None and not rerun) or name in self._entry_points():
                raise DuplicateNameError(f"{self.noun} {name!r} is registered already; choose another name")
            self._local[name] = cls
            return cls

        return decorate

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted registered names that match a shell pattern. Imports no component."""
        return sorted(n for n in {*self._local, *self._entry_points()} if fnmatch.fnmatchcase(n, pattern))

    def get(self, name: str) -> Any:
        """Import and return the class registered under ``name``.

        Raises:
            UnknownNameError: no such name; near matches are listed.
            DuplicateNameError: two installed packages claim the name.
            MissingPackageError: the component needs a package that is absent.
        """
        if name in self._local:
            return self._local[name]
        found = self._entry_points().get(name)
        if found is None:
            names = self.names()
            raise UnknownNameError(
                f"unknown {self.noun} {name!r}{near(name, names)} Known: {', '.join(names) or 'none'}"
            )
        if len(found) > 1:
            owners = ", ".join(f"{_owner(point)} ({point.value})" for point in found)
            raise DuplicateNameError(f"{self.noun} {name!r} is claimed by {owners}; uninstall one of them")
        return found[0].load()

    def load_all(self) -> dict[str, Any]:
        """Import every component; one that fails to import is logged and left out, so that it breaks nothing else."""
        loaded: dict[str, Any] = {}
        for name in self.names():
            try:
                loaded[name] = self.get(name)
            except (ImportError, AttributeError, DuplicateNameError, SyntaxError) as error:
                logger.warning("%s %r cannot be loaded and is left out: %s", self.noun, name, error)
        return loaded

    def __contains__(self, name: str) -> bool:
        return name in self._local or name in self._entry_points()

    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        return _entry_points(self.group, tuple((path, _changed(path)) for path in sys.path))


@lru_cache(maxsize=64)
def _entry_points(group: str, where: tuple[tuple[str, int], ...]) -> dict[str, list[EntryPoint]]:
    """What the installed packages announce; read again when a package comes or goes (``where`` then differs)."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        same = found.setdefault(point.name, [])
        # One distribution can be seen twice (two sys.path entries): the same value is no second claim.
        if all(point.value != other.value for other in same):
            same.append(point)
    return found


def _changed(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown package"


encoders = Registry("mmrep.encoders", "encoder")
pools = Registry("mmrep.pools", "pool")
projectors = Registry("mmrep.projectors", "projector")
losses = Registry("mmrep.losses", "loss")
tuple_losses = Registry("mmrep.tuple_losses", "tuple loss")
fusions = Registry("mmrep.fusions", "fusion")
adapters = Registry("mmrep.adapters", "adapter")
view_losses = Registry("mmrep.view_losses", "loss of views")
masks = Registry("mmrep.masks", "mask")
targets = Registry("mmrep.targets", "target")
predictors = Registry("mmrep.predictors", "predictor")
objectives = Registry("mmrep.objectives", "objective")
views = Registry("mmrep.views", "view")
sources = Registry("mmrep.sources", "data source")
evaluations = Registry("mmrep.evaluations", "evaluation")
bridges = Registry("mmrep.bridges", "bridge")
exports = Registry("mmrep.exports", "export target")

REGISTRIES: dict[str, Registry] = {
    registry.group.removeprefix("mmrep."): registry
    for registry in (
        encoders,
        pools,
        projectors,
        fusions,
        adapters,
        losses,
        tuple_losses,
        view_losses,
        masks,
        targets,
        predictors,
        objectives,
        views,
        sources,
        evaluations,
    )
}
