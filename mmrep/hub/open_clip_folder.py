"""A model in open_clip's folder layout: what its towers are made of, how pictures are prepared, and its weights.

Encoders of several modalities read such a folder, and so does the bridge.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mmrep.hub.fetch import ModelFolderError, fetch

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


@dataclass(frozen=True)
class OpenClipFolder:
    """``model`` and ``preprocess`` are open_clip's ``model_cfg`` and ``preprocess_cfg``."""

    folder: Path
    model: dict[str, Any]
    preprocess: dict[str, Any]

    def state(self) -> dict[str, Tensor]:
        """All weights by the names of ``CustomTextCLIP``: ``visual.…``, ``text.…``, ``logit_scale``."""
        path = next((p for name in (WEIGHTS, "model.safetensors") if (p := self.folder / name).is_file()), None)
        if path is None:
            raise ModelFolderError(f"{str(self.folder)!r} has no {WEIGHTS}: pickled weights are not read")
        convert: Any = import_module("open_clip").model.convert_to_custom_text_state_dict
        return convert(load_file(path))


def open_clip_folder(model: str) -> OpenClipFolder | None:
    """The folder that a model's name means: ``local-dir:path`` or ``hf-hub:organisation/name``; None = another name.

    A repository's name may end in ``@revision``.

    Raises:
        ModelFolderError: no such folder or repository, or not in open_clip's layout.
    """
    scheme, _, place = model.partition(":")
    if scheme not in ("local-dir", "hf-hub"):
        return None
    if scheme == "local-dir":
        folder = Path(place).expanduser()
    else:
        repo, _, revision = place.partition("@")
        folder = fetch(repo, revision=revision or None).folder
    path = folder / CONFIG
    if not path.is_file():
        raise ModelFolderError(f"model {model!r}: {str(folder)!r} has no {CONFIG}")
    document = json.loads(path.read_text(encoding="utf-8"))
    return OpenClipFolder(folder, document["model_cfg"], document.get("preprocess_cfg") or {})
