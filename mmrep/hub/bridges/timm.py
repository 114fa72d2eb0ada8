"""``timm:name``: any model of timm, without its classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmrep.hub.bridges.bridge import Bridge, tower, width
from mmrep.hub.fetch import ModelFolderError


class Timm(Bridge):
    """``timm:resnet50.a1_in1k``, ``timm:hf-hub:organisation/name``, or a folder or repository in timm's layout.

    One tower of images; embeddings are timm's own pooled features, what ``create_model(…, num_classes=0)`` returns, not
    normalised. timm downloads by its own client: of the hub's options only ``revision`` (as ``name@revision``) is its.
    """

    def __init__(self, name: str, *, pool: str | None = None, **hub: Any) -> None:
        super().__init__(name, pool=pool, **hub)
        given = sorted(key for key, value in hub.items() if value)
        if given:
            raise ModelFolderError(f"timm:{name}: {', '.join(given)} cannot be passed on to timm")
        if Path(name).expanduser().is_dir():
            self.model = f"local-dir:{Path(name).expanduser()}"
        else:
            self.model = f"hf-hub:{name}" if "/" in name and ":" not in name else name

    def config(self) -> dict[str, Any]:
        """See `Bridge.config`."""
        found = tower({"type": "timm", "model": self.model, "pretrained": True}, self.pool or "native")
        untrained = tower({"type": "timm", "model": self.model, "pretrained": False}, self.pool or "native")
        return {"dim": width(untrained, None), "towers": {"image": found}, "normalize": False, "temperatures": {}}
