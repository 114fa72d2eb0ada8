"""``peft:organisation/name`` or a folder of peft: an adapter, put into the model that it names as its base."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmrep.config import parse
from mmrep.finetune.adapter import merged
from mmrep.finetune.peft_config import read_options, strip
from mmrep.hub.bridges import _sentences
from mmrep.hub.bridges._peft_places import CONFIG, WEIGHTS, Library, headless, unread, within
from mmrep.hub.bridges.bridge import Bridge
from mmrep.hub.bridges.transformers import HuggingFace, located
from mmrep.hub.fetch import PICKLES, Fetched, ModelFolderError, fetch
from mmrep.model import Model
from mmrep.tower import TowerConfig

_JOINT = ("clip", "metaclip_2", "siglip", "siglip2")
"""Of the joint models, those whose parts are found by the library's names."""


class Peft(Bridge):
    """The base, loaded as it is by itself, with peft's adapter kept apart in its towers.

    What the base has around its network (pooling, normalisation, scale) stays; a folder that sentence-transformers has
    written says its own. Of an adapter of a model with a head, or with a decoder, the rest of the values is left out.

    Args:
        name: a hub id, a folder, or ``package:name/folder``.
        pool: as of the base.
        base: another name of the base than the adapter's own: whatever `mmrep.load` takes.
        **hub: of the adapter's repository; for the base's the same but ``revision``, which the adapter says.
    """

    def __init__(self, name: str, *, pool: str | None = None, base: str | None = None, **hub: Any) -> None:
        super().__init__(name, pool=pool, **hub)
        path = Path(located(name) if name.startswith("package:") else name).expanduser()
        fetched = Fetched(path) if path.is_dir() else fetch(name, **hub)
        self.folder = fetched.folder
        document = _document(name, self.folder)
        try:
            self.options = read_options(document)
        except (ValueError, TypeError) as error:
            raise ModelFolderError(f"{name!r} is an adapter of peft that cannot be read: {error}") from error
        if not (self.folder / WEIGHTS).is_file():
            raise ModelFolderError(_no_weights(name, self.folder, fetched.pickles))
        self.base = self._base(document, base)
        if (own := _sentences.modules(self.folder)) is not None:
            self.base.modules = own

    def config(self) -> dict[str, Any]:
        """See `Bridge.config`."""
        return self._adapted(self.base.config())

    def named(self) -> dict[str, Any]:
        """See `Bridge.named`."""
        return self._adapted(self.base.named())

    @torch.no_grad()
    def fill(self, model: Model) -> None:
        """See `Bridge.fill`. Where a tower has another adapter, or none any more, this one is added to the weights."""
        self.base.fill(model)
        ended: list[str] = []
        for name, (_, keys) in self._parts.items():
            if name not in model.config.towers:
                continue
            adapter, encoder = model.tower(name).adapter, model.tower(name).encoder
            chosen = model.config.towers[name].adapter
            if chosen is None or chosen != parse(TowerConfig, self.config()["towers"][name]).adapter:
                ended.append(name)
                continue
            assert adapter is not None, "it has a config"
            try:
                adapter.fill(encoder, {key: self._state[key] for key in keys})  # pyright: ignore[reportAttributeAccessIssue]
            except ValueError as error:
                raise ModelFolderError(f"{self.name!r}: {error}") from error
        if ended:
            self._add(model, ended)

    def _add(self, model: Model, names: list[str]) -> None:
        from mmrep.hub.load import build

        whole = merged(build(self), names)
        for name in names:
            tower, values = model.tower(name), whole.tower(name).encoder.state_dict()
            places = {own: own for own in values}
            if tower.adapter is not None:
                places = tower.adapter.base_names(tower.encoder)
            own = {now: values[name] for now, name in places.items() if name in values}
            tower.encoder.load_state_dict(own, strict=False)
            if tower.adapter is not None:
                tower.adapter.settle(tower.encoder)

    def _adapted(self, config: dict[str, Any]) -> dict[str, Any]:
        towers = {
            name: {**tower, "adapter": {"type": "peft", **self._parts[name][0]}} if name in self._parts else tower
            for name, tower in config["towers"].items()
        }
        return {**config, "towers": towers}

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        path = self.folder / WEIGHTS
        try:
            return strip(load_file(path))
        except SafetensorError as error:
            raise ModelFolderError(
                f"{path} is damaged or was cut short ({error}); copy or download it again"
            ) from error

    @cached_property
    def _parts(self) -> dict[str, tuple[dict[str, Any], list[str]]]:
        """Per tower that has a part of the adapter: the adapter's fields, and the names of its values."""
        library = Library.of(self.base.inner)
        before = headless(self._state, library)
        found: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for name, tower in self.base.config()["towers"].items():
            with torch.device("meta"):
                encoder = parse(TowerConfig, tower).encoder.build(files=self.base.inner)
            places = library.places(encoder)
            keys = [key for key in self._state if within(key, places, encoder, library, before)]
            if keys:
                named = {f"{before}{place}".rstrip("."): where for place, where in places.items()}
                found[name] = ({"options": self.options, "places": named}, keys)
        taken = {key for _, keys in found.values() for key in keys}
        lost = [key for key in self._state if key not in taken and not unread(key, library, before)]
        if lost or not found:
            raise ModelFolderError(
                f"{self.name!r} has values for {', '.join(lost[:3]) or 'nothing'}, which {library.kind} of "
                f"{self.base.name!r} does not have where an embedding comes from "
                f"(task_type {self.options.get('task_type')}): is it an adapter for another model? base=… names that"
            )
        return found

    def _base(self, document: dict[str, Any], base: str | None) -> HuggingFace:
        from mmrep.hub.load import bridge

        said = document.get("base_model_name_or_path")
        if not (base or said):
            raise ModelFolderError(f"{self.name!r} does not say what it is an adapter for ({CONFIG} has no "
                                   "base_model_name_or_path): name the model with base=…")  # fmt: skip
        name, revision = str(base or said), None if base else document.get("revision")
        if not re.search("[/:]", name) and not Path(name).is_dir():  # as the hub's oldest models are still called
            name = f"hf:{name}"
        hub = {**self.hub, "revision": revision} if revision else {k: v for k, v in self.hub.items() if k != "revision"}
        at = f" at revision {revision!r}" if revision else ""
        try:
            found = bridge(name, pool=self.pool, **hub)
        except ModelFolderError as error:
            raise ModelFolderError(
                f"{self.name!r} is an adapter for {base or said!r}{at}, which cannot be loaded: {error}. Another copy "
                "of that model, a folder say, is named with base=…"
            ) from error
        kind = "a model of ours" if found is None else type(found).__name__
        if not isinstance(found, HuggingFace) or (found.joint and found.kind not in _JOINT):
            kind = found.kind if isinstance(found, HuggingFace) else kind
            raise ModelFolderError(
                f"{self.name!r} is an adapter for {base or said!r}, which is no model that transformers' AutoModel "
                f"builds, or one whose towers' names are not known here ({kind})"
            )
        if found.code:
            raise ModelFolderError(
                f"{self.name!r} is an adapter for {base or said!r}, which needs Python code of its own repository: "
                "that is not run for an adapter. Merge the two with peft (merge_and_unload) and load the whole"
            )
        return found


def _document(name: str, folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelFolderError(f"{name!r} has no {CONFIG}: it is not in the layout of peft")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelFolderError(f"{path} holds {type(document).__name__}, not a config of peft")
    return document


def _no_weights(name: str, folder: Path, pickles: tuple[str, ...]) -> str:
    found = sorted({*pickles, *(p.name for pattern in PICKLES for p in folder.glob(pattern))})
    if found:
        return (
            f"{name!r} has no {WEIGHTS}, only {', '.join(found[:3])}: reading a pickle can run any program, so it is "
            f"refused. `mmrep convert adapter_model.bin {WEIGHTS}` in a local copy reads tensors alone and runs "
            "nothing; then load that folder"
        )
    return f"{name!r} holds no weights of an adapter ({WEIGHTS})"
