"""`Model.export`: what a target is, and the way to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

from mmrep.model import Model
from mmrep.registry import exports
from mmrep.tower import Tower


class ExportError(ValueError):
    """The target cannot express this model; the message names the part that it lacks."""


class Export:
    """One target; registered under the name that `Model.export` takes.

    Args:
        model: in eval mode while it is written.
        tower: the only one to write, for targets of one tower; None = all, or the only one.
        base: what is written stands on this model, for targets that have such a thing; None = as our model knows it.
    """

    has_base: ClassVar[bool] = False

    def __init__(self, model: Model, tower: str | None = None, base: str | None = None) -> None:
        self.model, self.only, self.base = model, tower, base

    def write(self, folder: Path) -> None:
        """Write into the empty ``folder``.

        Raises:
            ExportError: before anything is written, if the target cannot express the model.
        """
        raise NotImplementedError

    def one_tower(self, noun: str) -> Tower:
        """The tower that was chosen, or the only one."""
        names = list(self.model.config.towers)
        if self.only is None and len(names) > 1:
            raise ExportError(f"{noun} is one tower; choose one with tower=: {', '.join(names)}")
        return self.model.tower(self.only or names[0])


def export(model: Model, target: str, folder: str | Path, *, tower: str | None = None, base: str | None = None) -> Path:
    """See `Model.export`."""
    kind: Any = exports.get(target)
    folder = Path(folder)
    if base is not None and not kind.has_base:
        raise ExportError(f"base={base!r}: what {target} writes is a whole, and stands on no other model")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{str(folder)!r} is there already and is not empty: choose another folder")
    was_training, made = model.training, not folder.exists()
    model.eval()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kind(model, tower, base).write(folder)
    except BaseException:
        if made:  # no half of a model is left that something might load
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        model.train(was_training)
    return folder


def refuse(tower: Tower, target: str, problems: list[str]) -> None:
    """Raise an `ExportError` if there are problems."""
    if problems:
        raise ExportError(f"{target} cannot express tower with encoder {tower.config.encoder.type!r}: "
                          + "; ".join(problems))  # fmt: skip
