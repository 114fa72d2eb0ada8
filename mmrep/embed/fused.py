"""Embed whole samples with one of a model's fusions: ``Model.encode(..., fusion=...)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from mmrep.registry import near

if TYPE_CHECKING:
    from mmrep.embed.encode import Embeddings
    from mmrep.model import Model


@torch.no_grad()
def encode_fused(
    model: Model,
    inputs: Mapping[str, Sequence[Any]],
    fusion: str,
    *,
    normalize_embeddings: bool | None = None,
    truncate_dim: int | None = None,
    convert_to_tensor: bool = False,
    **options: Any,
) -> Embeddings:
    """One embedding for each sample, of whatever of it is present.

    Args:
        model: the model.
        inputs: by member of the fusion, the raw values of n samples, None where one is missing. A member that is left
            out is missing everywhere.
        fusion: name of one of the model's fusions.
        normalize_embeddings: None = as the model was trained; True forces unit length.
        truncate_dim: see `mmrep.embed.encode.encode`.
        convert_to_tensor: return a torch tensor instead of a numpy array.
        **options: as `mmrep.embed.encode.encode`, for the members.

    Returns:
        float32 [n, dim] in the caller's order.

    Raises:
        UnknownNameError: no such fusion.
        ValueError: no dict of lists, a name that is no member, lists of different lengths, or a sample with nothing.
    """
    if not isinstance(inputs, Mapping) or not inputs:
        raise ValueError("a fusion reads lists by member, as encode({'image': [...], 'caption': [...]}, fusion=...)")
    if options.get("precision", "float32") != "float32":
        raise ValueError(f"precision {options['precision']!r}: fused embeddings are float32; quantise the result")
    members = {} if fusion not in model.config.fusions else model.config.fusions[fusion].of
    for name in inputs if members else ():
        if name not in members:
            hint, known = near(name, members), ", ".join(members)
            raise ValueError(f"fusion {fusion!r} has no member {name!r}{hint} It has: {known}")
    lengths = {name: len(values) for name, values in inputs.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {n}" for name, n in lengths.items())
        raise ValueError(f"a fusion reads one value of each member a sample, None where it is missing; got {told}")
    given = {name: [value is not None for value in values] for name, values in inputs.items()}
    nothing = [i for i, row in enumerate(zip(*given.values(), strict=True)) if not any(row)]
    if nothing:
        raise ValueError(f"sample {nothing[0]} has none of {', '.join(inputs)}, so there is nothing to embed")
    was_training, n = model.training, next(iter(lengths.values()))
    present = {name: torch.tensor(rows, dtype=torch.bool, device=model.device) for name, rows in given.items()}
    embeddings: dict[str, torch.Tensor] = {}
    for name, values in inputs.items():
        found = torch.zeros(n, model.dim, device=model.device)
        have = [value for value in values if value is not None]
        if have and members:
            part = model.encode(have, members[name], convert_to_tensor=True, **options)
            found[present[name]] = torch.as_tensor(part).to(model.device)
        embeddings[name] = found
    model.eval()
    try:
        fused = model.fuse(fusion, embeddings, present).float().cpu()
    finally:
        model.train(was_training)
    normalize = model.config.normalize if normalize_embeddings is None else normalize_embeddings
    fused = F.normalize(fused, dim=-1) if normalize else fused
    if truncate_dim is not None:
        fused = model.reduce(fused.to(model.device), truncate_dim, normalize=normalize).cpu()
    return fused if convert_to_tensor else fused.numpy()
