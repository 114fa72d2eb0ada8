"""``hf:organisation/name``, ``hf:package:name/folder`` or a folder of transformers or sentence-transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from mmrep.hub.bridges import _sentences
from mmrep.hub.bridges._families import ELSEWHERE, JOINT, Joint, Part, single
from mmrep.hub.bridges.bridge import Bridge, Values, tower, width
from mmrep.hub.fetch import PICKLES, Fetched, ModelFolderError, fetch
from mmrep.hub.pretrained import locate
from mmrep.hub.remote_code import permitted, refusal
from mmrep.model import Model
from mmrep.registry import near

_NO_BOUND = 1e-9
"""Of a scale, from below."""


class HuggingFace(Bridge):
    """A model of transformers, or a folder of sentence-transformers, with its preprocessing.

    Joint models (CLIP, MetaCLIP 2, Chinese-CLIP, AltCLIP, SigLIP, SigLIP 2, ALIGN, CLAP, X-CLIP, PE) become towers in
    one space, with the checkpoint's scale and bias; embeddings are what ``get_image_features`` and the like return, of
    unit length (PE's are not). Any other model is one tower: text is pooled by the mean, or the last token of decoders,
    as sentence-transformers does where a folder does not say otherwise. A sentence-transformers folder brings its
    pooling, dense layer, normalisation, prompts and length.
    """

    def __init__(self, name: str, *, pool: str | None = None, **hub: Any) -> None:
        super().__init__(name, pool=pool, **hub)
        self.packaged = name.startswith("package:")
        path = Path(located(name) if self.packaged else name).expanduser()
        self.local = path.is_dir()
        self.fetched = Fetched(path) if self.local else fetch(name, code=permitted(), **hub)
        self.folder = self.fetched.folder
        self.modules = _sentences.modules(self.folder)
        inner = self.folder if self.modules is None else self.folder / self.modules.path
        self.inner = inner
        self.kind, self.code = _kind(name, inner)
        if not any(inner.glob("*.safetensors")):
            raise ModelFolderError(_no_weights(name, inner, self.fetched.pickles))

    def config(self) -> dict[str, Any]:
        """See `Bridge.config`."""
        return self._config({"path": str(self.inner), **self._code})

    def named(self) -> dict[str, Any]:
        """See `Bridge.named`."""
        if self.packaged:
            return self._config({"path": self.name, **self._code})
        if self.local:
            return self.config()
        inside = "" if self.modules is None or not self.modules.path else f"/{self.modules.path}"
        if inside:  # an encoder reads the root of a repository alone
            return self.config()
        return self._config({"path": self.name, "revision": self.fetched.commit, **self._code})

    @property
    def joint(self) -> bool:
        """Whether it is several towers in one space."""
        return self.modules is None and self.kind in JOINT

    @property
    def _code(self) -> dict[str, Any]:
        return {"trust_remote_code": True} if self.code else {}

    def _config(self, where: dict[str, Any]) -> dict[str, Any]:
        joint = JOINT.get(self.kind)
        if joint is not None and self.modules is None:
            return self._joint(joint, where)
        found = single(self.kind) or (("text", Part("hf-text", "mean")) if self.code else None)
        if found is None:
            raise ModelFolderError(
                f"{self.name!r} is a {self.kind!r} model, which no encoder here reads{near(self.kind, JOINT)} "
                f"Joint models: {', '.join(JOINT)}; and any model of images, text, audio, video or series that "
                "transformers' AutoModel builds"
            )
        modality, part = found
        if self.modules is not None:
            return self.modules.config(where, self.pool)
        only = self._tower(part, where)
        dim = width(only, self.inner)
        return {"dim": dim, "towers": {modality: only}, "normalize": False, "temperatures": {}}

    def _joint(self, joint: Joint, where: dict[str, Any]) -> dict[str, Any]:
        towers = {name: self._tower(part, where) for name, part in joint.towers.items()}
        temperatures = {"default": self._temperature(joint, joint.scale, joint.bias)}
        temperatures |= {
            name: self._temperature(joint, other.scale, other.bias) for name, other in joint.others.items()
        }
        document = json.loads((self.inner / "config.json").read_text())
        dim = document.get("projection_dim") or document["text_config"].get("projection_size")
        if self.kind in ("siglip", "siglip2"):
            dim = document["text_config"].get("projection_size") or document["vision_config"]["hidden_size"]
        if self.kind.startswith("pe_"):
            dim = document["text_config"]["hidden_size"]
        return {"dim": dim, "towers": towers, "normalize": joint.unit, "temperatures": temperatures}

    def _tower(self, part: Part, where: dict[str, Any]) -> dict[str, Any]:
        return tower({"type": part.encoder, **where, **part.fields}, self.pool or part.pool)

    def _temperature(self, joint: Joint, scale: str, bias: str | None) -> dict[str, Any]:
        values = Values(self.inner)
        if scale not in values:
            raise ModelFolderError(f"{self.name!r} has no {scale!r}: it is not a whole {self.kind!r} model")
        raw = values.scalar(scale)
        if joint.holds != "log" and not raw > 0:
            raise ModelFolderError(f"{self.name!r}: {scale} is {raw:g}, and a scale is above 0: was it never trained?")
        found: dict[str, Any] = {
            "scale": math.exp(raw) if joint.holds == "log" else 1 / raw if joint.holds == "temperature" else raw,
            "bias": None if bias is None else values.scalar(bias),
            "max_scale": joint.highest,
        }
        return found if joint.highest is not None else {**found, "min_scale": _NO_BOUND}

    @torch.no_grad()
    def fill(self, model: Model) -> None:
        """See `Bridge.fill`."""
        if self.modules is not None:
            self.modules.fill(model)
        joint = JOINT.get(self.kind) if self.modules is None else None
        if joint is not None and joint.holds == "log":  # the parameter itself, not what became of it by exp and log
            if "default" in model.temperatures:  # a recipe may have left it out
                model.temperature("default").log_scale.fill_(Values(self.inner).scalar(joint.scale))


def located(name: str) -> str:
    """The folder of ``package:name/folder``."""
    try:
        return locate(name)
    except ValueError as error:
        raise ModelFolderError(str(error)) from error


def _kind(name: str, folder: Path) -> tuple[str, bool]:
    """The model type, and whether its own code is run: it was allowed, and it is a model of text."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFolderError(f"{name!r} has no config.json: it is not a model of transformers")
    document = json.loads(path.read_text(encoding="utf-8"))
    kind = str(document.get("model_type", ""))
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    remote, known = document.get("auto_map"), kind in CONFIG_MAPPING_NAMES
    if remote and permitted():
        found = single(kind)
        text = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
        if (found is None and text and kind not in JOINT) or (found is not None and found[0] == "text"):
            return kind, True
        if not known:
            raise ModelFolderError(
                f"{name!r} is a {kind!r} model with code of its own, and no tokenizer: such code is run for models of "
                "text alone. Load it with transformers inside an encoder of your own (see CONTRIBUTING.md)"
            )
    if not known:
        if remote:
            raise ModelFolderError(refusal(name, ", ".join(remote)))
        for start, hint in ELSEWHERE.items():
            if kind.startswith(start):
                raise ModelFolderError(f"{name!r} is a {kind!r} model: {hint}")
        raise ModelFolderError(
            f"{name!r}: its config.json has model_type {kind!r}, which the installed transformers does not know"
            f"{near(kind, CONFIG_MAPPING_NAMES)}"
        )
    return kind, False


def _no_weights(name: str, folder: Path, pickles: tuple[str, ...]) -> str:
    found = sorted({*pickles, *(p.name for pattern in PICKLES for p in folder.glob(pattern))})
    if found:
        return (
            f"{name!r} has no safetensors weights, only {', '.join(found[:3])}: reading a pickle can run any program, "
            "so it is refused. `mmrep convert pytorch_model.bin model.safetensors` in a local copy reads tensors alone "
            "and runs nothing; then load that folder"
        )
    return f"{name!r} holds no model weights (*.safetensors)"
