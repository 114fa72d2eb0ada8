"""Embed raw values with a model: the function behind ``Model.encode``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmrep.encoder import BadSampleError
from mmrep.progress import progress
from mmrep.registry import near, require

if TYPE_CHECKING:
    from mmrep.model import Model, Tower
    from mmrep.tokens import Inputs

Raw = Any
Embeddings = NDArray[Any] | Tensor | dict[str, Any]
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
_PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


def encode(
    model: Model,
    inputs: Raw,
    modality: str | None = None,
    *,
    prompt_name: str | Sequence[str] | None = None,
    prompt: str | None = None,
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
    normalize_embeddings: bool | None = None,
    precision: Precision = "float32",
    truncate_dim: int | None = None,
    device: str | torch.device | None = None,
    convert_to_tensor: bool = False,
) -> Embeddings:
    """Embed raw values; the argument names are sentence-transformers'.

    Args:
        model: the model. It is put in eval mode and left in the mode it was in.
        inputs: one raw value (a string, path, picture, …), a list of them, or a dict of lists by tower or modality.
        modality: the tower or modality of a value or list. It is never guessed: it may be left out only for a dict or
            for a model with one tower.
        prompt_name: one of the prompts in the encoder's config, to put in front of every value. Of several names the
            first that the encoder has, and none is fine. In a dict it is for the towers that take prompts.
        prompt: the prompt itself; goes before a name.
        batch_size: values per forward pass. Values are sorted by length inside; the caller's order is kept.
        show_progress_bar: None = only on a terminal and for more than one batch.
        normalize_embeddings: None = as the model was trained; True / False forces unit length / raw length.
        precision: ``float32``, or a quantised form (needs ``pip install "mmrep[quantize]"``).
        truncate_dim: embeddings of so many dimensions, by the model's reduction to them if it has one, else the first;
            and normalise again if embeddings are normalised.
        device: where to run; None = where the model is.
        convert_to_tensor: return torch tensors instead of numpy arrays.

    Returns:
        float32 [n, dim] in the caller's order; [dim] for one value; a dict of arrays for a dict.

    Raises:
        ValueError: no modality for a model with several towers; a wrong option; a prompt where no tower takes any.
        UnknownNameError: no such modality or prompt.
        BadSampleError: a value cannot be read; the message has its position.
    """
    if precision not in _PRECISIONS:
        raise ValueError(
            f"precision {precision!r} is unknown{near(precision, _PRECISIONS)} One of: {', '.join(_PRECISIONS)}"
        )
    if truncate_dim is not None and not 1 <= truncate_dim <= model.dim:
        raise ValueError(f"truncate_dim must be between 1 and the model's {model.dim}; got {truncate_dim}")
    options: dict[str, Any] = {
        "batch_size": batch_size, "show_progress_bar": show_progress_bar, "normalize_embeddings": normalize_embeddings,
        "precision": precision, "truncate_dim": truncate_dim, "device": device, "convert_to_tensor": convert_to_tensor,
    }  # fmt: skip
    if isinstance(inputs, Mapping) and modality is None:
        by_field = cast("Mapping[str, Any]", inputs)
        # An unknown name, and a prompt that nobody takes, are refused before any work is done.
        able = [name for name in by_field if _takes_prompts(model.tower(name))]
        if by_field and not able:
            _refuse_prompt(", ".join(by_field), prompt_name, prompt)
        chosen = {"prompt_name": prompt_name, "prompt": prompt}
        return {
            name: encode(model, values, name, **options, **(chosen if name in able else {}))
            for name, values in by_field.items()
        }
    if modality is None:
        if len(model.towers) != 1:
            raise ValueError(
                f"this model reads {', '.join(model.towers)}: say which, "
                f"as encode(..., modality={next(iter(model.towers))!r})"
            )
        modality = next(iter(model.towers))
    tower = model.tower(modality)
    single = not isinstance(inputs, (list, tuple)) and not _is_batch_array(inputs)
    values = [inputs] if single else list(cast("Sequence[Any]", inputs))
    if prompt_name is not None or prompt is not None:
        if _takes_prompts(tower):
            prompted = cast(Any, tower.encoder).prompted
            values = [prompted(value, prompt_name, prompt) for value in values]
        else:
            _refuse_prompt(modality, prompt_name, prompt)
    normalize = tower.normalize if normalize_embeddings is None else normalize_embeddings

    home = model.device
    if device is not None:
        model.to(device)
    was_training = tower.training
    tower.eval()
    try:
        found = _encode(tower, values, batch_size, show_progress_bar, model.device, normalize)
    finally:
        tower.train(was_training)
        if device is not None:
            model.to(home)
    if truncate_dim is not None:
        with torch.no_grad():
            found = model.reduce(found.to(home), truncate_dim, normalize=normalize).cpu()
    result: Any = found
    if precision != "float32":
        quantization = require("sentence_transformers.util.quantization", "quantize")
        result = quantization.quantize_embeddings(found.numpy(), precision=precision)
        result = torch.from_numpy(result) if convert_to_tensor else result
    elif not convert_to_tensor:
        result = found.numpy()
    return result[0] if single else result


@torch.no_grad()
def encode_items(
    tower: Tower, items: Sequence[Inputs], batch_size: int, device: torch.device, normalize: bool
) -> Tensor:
    """Embed prepared items, sorted by length inside: float32 [n, dim] on the CPU, in the order of ``items``.

    The tower must be in eval mode.
    """
    out = torch.zeros(len(items), tower.dim)
    order = sorted(range(len(items)), key=lambda i: -tower.encoder.length(items[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = tower.encoder.collate([items[i] for i in rows])
        features = tower.features({k: v.to(device) for k, v in inputs.items()})
        projected = tower.projected(features).float()
        out[rows] = (F.normalize(projected, dim=-1) if normalize else projected).cpu()
    return out


def _encode(
    tower: Tower, values: Sequence[Any], batch_size: int, bar: bool | None, device: torch.device, normalize: bool
) -> Tensor:
    """float32 [n, dim] on the CPU, in the order of ``values``."""
    parts = [torch.zeros(0, tower.dim)]
    # Values are prepared window by window, so that a million paths never become a million decoded pictures.
    window = batch_size * 32
    show = bar if bar is not None else len(values) > batch_size
    with progress(total=len(values), desc="encode", unit="item", show=show) as shown:
        for start in range(0, len(values), window):
            items = [_prepare(tower, value, start + i) for i, value in enumerate(values[start : start + window])]
            parts.append(encode_items(tower, items, batch_size, device, normalize))
            shown.update(len(items))
    return torch.cat(parts)


def _prepare(tower: Tower, value: Any, position: int) -> Inputs:
    try:
        return tower.encoder.prepare(value)
    except BadSampleError as error:
        raise BadSampleError(error.cause, f"item {position} of the {tower.modality} inputs: {error}") from error


def _takes_prompts(tower: Tower) -> bool:
    """Whether an encoder has ``prompted(raw, name, prompt)``, which gives a raw value with its prompt."""
    return hasattr(tower.encoder, "prompted")


def _refuse_prompt(what: str, name: str | Sequence[str] | None, prompt: str | None) -> None:
    if prompt is not None or isinstance(name, str):
        raise ValueError(f"{what}: takes no prompts, and {prompt if name is None else name!r} was asked for")


def _is_batch_array(inputs: Any) -> bool:
    """Whether an array is a batch of strings rather than one raw value: a one-dimensional array of text."""
    return isinstance(inputs, np.ndarray) and inputs.dtype.kind in "UO" and inputs.ndim == 1
