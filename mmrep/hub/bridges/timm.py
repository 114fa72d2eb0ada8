"""``timm:name``: any model of timm, without its classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmrep.hub.bridges._repository import repository
from mmrep.hub.bridges.bridge import Bridge, tower, width
from mmrep.hub.fetch import ModelFolderError


class Timm(Bridge):
    """``timm:resnet50.a1_in1k``, ``timm:hf-hub:organisation/name``, or a folder or repository in timm's layout.

    One tower of images; embeddings are timm's own pooled features, what ``create_model(…, num_classes=0)`` returns, not
    normalised. A repository ``organisation/name`` is downloaded by mmrep, with the hub's options; models of timm's own
    list by timm's client, which takes none.
    """

    def __init__(self, name: str, *, pool: str | None = None, **hub: Any) -> None:
        super().__init__(name, pool=pool, **hub)
        found = repository(name, "timm", "config.json", hub)
        if found is not None:
            self.model, self.public = found
            return
        given = sorted(key for key, value in hub.items() if value)
        if given:
            raise ModelFolderError(
                f"timm:{name}: {', '.join(given)} cannot be passed on to timm; they are for repositories, "
                "timm:organisation/name"
            )
        folder = Path(name).expanduser()
        self.model = self.public = f"local-dir:{folder}" if folder.is_dir() else name

    def config(self) -> dict[str, Any]:
        """See `Bridge.config`."""
        return self._config(self.model)

    def named(self) -> dict[str, Any]:
        """See `Bridge.named`."""
        return self._config(self.public)

    def _config(self, name: str) -> dict[str, Any]:
        found = tower({"type": "timm", "model": name, "pretrained": True}, self.pool or "native")
        untrained = tower({"type": "timm", "model": self.model, "pretrained": False}, self.pool or "native")
        return {"dim": width(untrained, None), "towers": {"image": found}, "normalize": False, "temperatures": {}}
