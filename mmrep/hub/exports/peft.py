"""The adapter of a tower as a folder of peft, without the model that it is in."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmrep.encoder import Encoder
from mmrep.finetune._through_peft import ByPatterns, ThroughPeft, layers
from mmrep.finetune.adapter import matching
from mmrep.finetune.peft_config import AROUND, PeftConfig, seen, values
from mmrep.hub.bridges._peft_places import WEIGHTS, Library
from mmrep.hub.bridges.transformers import HuggingFace
from mmrep.hub.exports.export import Export, ExportError, refuse
from mmrep.hub.fetch import ModelFolderError
from mmrep.registry import require
from mmrep.tower import Tower

_MERGED = 'model.merged().export("hf", …) writes the whole'


class Peft(Export):
    """What ``PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)`` loads: LoRA, DoRA, (IA)^3.

    The tower's encoder is one of transformers' networks, its projector the identity; any pool will do, as the folder
    has none. What trains in full beside the adapter (``also``) is written as peft's ``modules_to_save``. The base is
    read and compared: its weights are those that the adapter stands on, to the bit.
    """

    has_base = True

    def write(self, folder: Path) -> None:
        """See `Export.write`."""
        tower = self.one_tower("an adapter of peft")
        refuse(tower, "peft", _problems(tower))
        peft: Any = require("peft", "lora")
        name, revision = self._named(tower)
        plain, library, joint = _base(tower, name, revision)
        adapter: Any = tower.adapter
        _compare(tower, plain, name)
        places = library.places(plain)
        if not places:
            raise ExportError(f"peft: {library.kind}, which AutoModel makes of {name!r}, does not hold this network by "
                              f"names that are known here; {_MERGED}")  # fmt: skip
        if isinstance(adapter, PeftConfig):
            if adapter.config.places != places:
                raise ExportError(f"peft: the adapter speaks of modules by other names than {library.kind} has (it was "
                                  f"made for a model with a head, say); {_MERGED}")  # fmt: skip
            holder = seen(tower.encoder, places)
            options = adapter.options(peft, holder)
            state = values(peft, holder, options)
        else:
            options, state = _written(peft, tower, places, library)
        options.base_model_name_or_path, options.revision = name, revision
        if tower.modality == "text" and "" in places and not joint:  # of this type peft gives a model inputs of text
            options.task_type = options.task_type or peft.TaskType.FEATURE_EXTRACTION
        options.inference_mode = True
        options.save_pretrained(str(folder))
        state = {f"{AROUND}{key}": value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    def _named(self, tower: Tower) -> tuple[str, str | None]:
        """The base and its revision."""
        if self.base is not None:
            return self.base, None
        config: Any = tower.config.encoder.config
        return config.path, config.revision


def _problems(tower: Tower) -> list[str]:
    problems: list[str] = []
    if not isinstance(tower.adapter, ThroughPeft):
        kind = tower.config.adapter
        said = "it has no adapter kept apart" if kind is None else f"its adapter {kind.type!r} is none of that library"
        problems.append(said)
    if not all(hasattr(tower.config.encoder.config, field) for field in ("path", "revision")):
        problems.append("its network is not one of transformers, as hf-text's and hf-image's are")
    if tower.config.projector.type != "identity":
        problems.append(f"a folder of peft has no place for the projector {tower.config.projector.type!r}")
    return problems


def _base(tower: Tower, name: str, revision: str | None) -> tuple[Encoder, Library, bool]:
    """The tower's encoder as it is in the base, without an adapter; the library's model; whether it is joint."""
    try:
        found = HuggingFace(name, **({"revision": revision} if revision else {}))
        if found.code:
            raise ValueError("it needs code of its own repository, which is not run for this")
        chosen = tower.config.encoder
        config = dataclasses.replace(chosen.config, path=str(found.inner), revision=None)
        return dataclasses.replace(chosen, config=config).build(), Library.of(found.inner), found.joint
    except (ModelFolderError, ValueError) as error:
        raise ExportError(
            f"peft: the adapter is for {name!r}, which cannot be read to see that it is: {error}. Name the same "
            "model in another place with base=…"
        ) from error


def _compare(tower: Tower, plain: Encoder, name: str) -> None:
    assert tower.adapter is not None, "it was refused"
    theirs, mine = plain.state_dict(), tower.encoder.state_dict()
    own = tower.adapter.base_names(tower.encoder)
    trained = {now for now, was in own.items() if _trains(tower.adapter, was)}
    off = [
        was for now, was in own.items()
        if now not in trained and not (was in theirs and torch.equal(theirs[was].cpu(), mine[now].cpu()))
    ]  # fmt: skip
    if off:
        raise ExportError(
            f"peft: the adapter stands on other weights than those of {name!r} ({', '.join(off[:3])} differ): name the "
            f"model that it was trained on with base=…; or {_MERGED}"
        )


def _trains(adapter: Any, name: str) -> bool:
    """Whether a weight of the encoder's own trains beside the adapter."""
    if isinstance(adapter, PeftConfig):
        return adapter.config.options.get("bias", "none") != "none" and name.endswith("bias")
    return any(fnmatchcase(name, pattern) for pattern in adapter.config.also)


def _written(peft: Any, tower: Tower, places: dict[str, str], library: Library) -> tuple[Any, dict[str, Tensor]]:
    """Peft's config and the values of an adapter of ours, by the library's names."""
    adapter, encoder = tower.adapter, tower.encoder
    assert isinstance(adapter, ByPatterns), "it was refused"
    options = adapter.options(peft, {name: _called(name, places) for name, _ in layers(encoder)})
    state = values(peft, seen(encoder, places), options)
    own = {was: now for now, was in adapter.base_names(encoder).items()}
    also = matching(adapter.config.also, own, "adapter.also")
    if also:
        whole = sorted({_called(name.rpartition(".")[0], places) for name in also})
        adapted = [_called(name, places) for name, _ in layers(encoder)]
        taken = [name for name in library.modules if any(name.endswith(one) for one in whole)]
        if set(taken) != set(whole) or any(f"{layer}.".startswith(f"{one}.") for layer in adapted for one in whole):
            raise ExportError(
                f"peft: what trains in full (adapter.also: {', '.join(adapter.config.also)}) is not whole modules "
                f"that a folder of peft can name apart from others; {_MERGED}"
            )
        options.modules_to_save = whole
        parameters = encoder.state_dict()
        for name, now in own.items():
            module, _, last = name.rpartition(".")
            if _called(module, places) in whole:
                state[f"{_called(module, places)}.{last}"] = parameters[now]
    return options, state


def _called(name: str, places: dict[str, str]) -> str:
    """The library's name of a module of the encoder."""
    for theirs, place in places.items():
        if f"{name}.".startswith(f"{place}."):
            return f"{theirs}.{name.removeprefix(place).removeprefix('.')}".strip(".")
    raise ExportError(f"peft: {name} is not a part of the library's network, and has an adapter; {_MERGED}")
