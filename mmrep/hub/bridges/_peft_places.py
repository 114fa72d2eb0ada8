"""Where the modules of a transformers model are in our encoders, for adapters that use the library's names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmrep.encoder import Encoder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOTS = ("model", "trunk.model")
_PAIRS = (("", ""), ("encoder", ""), ("text_model", ""), ("text_model", "text_model"), ("vision_model", ""))
"""The library's name of a part, and its name within an encoder's network; the first that fits is it."""
_PROJECTIONS = (("text_projection", "model.text_projection"), ("visual_projection", "trunk.projection"))
_UNREAD = frozenset({"pooler", "decoder"})
"""Parts of the library's models that our encoders of them leave out."""
_PEFTS = ("lora_", "ia3_l", "hada_", "lokr_", "base_layer", "token_adapter")


@dataclass(frozen=True)
class Library:
    """What ``AutoModel`` builds of a config.

    Attributes:
        kind: the class's name.
        parameters: shapes, by name.
        modules: names.
        prefix: what models with a head call it.
    """

    kind: str
    parameters: dict[str, tuple[int, ...]]
    modules: frozenset[str]
    prefix: str

    @classmethod
    def of(cls, folder: Path) -> Library:
        """Of a folder's config.json, built without values."""
        import transformers

        config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model: Any = transformers.AutoModel.from_config(config)
        named = model.named_parameters(remove_duplicate=False)  # T5's encoder has the table that is called shared
        return cls(
            type(model).__name__, {name: tuple(p.shape) for name, p in named},
            frozenset(name for name, _ in model.named_modules() if name), str(model.base_model_prefix),
        )  # fmt: skip

    def places(self, encoder: Encoder) -> dict[str, str]:
        """The encoder's modules by the library's names, as the adapter `peft` takes them; empty if there are none."""
        found: dict[str, str] = {}
        for name, inner in _PAIRS:
            for root in _ROOTS:
                place = f"{root}.{inner}".rstrip(".")
                if not found and self._holds(name, _part(encoder, place)):
                    found[name] = place
        if "" not in found:
            found |= {n: place for n, place in _PROJECTIONS if self._holds(n, _part(encoder, place))} if found else {}
        return found

    def _holds(self, name: str, part: nn.Module | None) -> bool:
        before = f"{name}." if name else ""
        own = {} if part is None else dict(part.named_parameters())
        return bool(own) and all(self.parameters.get(before + n) == tuple(p.shape) for n, p in own.items())

    def owner(self, key: str) -> str | None:
        """The module that a value of an adapter belongs to; None if the library has none of the name."""
        parts = key.split(".")
        for count in range(len(parts) - 1, 0, -1):
            name, rest = ".".join(parts[:count]), parts[count]
            if name in self.modules:
                return (
                    name if rest.startswith(_PEFTS) or f"{name}.{'.'.join(parts[count:])}" in self.parameters else None
                )
        return None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft and no whole model beside it."""
    return (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def headless(keys: Collection[str], library: Library) -> str:
    """What the names of an adapter have in front of the library's: that of a model with a head, as in ``bert.``."""
    before = f"{library.prefix}."
    if any(library.owner(key) for key in keys) or not library.prefix:
        return ""
    return before if any(library.owner(key.removeprefix(before)) for key in keys if key.startswith(before)) else ""


def within(key: str, places: Mapping[str, str], encoder: Encoder, library: Library, before: str) -> bool:
    """Whether a value belongs to a module that is in the encoder."""
    owner = library.owner(key.removeprefix(before))
    for name, place in places.items():
        if owner is not None and (not name or f"{owner}.".startswith(f"{name}.")):
            inner = owner.removeprefix(name).removeprefix(".")
            if _part(encoder, f"{place}.{inner}".rstrip(".")) is not None:
                return True
    return False


def unread(key: str, library: Library, before: str) -> bool:
    """Whether a value belongs to what no embedding reads: a head, a decoder, a pooling layer that is left out."""
    if before and not key.startswith(before):
        return True
    owner = library.owner(key.removeprefix(before))
    return owner is not None and bool(_UNREAD & set(owner.split(".")[:2]))


def _part(encoder: Encoder, place: str) -> nn.Module | None:
    try:
        return encoder.get_submodule(place)
    except AttributeError:
        return None
