"""Code that a checkpoint brings along: run only where the person at the keyboard said so, never because a file says so.

Two things must come together: the config of an encoder says that its checkpoint needs code (``trust_remote_code``, as
`transformers` calls it), and whoever runs the program allows it, by ``mmrep.load(…, trust_remote_code=True)`` or by the
environment variable ``MMREP_TRUST_REMOTE_CODE=1``. A recipe or a saved model from elsewhere can do the first alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

VARIABLE = "MMREP_TRUST_REMOTE_CODE"
_ASKED: ContextVar[bool] = ContextVar("trust_remote_code", default=False)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@contextmanager
def asked(yes: bool) -> Iterator[None]:
    """Within it, what is loaded may run its own code, if ``yes``."""
    token = _ASKED.set(yes)
    try:
        yield
    finally:
        _ASKED.reset(token)


def permitted() -> bool:
    """Whether whoever runs the program allows the code of checkpoints."""
    return _ASKED.get() or os.environ.get(VARIABLE) == "1"


def check(path: str, source: str, *, files: Path | None = None, **options: Any) -> None:
    """Refuse to run the code of a checkpoint whose encoder's config asks for it, unless all of this holds.

    It is permitted; a hub repository is named by a commit, so that nobody can change the code afterwards; and the code
    is the repository's own, not one of another that it names.

    Args:
        path: of the encoder's config, for messages.
        source: folder or hub id, from `mmrep.hub.pretrained.locate`.
        files: the folder of a saved encoder, which is then the source.
        **options: ``revision`` and ``local_files_only``.

    Raises:
        ValueError: one of these does not hold; the message says what to do.
    """
    where = source if files is None else str(files)
    if not permitted():
        raise ValueError(
            f"path {path!r}: the config says trust_remote_code: true, so the model runs Python code that came with it "
            f"({where}). A config alone cannot allow that: read the code, and where you trust it, call mmrep.load(…, "
            f"trust_remote_code=True), or set the environment variable {VARIABLE}=1 for this run"
        )
    revision = options.get("revision")
    if not Path(where).is_dir() and not _COMMIT.fullmatch(str(revision or "")):
        raise ValueError(
            f"path {path!r}, revision {revision!r}: code of the hub is only run at a commit that you name (40 "
            "hexadecimal digits): a branch or tag can be moved to other code"
        )
    foreign = sorted({entry for entry in _entries(where, options) if "--" in entry})
    if foreign:
        raise ValueError(
            f"path {path!r}: its code is in another repository ({', '.join(foreign)}), whose revision nothing names; "
            "it is not run. Copy the code beside the weights in a local folder, without the part before '--'"
        )


def refusal(name: str, parts: Any) -> str:
    """The message for a checkpoint that needs code, where nobody asked for it."""
    return (
        f"{name!r} is a model whose code is in its own repository ({parts}), and mmrep never runs code of a repository "
        "unasked. Read it, and where you trust it: mmrep.load(…, trust_remote_code=True), for models of text. Or load "
        "it with transformers inside an encoder of your own (see CONTRIBUTING.md, a new encoder)"
    )


def read_code(source: str, **options: Any) -> dict[str, bytes]:
    """A checkpoint's own Python files by name, for whoever saves its encoder; they run when that is asked for again."""
    place = Path(source)
    if not place.is_dir():
        from huggingface_hub import snapshot_download

        place = Path(snapshot_download(source, allow_patterns=["*.py"], **options))
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in sorted(place.rglob("*.py"))}


def write_code(code: dict[str, bytes], folder: Path) -> None:
    """Write what `read_code` read."""
    for name, content in code.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _entries(source: str, options: dict[str, Any]) -> list[str]:
    """What ``auto_map`` names, in the model's config and in its tokenizer's."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    documents: list[Any] = [
        PreTrainedConfig.get_config_dict(source, **options)[0],
        get_tokenizer_config(source, **options),
    ]
    found: list[str] = []
    for document in documents:
        mapped = document.get("auto_map") or {}
        for value in mapped.values() if isinstance(mapped, dict) else [mapped]:
            found += [str(one) for one in (value if isinstance(value, (list, tuple)) else [value]) if one]
    return found
