"""Features of frozen towers, kept by content, so that each distinct input is encoded once in a run."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from mmrep.embed.store import FeatureStore
from mmrep.model import Tower
from mmrep.tokens import Inputs


def content_key(item: Inputs) -> bytes:
    """16 bytes that identify a prepared item by its content."""
    digest = blake2b(digest_size=16)
    for name in sorted(item):
        value = item[name].contiguous()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.digest()


class Memo:
    """Pooled features by tower and content key, on the CPU.

    How a feature is rounded depends a little on the samples it was encoded together with. So a run that is resumed must
    find the features that it had, for which there is the store: with `flush` at every checkpoint it is exact.

    Args:
        batch_size: how many missing items are encoded at a time.
        max_bytes: the memory it may take; past it nothing more is kept (and everything still works). None = no limit.
        store: where features are kept from run to run; None = nowhere.
    """

    def __init__(
        self, batch_size: int = 64, max_bytes: int | None = 2 << 30, store: FeatureStore | None = None
    ) -> None:
        self.batch_size = batch_size
        self.max_bytes = max_bytes
        self.store = store
        self._kept: dict[tuple[int, bytes], Tensor] = {}
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Memory that the features take."""
        return self._bytes if self.store is None else self.store.bytes

    @torch.no_grad()
    def features(self, tower: Tower, keys: Sequence[bytes], items: Sequence[Inputs], device: torch.device) -> Tensor:
        """Pooled features float32 [n, width] of ``items``, computing only those that are not kept yet."""
        found: dict[bytes, Tensor] = {}
        fresh: dict[bytes, Inputs] = {}
        for key, item in zip(keys, items, strict=True):
            if (kept := self._find(tower, key)) is not None:
                found[key] = kept
            else:
                fresh[key] = item
        order = sorted(fresh, key=lambda k: tower.encoder.length(fresh[k]))
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            inputs = tower.encoder.collate([fresh[k] for k in chunk])
            # fp32: these features are kept, so they must not depend on the autocast state of the step that met them.
            with torch.autocast(device.type, enabled=False):
                values = tower.features({k: v.to(device) for k, v in inputs.items()}).float().cpu()
            for key, value in zip(chunk, values, strict=True):
                found[key] = value
                self._keep(tower, key, value)
        return torch.stack([found[k] for k in keys]).to(device)

    def flush(self) -> None:
        """Write to the store what is not there yet."""
        if self.store is not None:
            self.store.flush()

    def _find(self, tower: Tower, key: bytes) -> Tensor | None:
        return self._kept.get((id(tower), key)) if self.store is None else self.store.find(tower, key)

    def _keep(self, tower: Tower, key: bytes, value: Tensor) -> None:
        if self.max_bytes is not None and self.bytes + value.nbytes > self.max_bytes:
            return
        if self.store is None:
            self._kept[id(tower), key] = value.clone()
            self._bytes += value.nbytes
        else:
            self.store.put(tower, key, value.clone())
