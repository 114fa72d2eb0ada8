"""What test_tuple_parity runs on every rank: each case of each tuple loss and of DeCUR, against one process.

The batches, shards, wrappers and the measure of errors are those of `parity`.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmrep._gradients_measure import in_double
from mmrep.config import Component, component
from mmrep.data.batch import Batch
from mmrep.objectives.root import Root
from mmrep.registry import tuple_losses
from mmrep.training.collectives import world
from tests.objectives import parity
from tests.objectives.parity import FIELDS, FIRST, SHARDS, N

TUPLE = {"of": ["x", "y", "z"]}
STEPS = {"tuples": 3, "everything": 3}
"""Optimizer steps; one, where not said."""

CASES: dict[str, dict[str, Any]] = {
    "tuples": {},
    "an anchor": {"tuples": [{**TUPLE, "anchor": "y"}]},
    "some missing": {"missing": {("x", 2), ("y", 5), ("y", 9)}},
    "a modality missing on a rank (3.8c)": {"missing": {("y", i) for i in FIRST}},
    "no valid tuple on a rank (3.8b)": {"missing": {("xyz"[i % 3], i) for i in FIRST}},
    "no valid tuple anywhere (3.8b)": {"missing": {("xyz"[i % 3], i) for i in range(N)}},
    "a modality missing everywhere": {"missing": {("z", i) for i in range(N)}},
    "groups across ranks": {"group": True},
    "everything": {
        "tuples": [
            {**TUPLE, "anchor": "z", "weight": 0.7, "partial": "subsets"},
            {"of": ["z", "x", "y"], "temperature": "other", "partial": "subsets"},
        ],
        "group": True,
        "missing": {("y", 0), ("x", 4), ("z", 6), ("y", 9), ("x", 9), *(("y", i) for i in range(6, N))},
    },
}
NOTHING = ("no valid tuple anywhere (3.8b)", "a modality missing everywhere")
ALL = ("gram", "centroid")
"""One of complete tuples and one that takes others; what the cases differ in, each shares with the other losses."""
SOME = ("no valid tuple on a rank (3.8b)", "no valid tuple anywhere (3.8b)", "everything")
DECUR: dict[str, dict[str, Any]] = {
    "decur: two": {},
    "decur: three": {"between": ["x", "y", "z"], "common": 0.4},
    "decur: some missing": {"missing": {("x", 2), ("y", 5), ("y", 9)}},
    "decur: a modality missing on a rank (3.8c)": {"missing": {("y", i) for i in FIRST}},
    "decur: one row of a pair, no statistic": {"missing": {("y", i) for i in range(N - 1)}},
}


@cache
def variants() -> dict[str, Component]:
    """Every tuple loss of the library, and with each other value of each of its switches."""
    found: dict[str, Component] = {}
    for name in tuple_losses.names():
        cls = tuple_losses.get(name)
        if not cls.__module__.startswith("mmrep."):
            continue  # a test's own
        found[name] = component("tuple_losses", name)
        hints = typing.get_type_hints(cls.Config)
        for field in dataclasses.fields(cls.Config):
            hint = hints[field.name]
            values = (True, False) if hint is bool else typing.get_args(hint)
            if hint is bool or typing.get_origin(hint) is typing.Literal:
                for value in set(values) - {field.default}:
                    found[f"{name}, {field.name}={value}"] = component("tuple_losses", name, **{field.name: value})
    return found


@cache
def cases() -> dict[str, tuple[Component, dict[str, Any]]]:
    """Objective and settings by name: all cases of two losses, some of each, one of every other switch."""
    found: dict[str, tuple[Component, dict[str, Any]]] = {}
    for variant, loss in variants().items():
        for case, settings in CASES.items():
            if case != "everything" and ("," in variant or (loss.type not in ALL and case not in SOME)):
                continue
            chosen = settings.get("tuples", [TUPLE])
            if loss.cls.fields[0] == loss.cls.fields[1] or loss.type == "symile":  # no subsets, or none at one scale
                chosen = [{**t, "partial": "drop"} for t in chosen]
            group = bool(settings.get("group"))
            objective = component("objectives", "tuples", tuples=chosen, loss=loss, use_group=group)
            found[f"{variant}: {case}"] = objective, settings
    for case, settings in DECUR.items():
        of = {"between": settings.get("between", ["x", "y"]), "common": settings.get("common", 0.8)}
        found[case] = component("objectives", "decur", **of, redundancy=0.5), settings
    return found


def build(name: str) -> Root:
    """The root of a case, with the same weights whenever it is asked for."""
    objective, settings = cases()[name]
    temperatures = tuple(dict.fromkeys(t.get("temperature", "default") for t in settings.get("tuples", [TUPLE])))
    model = copy.deepcopy(parity._model(temperatures if objective.type == "tuples" else (), None))
    return Root(model, [objective], fields=FIELDS, views={})


def batch(rows: range, settings: dict[str, Any], step: int = 0) -> Batch:
    """As `parity.batch`, with a second reading of every value for DeCUR."""
    first, second = (parity.batch(rows, settings, step + 100 * view) for view in range(2))
    inputs = {f: [*values, *second.inputs[f]] for f, values in first.inputs.items()}
    return dataclasses.replace(first, inputs=inputs)


def gradients(wrap: Callable[[Root], Any], name: str, rows: range) -> dict[str, Tensor]:
    """Loss, gradient after one backward pass, and weights after some steps of SGD, by name; whole ones."""
    settings = cases()[name][1]
    root = build(name).to(torch.get_default_dtype())
    wrapped = wrap(root)
    trained = {k: p for k, p in root.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1, momentum=0.9)
    found: dict[str, Tensor] = {}
    for step in range(STEPS.get(name.partition(": ")[2], 1)):
        loss = wrapped(batch(rows, settings, step))["loss"]
        loss.backward()
        if step == 0:
            found["loss"] = world().sum(loss.detach().reshape(1)) / world().size
            for key, parameter in trained.items():
                assert parameter.grad is not None, f"{key} has no gradient"
                found[f"gradient {key}"] = parity._whole(parameter.grad)
        optimizer.step()
        root.after_optimizer_step()
        optimizer.zero_grad()
    return found | {f"weight {key}": parity._whole(p) for key, p in trained.items()}


@cache
def ways() -> list[tuple[str, str]]:
    """Wrapper and case: all under DDP, those that have most to go wrong under FSDP2."""
    found = [("ddp", name) for name in cases()]
    return found + [("fsdp2", name) for name in cases() if name.endswith(("everything", "(3.8c)", "three"))]


@parity.quick_registries()
def single() -> dict[str, Tensor]:
    """What one process with the whole batch finds."""
    found: dict[str, Tensor] = {}
    with in_double():
        for name in cases():
            whole = gradients(lambda root: root, name, range(N))
            found.update({f"{name}/{key}": value for key, value in whole.items()})
    return found


@parity.quick_registries()
def compare(reference: str) -> dict[str, Any]:
    """On every rank: the largest relative error of every kind of thing, by wrapper and case."""
    ranks = world()
    start = sum(SHARDS[ranks.size][: ranks.rank])
    rows = range(start, start + SHARDS[ranks.size][ranks.rank])
    whole = load_file(reference)
    out: dict[str, Any] = {"rows": len(rows), "world": ranks.size}
    for wrapper, name in ways():
        with in_double():
            found = gradients(parity.WRAPPERS[wrapper], name, rows)
        out[f"{wrapper}/{name}"] = parity.errors(found, {k: whole[f"{name}/{k}"] for k in found})
    return out
