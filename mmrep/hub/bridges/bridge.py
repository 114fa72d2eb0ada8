"""What a bridge is: from the name of a checkpoint to the config of a model, and the values that no encoder brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mmrep.config import parse
from mmrep.hub.fetch import ModelFolderError
from mmrep.model import Model
from mmrep.tower import TowerConfig


class Bridge:
    """One checkpoint of another library; registered under the scheme that names it, as in ``timm:resnet50``.

    Args:
        name: what stands after the scheme, or a local folder.
        pool: of the towers, instead of the checkpoint's own.
        **hub: ``revision, token, cache_dir, force_download, local_files_only``, as huggingface_hub's.

    Raises:
        ModelFolderError: no such checkpoint, or one that cannot be read; the message says why and what to do.
    """

    def __init__(self, name: str, *, pool: str | None = None, **hub: Any) -> None:
        self.name, self.pool, self.hub = name, pool, hub

    def config(self) -> dict[str, Any]:
        """The ``model`` part of a recipe that builds this model here: towers, dimension, temperatures."""
        raise NotImplementedError

    def named(self) -> dict[str, Any]:
        """The same by the checkpoint's public name: what a saved model's config says it began from."""
        return self.config()

    def fill(self, model: Model) -> None:
        """Set what the encoders do not bring: projectors, temperatures. The default sets nothing."""


def tower(encoder: dict[str, Any], pool: str | dict[str, Any]) -> dict[str, Any]:
    """A tower of an encoder that brings all that is learned."""
    return {"encoder": encoder, "pool": pool, "projector": "identity"}


def width(tower: dict[str, Any], files: Path | None) -> int:
    """The width of what a tower pools, which only its encoder knows: built without values, which costs little."""
    config = parse(TowerConfig, tower)
    with torch.device("meta"):
        encoder = config.encoder.build(files=files)
    native = encoder.pooled_width if config.pool.type == "native" else None
    return encoder.width if native is None else native


class Values:
    """The tensors of a folder's safetensors, by name, each read when it is asked for.

    Args:
        folder: with ``model.safetensors``, or an index and shards.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)

    def scalar(self, name: str) -> float:
        """The value of a tensor of one element."""
        return float(self[name].double())


@torch.no_grad()
def fill_linear(module: Any, values: Values, prefix: str) -> None:
    """Give a linear layer the values ``<prefix>.weight`` and ``<prefix>.bias``."""
    for name, parameter in module.named_parameters():
        value = values[f"{prefix}.{name}"]
        if value.shape != parameter.shape:
            raise ModelFolderError(f"{prefix}.{name} is {tuple(value.shape)}, and {tuple(parameter.shape)} is expected")
        parameter.copy_(value)
