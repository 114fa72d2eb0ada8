"""Checkpoints: folders that are whole or not there.

A checkpoint is a folder ``step-00000100`` of safetensors files, a ``state.json`` and a ``manifest.json`` with the size
and the CRC-32 of each. It is written under a temporary name, flushed to the disk, and renamed: a process that is
killed at any moment leaves the checkpoints before it, or those and the new one. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmrep.training.errors import CheckpointError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST = "manifest.json"
_STATE = "state.json"
_TEMPORARY = ".tmp-"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Packet:
    """Tensors with JSON data beside them: one safetensors file.

    Attributes:
        tensors: by name.
        data: anything that JSON can hold.
    """

    tensors: Mapping[str, Tensor]
    data: Any = None

    def to_bytes(self) -> bytes:
        """The safetensors file. Tensors that share memory are written once."""
        first: dict[tuple[Any, ...], str] = {}
        aliases: dict[str, str] = {}
        unique: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
            if tensor.numel() and first.setdefault(key, name) != name:
                aliases[name] = first[key]
            else:
                unique[name] = tensor.detach().cpu().contiguous()
        metadata = {"data": json.dumps(self.data), "aliases": json.dumps(aliases)}
        return safetensors.torch.save(unique, metadata=metadata)

    def part(self, name: str) -> Packet:
        """One of several packets that were put into this one: tensors ``name/...`` and ``data[name]``."""
        own = {key.removeprefix(f"{name}/"): t for key, t in self.tensors.items() if key.startswith(f"{name}/")}
        return Packet(own, self.data[name])

    @classmethod
    def read(cls, path: Path) -> Packet:
        """Read what `to_bytes` wrote."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        tensors.update({name: tensors[source] for name, source in json.loads(metadata["aliases"]).items()})
        return cls(tensors, json.loads(metadata["data"]))


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of this step is, or will be."""
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in ``folder``, whole or damaged, in ascending order."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for entry in folder.iterdir() if (m := _NAME.fullmatch(entry.name)))


def save(
    folder: Path, step: int, packets: Mapping[str, Packet | bytes], state: Mapping[str, Any], *, keep: int = 3
) -> Path:
    """Write the checkpoint of ``step`` and remove all but the newest ``keep``.

    If a whole checkpoint of this step exists it is left as it is, since steps are deterministic.

    Args:
        folder: where checkpoints live; created if missing.
        step: optimizer steps taken.
        packets: by file name without ``.safetensors``; bytes are written as they are.
        state: plain data for ``state.json``.
        keep: how many checkpoints stay, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it could not be written (disk full, no permission). Older checkpoints stand.
    """
    target = path_of(folder, step)
    temporary = folder / f"{_TEMPORARY}{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        if target.exists():
            try:
                verify(target)
            except CheckpointError as error:
                logger.warning("replacing a damaged checkpoint: %s", error)
                _discard(target)
            else:
                return target
        temporary.mkdir()
        manifest: dict[str, dict[str, int]] = {}
        for name, packet in packets.items():
            content = packet if isinstance(packet, bytes) else packet.to_bytes()
            manifest[f"{name}.safetensors"] = _write(temporary / f"{name}.safetensors", content)
        manifest[_STATE] = _write(temporary / _STATE, _json({"step": step, **state}))
        _write(temporary / _MANIFEST, _json({"version": 1, "files": manifest}))
        _sync_folder(temporary)
        temporary.rename(target)
        _sync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise failure(folder, step, error) from error
    try:
        for old in steps(folder)[:-keep]:
            _discard(path_of(folder, old))
    except OSError as error:  # the new one is whole all the same
        logger.warning("could not remove an old checkpoint in %s: %s", folder, error)
    return target


def failure(folder: Path, step: int, error: Exception) -> CheckpointError:
    """What a failed save says: of which step, where, why, and which checkpoint stands."""
    last = latest(folder)
    stands = f"{last} stands" if last else "there is no earlier one"
    return CheckpointError(f"could not save the checkpoint of step {step} in {folder}: {error}; {stands}")


def verify(path: Path) -> None:
    """Check that a checkpoint is whole: every file of its manifest, with its size and CRC-32.

    Raises:
        CheckpointError: it is not; the message says which file, and how.
    """
    try:
        files = json.loads((path / _MANIFEST).read_bytes())["files"]
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(f"{path / name} has {size} bytes instead of {expected['bytes']}")
            if _crc(path / name) != expected["crc32"]:
                raise CheckpointError(f"{path / name} was altered: its CRC-32 is not the manifest's")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error!r}") from error


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, or None. Damaged ones are skipped, and why is logged."""
    for step in reversed(steps(folder)):
        path = path_of(folder, step)
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
            continue
        return path
    return None


def load_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint."""
    return json.loads((path / _STATE).read_bytes())


def load_packet(path: Path, name: str) -> Packet:
    """One of the packets of a checkpoint."""
    return Packet.read(path / f"{name}.safetensors")


def _json(data: Any) -> bytes:
    return json.dumps(data, indent=1).encode()


def _write(path: Path, content: bytes) -> dict[str, int]:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _sync_folder(path: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open a folder, and flushes its entries itself
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves no folder of its name."""
    hidden = path.with_name(f"{_TEMPORARY}old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _sweep(folder: Path) -> None:
    """Remove what killed runs left half-written."""
    for entry in folder.iterdir():
        if entry.name.startswith(_TEMPORARY):
            shutil.rmtree(entry)
