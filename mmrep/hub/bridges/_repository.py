"""A hub repository in the layout of open_clip or timm, as a local folder: by our own download, not by their clients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmrep.hub.fetch import ModelFolderError, fetch

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SCHEME = "hf-hub:"


def repository(name: str, library: str, config: str, hub: dict[str, Any]) -> tuple[str, str] | None:
    """What a bridge's name means if it is a repository, ``organisation/name`` or ``hf-hub:organisation/name``.

    Args:
        name: what stands after the scheme.
        library: which one's, for messages.
        config: the file that its layout has.
        hub: the caller's options: ``revision, token, cache_dir, force_download, local_files_only``.

    Returns:
        The local folder as that library names it, and the public name with its commit; None if it is no repository.

    Raises:
        ModelFolderError: no such repository, or one without that file or without safetensors weights.
    """
    repo, at, revision = name.removeprefix(_SCHEME).partition("@")
    if not _ID.fullmatch(repo) or Path(name).expanduser().is_dir():
        return None
    if at and hub.get("revision") not in (None, revision):
        raise ModelFolderError(f"{library}:{name}: two revisions, {revision!r} and {hub['revision']!r}")
    found = fetch(repo, **{**hub, **({"revision": revision} if at else {})})
    if not (found.folder / config).is_file():
        raise ModelFolderError(f"{repo!r} has no {config}: it is not in the layout of {library}")
    if not any(found.folder.glob("*.safetensors")):
        only = f", only {', '.join(found.pickles[:3])}: reading a pickle can run any program" if found.pickles else ""
        raise ModelFolderError(f"{repo!r} has no safetensors weights{only}")
    commit = f"@{found.commit}" if found.commit else ""
    return f"local-dir:{found.folder}", f"{_SCHEME}{repo}{commit}"
