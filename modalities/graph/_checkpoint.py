"""Weights of an encoder from a safetensors file."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn


def check_safetensors(path: str | None) -> None:
    """Refuse weights in any other format than safetensors.

    Raises:
        ValueError: another suffix.
    """
    if path is not None and not path.endswith(".safetensors"):
        raise ValueError(f"checkpoint {path!r} is not a .safetensors file; loading a pickle can run any program")


def load_checkpoint(encoder: nn.Module, path: Path) -> None:
    """Load an encoder's weights from its own state dict, or from that of a model with one tower that fits.

    Raises:
        ValueError: there is no such file, or it has no weights of this shape.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint: there is no file {str(path)!r}")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be loaded: {error}") from error
    own = {name: value.shape for name, value in encoder.state_dict().items()}
    first = next(iter(own))
    places = [key.removesuffix(first) for key in found if key == first or key.endswith(f".encoder.{first}")]
    fitting = [
        place for place in places
        if all(place + name in found and found[place + name].shape == shape for name, shape in own.items())
        and {key for key in found if key.startswith(place)} == {place + name for name in own}
    ]  # fmt: skip
    if len(fitting) != 1:
        lacking = [name for name in own if not any(key == name or key.endswith(f".{name}") for key in found)]
        why = (
            f"{len(fitting)} towers fit" if fitting else f"it lacks {', '.join(lacking[:3]) or 'weights of this shape'}"
        )
        raise ValueError(f"checkpoint {str(path)!r} is not one of this config's {type(encoder).__name__}: {why}")
    encoder.load_state_dict({name: found[fitting[0] + name] for name in own})
