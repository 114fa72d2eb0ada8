"""The states of all random number generators of a process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch

from mmrep.data.sample import stable_hash
from mmrep.training.checkpoint import Packet


def capture() -> Packet:
    """The states of python's, numpy's and torch's global generators (torch: CPU and the current CUDA device)."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = _numpy_state()
    tensors = {
        "torch.cpu": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors["torch.cuda"] = torch.cuda.get_rng_state()
    data: dict[str, Any] = {
        "python": [version, gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }
    return Packet(tensors, data)


def restore(state: Packet) -> None:
    """Set the generators to what `capture` saw."""
    version, gauss = state.data["python"]
    random.setstate((version, tuple(state.tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = state.data["numpy"]
    keys = state.tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state.tensors["torch.cpu"])
    if torch.cuda.is_available() and "torch.cuda" in state.tensors:
        torch.cuda.set_rng_state(state.tensors["torch.cuda"])


def reseed(*key: int) -> None:
    """Start the generators anew from some numbers: the same numbers, the same start."""
    seed = stable_hash("random numbers", *key)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)  # of every device


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Run the body without any effect on the global generators, so that watching a run does not change it."""
    python, legacy, cpu = random.getstate(), _numpy_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def _numpy_state() -> tuple[Any, ...]:
    """Of numpy's global generator, which libraries still draw from."""
    return cast("tuple[Any, ...]", np.random.get_state(legacy=True))  # noqa: NPY002
