"""Forward and backward of a batch that comes in parts, through the wrapper of the engine."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mmrep.data.batch import Batch
from mmrep.training.collectives import world


def forward_backward(root: Any, engine: Accelerator, batch: Batch) -> dict[str, Tensor]:
    """Leave the gradient of the batch in the parameters, summed over processes once.

    Args:
        root: the root module as the engine wrapped it.
        engine: the engine.
        batch: on the device, with parts on all processes or on none.

    Returns:
        What the root reports, detached: ``loss`` and its parts.
    """
    passes = _passes(engine, batch) if batch.parts else 0
    if passes <= 1:  # one part is the whole
        report: dict[str, Tensor] = root(batch.parts[0] if passes else batch)
        engine.backward(report["loss"])
        return {name: value.detach() for name, value in report.items()}
    with engine.no_sync(root):
        report = root(batch, passes=passes)
        if report["loss"].requires_grad:
            engine.backward(report["loss"])
    report = {name: value.detach() for name, value in report.items()}
    scale = 1.0 if engine.scaler is None else engine.scaler.get_scale()
    for number in range(passes):
        # The gradients of all passes are added up here; the last one reduces the sum.
        with nullcontext() if number == passes - 1 else engine.no_sync(root):
            part: dict[str, Tensor] = root(batch, replay=number, scale=scale)
            engine.backward(part.pop("surrogate"))
        for name, value in part.items():
            report[name] = report[name] + value.detach() if name in report else value.detach()
    return report


def _passes(engine: Accelerator, batch: Batch) -> int:
    """Number of parts, the largest of all processes: FSDP gathers weights in every pass, so all make equally many."""
    if engine.num_processes == 1:
        return len(batch.parts)
    return int(world().gather(torch.tensor([len(batch.parts)], device=engine.device)).max())
