"""Putting a new folder in the place of an old one, so that a kill at any moment leaves one of the two there."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def replace_folder(fresh: Path, final: Path) -> None:
    """Make ``fresh`` the folder ``final``; what was there is gone.

    Linux exchanges two folders in one step. Elsewhere the old one stands aside for a moment, in which a kill leaves no
    ``final``: `heal_folder` brings it back.

    Args:
        fresh: a complete folder on the same disk; it is flushed to the disk first.
        final: what it shall be called.

    Raises:
        OSError: as the system says; ``final`` is the old folder or the new one.
    """
    for path in fresh.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    old = _aside(final)
    exchanged = final.exists() and _exchange(fresh, final)
    if not exchanged:
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(fresh, final)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)


def heal_folder(final: Path) -> None:
    """Bring the old folder back if a kill in `replace_folder` left none. Several processes may call it at once."""
    old = _aside(final)
    if not final.exists() and old.exists():
        try:
            os.rename(old, final)
        except FileNotFoundError:
            assert final.exists()  # another process was quicker


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}-old")


def _exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system or the disk cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0
