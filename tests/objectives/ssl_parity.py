"""What test_ssl_parity runs on every rank: self-distillation, redundancy and masked objectives, against one process.

Shards and the measure of errors are those of `parity`; the weights compared are also the teacher's, centres and
running statistics.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmrep._gradients_measure import in_double
from mmrep.config import component
from mmrep.training.collectives import world
from tests.objectives import parity, ssl_toys
from tests.objectives.parity import FIRST, GROUP, SHARDS, N

STEPS = 2
HERE = {("x", i) for i in FIRST}
SOME = {("x", 2), ("x", 9), ("y", 5), ("y", 9)}
BOTH = {"fields": ["x", "y"], "views": [0]}
ONE = {"fields": ["x"]}
HEAD = {"prototypes": 7, "hidden": 9, "bottleneck": 5, "layers": 2}
PATCH = {"mask": {"type": "random", "ratio": 0.5}, "share": 0.7, "head": {**HEAD, "prototypes": 6}}
SINKHORN = {"by": "sinkhorn", "temperature": 0.5, "start": 0.5}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "byol": ("bootstrap", {**ONE, "predictor": {"hidden": 7}}, {}),
    "byol, a rank without": ("bootstrap", {**ONE, "predictor": {"hidden": 7}}, {"missing": HERE}),
    "simsiam": ("bootstrap", {**ONE, "target": "stop-gradient", "predictor": {"hidden": 7, "norm": "layer"}}, {}),
    "moco": ("bootstrap", {**ONE, "loss": "info-nce", "predictor": {"hidden": 7}}, {"group": GROUP}),
    "moco, a rank without": ("bootstrap", {**ONE, "loss": "info-nce"}, {"missing": HERE}),
    "tribyol": ("bootstrap", {**ONE, "views": [0, 1, 2], "predictor": None, "loss": "mse"}, {}),
    "bootstrap across": ("bootstrap", {**BOTH, "predictor": {"hidden": 7}}, {"missing": SOME}),
    "dino": ("dino", {"field": "x", "locals": [2], "head": HEAD}, {}),
    "dino, a rank without": ("dino", {"field": "x", "head": {**HEAD, "norm": "batch"}}, {"missing": HERE}),
    "dino, sinkhorn": ("dino", {"field": "x", "head": HEAD, "assign": SINKHORN}, {}),
    "ibot": ("dino", {"field": "x", "head": HEAD, "patch": PATCH}, {}),
    "ibot, sinkhorn, a rank without": (
        "dino",
        {"field": "x", "head": HEAD, "assign": SINKHORN, "patch": {**PATCH, "assign": SINKHORN, "head": None}},
        {"missing": HERE},
    ),
    "vicreg": ("redundancy", {**ONE, "loss": {"type": "vicreg"}}, {}),
    "vicreg across": ("redundancy", {**BOTH, "loss": {"type": "vicreg"}}, {"missing": SOME}),
    "vicreg of tokens": (
        "redundancy",
        {**ONE, "loss": {"type": "vicreg", "invariance": 0.0}, "of": "tokens"},
        {"missing": HERE},
    ),
    "vicreg of features": ("redundancy", {**ONE, "loss": {"type": "vicreg"}, "of": "pooled"}, {"missing": HERE}),
    "barlow": ("redundancy", {**ONE, "loss": {"type": "barlow"}}, {}),
    "barlow, a rank without": ("redundancy", {**ONE, "loss": {"type": "barlow"}}, {"missing": HERE}),
    "sigreg": ("redundancy", {**ONE, "views": [0, 1, 2], "loss": {"type": "sigreg", "slices": 8}}, {}),
    "sigreg, a rank without": ("redundancy", {**ONE, "loss": {"type": "sigreg", "slices": 8}}, {"missing": HERE}),
    "koleo": ("redundancy", {**ONE, "loss": {"type": "koleo"}}, {}),
    "koleo, a rank without": ("redundancy", {**ONE, "loss": {"type": "koleo"}}, {"missing": HERE}),
    "masked": ("masked", {"field": "x", "target": {"type": "teacher"}}, {}),
    "masked, a rank without": ("masked", {"field": "x"}, {"missing": HERE}),
}


@cache
def _fields(name: str) -> dict[str, str]:
    return {"x": "a", "y": "b"} if name.endswith("across") else {"x": "a"}


def _state(root: Any) -> dict[str, Tensor]:
    return {k: v for k, v in root.state_dict().items() if v.is_floating_point()}


def gradients(wrap: Any, name: str, rows: range) -> dict[str, Tensor]:
    """Loss, gradient after one backward pass, and all state after some steps of SGD, by name."""
    kind, fields, settings = CASES[name]
    root = ssl_toys.build(component("objectives", kind, **fields), fields=_fields(name)).double()
    root = ssl_toys.nudge(root) if root.teacher is not None else root
    wrapped = wrap(root)
    trained = {k: p for k, p in root.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1, momentum=0.9)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        loss = wrapped(ssl_toys.batch(rows, fields="xy", views=3, step=step, **settings))["loss"]
        loss.backward()
        if step == 0:
            found["loss"] = world().sum(loss.detach().reshape(1)) / world().size
            for key, parameter in trained.items():
                assert parameter.grad is not None, f"{key} has no gradient"
                found[f"gradient {key}"] = parameter.grad.clone()
        optimizer.step()
        root.after_optimizer_step()
        optimizer.zero_grad()
    return found | {f"weight {key}": value.detach().clone() for key, value in _state(root).items()}


@parity.quick_registries()
def single() -> dict[str, Tensor]:
    """What one process with the whole batch finds."""
    found: dict[str, Tensor] = {}
    with in_double():
        for name in CASES:
            found.update({f"{name}/{k}": v for k, v in gradients(lambda root: root, name, range(N)).items()})
    return found


@parity.quick_registries()
def compare(reference: str) -> dict[str, Any]:
    """On every rank: the largest relative error of every kind of thing, by case."""
    ranks = world()
    start = sum(SHARDS[ranks.size][: ranks.rank])
    rows = range(start, start + SHARDS[ranks.size][ranks.rank])
    whole = load_file(reference)
    out: dict[str, Any] = {"rows": len(rows), "world": ranks.size}
    with in_double():
        for name in CASES:
            found = gradients(parity.ddp, name, rows)
            out[name] = parity.errors(found, {k: whole[f"{name}/{k}"] for k in found})
    return out
