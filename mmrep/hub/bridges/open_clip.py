"""``open_clip:model/tag``: any CLIP of open_clip with a text tower of its own, and folders in its layout."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrep.hub.bridges._repository import repository
from mmrep.hub.bridges.bridge import Bridge, tower
from mmrep.hub.fetch import ModelFolderError
from mmrep.hub.open_clip_folder import CONFIG, open_clip_folder
from mmrep.model import Model


class OpenClip(Bridge):
    """``open_clip:ViT-B-32/laion2b_s34b_b79k``, ``open_clip:hf-hub:organisation/name``, or a folder.

    A repository without a scheme, ``mmrep.load("organisation/name")``, is one, too, if it has open_clip's layout.

    Embeddings are those of ``encode_image`` and ``encode_text`` with ``normalize=True``; scale and bias are the
    checkpoint's. Models with a text tower of Hugging Face, and CoCa, are refused by the text encoder, which says so.
    open_clip downloads tags by its own client, which takes none of the hub's options; mmrep downloads repositories.
    """

    def __init__(self, name: str, *, pool: str | None = None, **hub: Any) -> None:
        super().__init__(name, pool=pool, **hub)
        found = repository(name, "open_clip", CONFIG, hub) if name.startswith("hf-hub:") else None
        given = sorted(key for key, value in hub.items() if value)
        if given and found is None:
            raise ModelFolderError(
                f"open_clip:{name}: {', '.join(given)} cannot be passed on to open_clip; they are for repositories, "
                "open_clip:hf-hub:organisation/name"
            )
        path = Path(name).expanduser()
        if path.is_dir():
            name = f"local-dir:{path}"
        name, self.public = found or (name, name)
        self.model, _, self.tag = (name, "", "") if ":" in name else name.partition("/")
        if ":" not in self.model and not self.tag:
            tags = ", ".join(import_module("open_clip").list_pretrained_tags_by_model(self.model))
            known = f"tags: {tags}" if tags else "open_clip has no model of that name with weights"
            raise ModelFolderError(f"open_clip:{name}: say which weights, as open_clip:{name}/tag; {known}")
        self._values = self._read()

    def _read(self) -> tuple[int, Tensor, Tensor | None]:
        """Width of the space, logit scale (as a logarithm) and bias."""
        whole = open_clip_folder(self.model)
        if whole is not None:
            state = whole.state()
            return int(whole.model["embed_dim"]), state["logit_scale"], state.get("logit_bias")
        open_clip = import_module("open_clip")
        made: Any = open_clip.create_model(self.model, pretrained=self.tag)
        bias = None if made.logit_bias is None else made.logit_bias.detach()
        return int(open_clip.get_model_config(self.model)["embed_dim"]), made.logit_scale.detach(), bias

    def config(self) -> dict[str, Any]:
        """See `Bridge.config`."""
        return self._config(self.model)

    def named(self) -> dict[str, Any]:
        """See `Bridge.named`."""
        return self._config(self.public if self.public.startswith("hf-hub:") else self.model)

    def _config(self, model: str) -> dict[str, Any]:
        dim, scale, bias = self._values
        pretrained = {"pretrained": self.tag} if self.tag else {}
        kinds = {"image": "open-clip-image", "text": "open-clip-text"}
        towers = {
            name: tower({"type": kind, "model": model, **pretrained}, self.pool or "native")
            for name, kind in kinds.items()
        }
        temperature = {"scale": math.exp(float(scale)), "bias": None if bias is None else float(bias)}
        if bias is not None:  # trained by the sigmoid loss, without a bound
            temperature["max_scale"] = None
        return {"dim": dim, "towers": towers, "temperatures": {"default": temperature}}

    @torch.no_grad()
    def fill(self, model: Model) -> None:
        """See `Bridge.fill`."""
        if "default" in model.temperatures:  # a recipe may have left it out
            model.temperature("default").log_scale.fill_(float(self._values[1]))
