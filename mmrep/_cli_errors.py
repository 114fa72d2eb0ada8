"""Which errors of the command line are for people: one readable message in place of a traceback."""

from __future__ import annotations

from collections.abc import Callable


def is_for_people(error: Exception) -> bool:
    """Whether the message alone helps the user; a traceback is kept for everything unexpected."""
    modules = (
        "mmrep.config",
        "mmrep.registry",
        "mmrep.encoder",
        "mmrep.hub",
        "mmrep.training.errors",
        "mmrep.embed",
        "mmrep.data",
    )
    return type(error).__module__.startswith(modules) or hasattr(
        error, "format_message"
    )  # the latter: of the shell itself


def message(error: Exception) -> str:
    describe: Callable[[], str] | None = getattr(error, "format_message", None)
    return describe() if describe is not None else str(error)
