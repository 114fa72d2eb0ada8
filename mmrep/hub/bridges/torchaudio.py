"""``torchaudio:BUNDLE``: the wav2vec 2.0, HuBERT and WavLM bundles of torchaudio."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmrep.hub.bridges.bridge import Bridge, tower
from mmrep.hub.fetch import ModelFolderError
from mmrep.registry import near


class Torchaudio(Bridge):
    """``torchaudio:WAV2VEC2_BASE``, or with a local file of its weights ``torchaudio:WAV2VEC2_BASE/path``.

    One tower of sound; embeddings are the mean of the tokens, not normalised. Without a file torchaudio downloads the
    weights by its own client.
    """

    def __init__(self, name: str, *, pool: str | None = None, **hub: Any) -> None:
        super().__init__(name, pool=pool, **hub)
        given = sorted(key for key, value in hub.items() if value)
        if given:
            raise ModelFolderError(f"torchaudio:{name}: {', '.join(given)} cannot be passed on to torchaudio")
        self.bundle, _, self.weights = name.partition("/")

    def config(self) -> dict[str, Any]:
        """See `Bridge.config`."""
        pipelines: Any = import_module("torchaudio.pipelines")
        names = [one for one in dir(pipelines) if one.isupper()]
        bundle = getattr(pipelines, self.bundle, None)
        width = getattr(bundle, "_params", {}).get("encoder_embed_dim")
        if width is None:
            raise ModelFolderError(
                f"torchaudio:{self.bundle}: no bundle of that name that gives features{near(self.bundle, names)}"
            )
        where = {"weights": self.weights} if self.weights else {"download": True}
        found = tower({"type": "torchaudio", "bundle": self.bundle, **where}, self.pool or "mean")
        return {"dim": width, "towers": {"audio": found}, "normalize": False, "temperatures": {}}
