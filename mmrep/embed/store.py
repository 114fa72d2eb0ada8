"""Features of frozen towers on disk, so that another run over the same data does not compute them again.

A folder holds one subfolder for each frozen encoder (named by a digest of its config, its pool and its weights), and in
it safetensors files of content keys and features. A content key is that of the *prepared* input, so a feature is found
again exactly where encoder, weights, preprocessing and data are all the same. Each file is written beside its place and
renamed into it; several processes and runs may share a folder.
"""

from __future__ import annotations

import json
import logging
import os
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmrep.config import dump
from mmrep.model import Tower

logger = logging.getLogger(__name__)
_KEY = 16


class FeatureStore:
    """Pooled features by tower and content key.

    Args:
        folder: made if it does not exist.
        every: features that are collected before a file is written; `flush` writes the rest.

    Attributes:
        bytes: size of the features that were read or put.
    """

    def __init__(self, folder: Path | str, every: int = 1024) -> None:
        self.folder = Path(folder).expanduser()
        self.every = every
        self.bytes = 0
        self._known: dict[int, tuple[Path, dict[bytes, Tensor]]] = {}
        self._fresh: dict[Path, dict[bytes, Tensor]] = {}

    def find(self, tower: Tower, key: bytes) -> Tensor | None:
        """The kept feature float32 [width], or None."""
        return self._of(tower)[1].get(key)

    def put(self, tower: Tower, key: bytes, feature: Tensor) -> None:
        """Keep a feature float32 [width]."""
        folder, known = self._of(tower)
        if key in known:
            return
        known[key] = feature
        self.bytes += feature.nbytes
        fresh = self._fresh.setdefault(folder, {})
        fresh[key] = feature
        if len(fresh) >= self.every:
            self._write(folder)

    def flush(self) -> None:
        """Write what has not been written yet."""
        for folder in list(self._fresh):
            self._write(folder)

    def _of(self, tower: Tower) -> tuple[Path, dict[bytes, Tensor]]:
        if id(tower) not in self._known:
            folder = self.folder / tower_digest(tower)
            self._known[id(tower)] = folder, (known := _read(folder))
            self.bytes += sum(feature.nbytes for feature in known.values())
        return self._known[id(tower)]

    def _write(self, folder: Path) -> None:
        fresh = self._fresh[folder]
        folder.mkdir(parents=True, exist_ok=True)
        keys = torch.frombuffer(bytearray(b"".join(fresh)), dtype=torch.uint8).view(len(fresh), _KEY)
        draft = folder / f".{uuid4().hex}"
        try:
            save_file({"keys": keys, "features": torch.stack(list(fresh.values()))}, draft)
            os.replace(draft, folder / f"{draft.name.removeprefix('.')}.safetensors")
        finally:
            draft.unlink(missing_ok=True)
        del self._fresh[folder]


def tower_digest(tower: Tower, *, projected: bool = False) -> str:
    """32 hexadecimal digits that identify what a tower's pooled features depend on beside its prepared input.

    Args:
        tower: any.
        projected: what its embeddings depend on, which is more.
    """
    digest = blake2b(digest_size=16)
    parts = {"encoder": dump(tower.config.encoder), "pool": dump(tower.config.pool)}
    if tower.config.adapter is not None:  # its weights are in the encoder's state, its alpha is not
        parts["adapter"] = dump(tower.config.adapter)
    modules = [tower.encoder, tower.pool]
    if projected:
        parts |= {"projector": dump(tower.config.projector), "dim": tower.dim, "normalize": tower.normalize}
        modules.append(tower.projector)
    digest.update(json.dumps(parts, sort_keys=True).encode())
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(folder: Path) -> dict[bytes, Tensor]:
    known: dict[bytes, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found = load_file(path)
            keys, features = found["keys"], found["features"]
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning("%s cannot be read (%s); its features are computed again", path, error)
            continue
        raw = keys.numpy().tobytes()
        known.update({raw[i * _KEY : (i + 1) * _KEY]: feature for i, feature in enumerate(features)})
    return known
