"""Towers as ONNX graphs, from prepared inputs to embeddings."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.hub.exports.export import Export, ExportError
from mmrep.registry import require
from mmrep.tokens import Inputs
from mmrep.tower import Tower

logger = logging.getLogger(__name__)
_TOLERANCE = 1e-4
_OPSET = 18


class Onnx(Export):
    """One ``<tower>.onnx`` for each tower, and ``inputs.json``: names, dtypes and shapes of its inputs.

    A graph begins with what `Encoder.prepare` and `Encoder.collate` make, and ends with the embedding. Sizes that
    differ between batches are free (null in ``inputs.json``): the number of samples, and the lengths that an encoder
    pads to. torch has two ways to a graph, which fail at different networks: both are tried, and each graph is run by
    onnxruntime on batches of other sizes and compared with the tower before it counts.
    """

    def write(self, folder: Path) -> None:
        """See `Export.write`."""
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, "onnx")
        names = [self.only] if self.only is not None else list(self.model.config.towers)
        document: dict[str, Any] = {}
        for name in names:
            document[name] = _write(self.model.tower(name), name, folder / f"{name}.onnx")
        (folder / "inputs.json").write_text(json.dumps(document, indent=1) + "\n")


class _Graph(nn.Module):
    """A tower of tensors in a fixed order, since a graph's inputs have no keys."""

    def __init__(self, tower: Tower, names: list[str]) -> None:
        super().__init__()
        self.tower, self.names = tower, names

    def forward(self, *values: Tensor) -> Tensor:
        return self.tower(dict(zip(self.names, values, strict=True)))


def _write(tower: Tower, name: str, path: Path) -> dict[str, Any]:
    """Write a graph that was seen to be right; its inputs, described."""
    items = [tower.encoder.prepare(raw) for raw in tower.encoder.examples(9, seed=0)]
    shortest = min(items, key=tower.encoder.length)
    batches = [_batch(tower, some) for some in (items[:5], items, [shortest] * 3)]
    inputs = batches[0]
    free = {
        key: [axis for axis in range(value.ndim) if len({batch[key].shape[axis] for batch in batches}) > 1]
        for key, value in inputs.items()
    }
    graph = _Graph(tower, list(inputs)).eval()
    reasons: list[str] = []
    for way in (_captured, _traced):
        try:
            # torch's tracer prints the whole graph where it fails.
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                way(graph, inputs, free, path)
            session = _session(path)
            read = [one.name for one in session.get_inputs()]  # what nothing reads is not in the graph
            worst = max(_difference(session, read, tower, batch) for batch in batches)
        except Exception as error:  # of torch's exporters and of onnxruntime, which raise whatever they like
            reasons.append(f"{way.__name__.strip('_')}: {' '.join(str(_first(error)).split())[:200]}")
            continue
        if worst < _TOLERANCE:
            logger.info("tower %s: %s, differs by %.1e at most", name, way.__name__.strip("_"), worst)
            return {key: _described(inputs[key], free[key]) for key in read}
        reasons.append(f"{way.__name__.strip('_')}: its embeddings differ by {worst:.1e} on a batch of another size")
    raise ExportError(f"tower {name!r} ({tower.config.encoder.type}) cannot be written as ONNX: {'; '.join(reasons)}")


def _first(error: BaseException) -> BaseException:
    """What an error came from: torch's exporters say last what a person might do about it, and not what it is."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _captured(graph: nn.Module, inputs: dict[str, Tensor], free: dict[str, list[int]], path: Path) -> None:
    """By torch.export."""
    shapes = tuple({axis: torch.export.Dim.DYNAMIC for axis in free[key]} for key in inputs)
    program: Any = torch.onnx.export(
        graph, tuple(inputs.values()), dynamo=True, input_names=list(inputs), output_names=["embedding"],
        dynamic_shapes=(shapes,), verbose=False,
    )  # fmt: skip
    program.save(str(path))


def _traced(graph: nn.Module, inputs: dict[str, Tensor], free: dict[str, list[int]], path: Path) -> None:
    """By tracing, which keeps the branches that the example took."""
    axes = {key: {axis: f"{key}_{axis}" for axis in free[key]} for key in inputs}
    write: Callable[..., Any] = torch.onnx.export
    write(
        graph, tuple(inputs.values()), str(path), dynamo=False, input_names=list(inputs), output_names=["embedding"],
        dynamic_axes=axes, opset_version=_OPSET,
    )  # fmt: skip


def _session(path: Path) -> Any:
    runtime: Any = require("onnxruntime", "onnx")
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@torch.no_grad()
def _difference(session: Any, read: list[str], tower: Tower, batch: Inputs) -> float:
    """The largest difference between the graph's embeddings and the tower's."""
    (found,) = session.run(None, {key: batch[key].cpu().numpy() for key in read})
    return float((torch.from_numpy(found) - tower(batch).cpu()).abs().max())


def _batch(tower: Tower, items: list[Inputs]) -> Inputs:
    device = next(tower.parameters()).device
    return {key: value.to(device) for key, value in tower.encoder.collate(items).items()}


def _described(value: Tensor, free: list[int]) -> dict[str, Any]:
    shape = [None if axis in free else size for axis, size in enumerate(value.shape)]
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
