"""What test_parity runs on every rank: each case of each loss, wrapped by DDP and by FSDP2, against one process.

The one process is the test itself, which has no process group; ranks compare with what it saved.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mmrep._gradients_measure import in_double
from mmrep.config import Component, component
from mmrep.data.batch import Batch
from mmrep.model import Model, ModelConfig, TemperatureConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.registry import Registry, losses
from mmrep.training.collectives import world
from tests.toys import ToyConfig, ToyEncoder

N = 11
SHARDS = {1: (11,), 2: (7, 4), 4: (5, 0, 4, 2)}
FIELDS = {"x": "a", "y": "b", "z": "b", "w": "frozen"}
GROUP = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])  # on 2 and on 4 ranks, groups 3 and 5 span ranks
FIRST = range(7)  # the first rank of 2, and the first two and a half of 4
PAIR = {"between": ["x", "y"]}
STEPS = {"pairs": 3, "everything": 3}
"""Optimizer steps; one, where not said."""

CASES: dict[str, dict[str, Any]] = {
    "pairs": {},
    "some missing": {"missing": {("x", 2), ("y", 5), ("y", 9)}},
    "a modality missing on a rank (3.8c)": {"missing": {("y", i) for i in FIRST}},
    "no valid pair on a rank (3.8b)": {"missing": {("xy"[i % 2], i) for i in FIRST}},
    "no valid pair anywhere (3.8b)": {"missing": {("xy"[i % 2], i) for i in range(N)}},
    "a modality missing everywhere": {"missing": {("y", i) for i in range(N)}},
    "groups across ranks": {"group": True},
    "hard negatives (3.3b)": {"pairs": [{**PAIR, "negatives": "z"}], "missing": {("z", i) for i in FIRST}},
    "two pairs": {"pairs": [{**PAIR, "weight": 0.7}, {"between": ["x", "z"], "weight": 2.0, "temperature": "other"}]},
    "everything": {
        "pairs": [{**PAIR, "weight": 0.7, "negatives": "z"}, {"between": ["z", "x"], "temperature": "other"}],
        "group": True,
        "missing": {("y", 0), ("x", 4), ("z", 6), *(("y", i) for i in range(8, N))},
    },
    "soft targets": {"pairs": [{**PAIR, "soft": "w"}], "missing": {("w", 1), ("x", 3)}},
}
NOTHING = ("no valid pair anywhere (3.8b)", "a modality missing everywhere")


@cache
def variants() -> dict[str, Component]:
    """Every loss of the library, and with each other value of each of its switches: a later loss covers itself."""
    found: dict[str, Component] = {}
    for name in losses.names():
        cls = losses.get(name)
        if not cls.__module__.startswith("mmrep."):
            continue  # a test's own
        found[name] = component("losses", name)
        hints = typing.get_type_hints(cls.Config)
        for field in dataclasses.fields(cls.Config):
            hint = hints[field.name]
            values = (True, False) if hint is bool else typing.get_args(hint)
            if hint is bool or typing.get_origin(hint) is typing.Literal:
                for value in set(values) - {field.default}:
                    found[f"{name}, {field.name}={value}"] = component("losses", name, **{field.name: value})
    return found


@cache
def cases() -> dict[str, tuple[Component, dict[str, Any]]]:
    """Loss and settings by name: all cases of each loss and each way to exchange, one case of its other switches."""
    found: dict[str, tuple[Component, dict[str, Any]]] = {}
    for variant, loss in variants().items():
        takes_soft = loss.cls.takes_soft
        for case, settings in CASES.items():
            if (case == "everything" or "," not in variant or "exchange" in variant) and (
                case != "soft targets" or takes_soft
            ):
                found[f"{variant}: {case}"] = (loss, settings)
    return found


@cache
def _model(temperatures: tuple[str, ...], bias: float | None) -> Model:
    toy = component("encoders", "toy")
    mlp = component("projectors", "mlp")
    towers = {
        "a": TowerConfig(encoder=toy, pool=component("pools", "attention"), projector=mlp),
        "b": TowerConfig(encoder=toy, projector=component("projectors", "linear", bias=True)),
        "frozen": TowerConfig(encoder=toy, projector=mlp, frozen=True),
    }
    scales = {name: TemperatureConfig(scale=4.0 + i, bias=bias) for i, name in enumerate(temperatures)}
    torch.manual_seed(5)
    model = Model(ModelConfig(dim=5, towers=towers, temperatures=scales))
    model.tower("frozen").requires_grad_(False)  # its projector too: nobody asks for its embedding
    return model


@cache
def _root(name: str) -> Root:
    loss, settings = cases()[name]
    pairs = settings.get("pairs", [PAIR])
    temperatures = tuple(dict.fromkeys(pair.get("temperature", "default") for pair in pairs))
    model = _model(temperatures, -3.0 if loss.cls.needs_bias else None)
    chosen = component("objectives", "contrastive", pairs=pairs, loss=loss, use_group=bool(settings.get("group")))
    return Root(copy.deepcopy(model), [chosen], fields=FIELDS, views={})


def build(name: str) -> Root:
    """The root of a case, with the same weights whenever it is asked for."""
    return copy.deepcopy(_root(name))


def batch(rows: range, settings: dict[str, Any], step: int = 0) -> Batch:
    """Rows of a step's global batch, collated as a rank would."""
    encoder = ToyEncoder(ToyConfig())
    generator = torch.Generator().manual_seed(step)
    missing: set[tuple[str, int]] = settings.get("missing", set())
    raw = {f: [torch.randn(1 + i % 3, generator=generator).tolist() for i in range(N)] for f in FIELDS}
    present = {f: [(f, i) not in missing for i in rows] for f in FIELDS}
    items = {f: [encoder.prepare(raw[f][i]) for i in rows if (f, i) not in missing] for f in FIELDS}
    dtype = torch.get_default_dtype()
    inputs = {f: [encoder.collate(found)] for f, found in items.items() if found}
    for (values,) in inputs.values():
        values["values"] = values["values"].to(dtype)
    return Batch(
        ids=[str(i) for i in rows],
        inputs=inputs,
        present={f: torch.tensor(p, dtype=torch.bool) for f, p in present.items()},
        seeds=torch.tensor(list(rows), dtype=torch.long),
        group=GROUP[rows.start : rows.stop] if settings.get("group") else None,
    )


def ddp(root: Root) -> Any:
    return DistributedDataParallel(root, gradient_as_bucket_view=True)


def fsdp2(root: Root) -> Any:
    """Shards towers and root, but no frozen tower.

    FSDP gathers weights around a module's ``forward`` alone, while soft targets ask a frozen tower for ``features``,
    and only on processes that have such samples.
    """
    mesh = init_device_mesh("cpu", (world().size,))
    frozen = root.model.tower("frozen")
    for tower in root.model.towers.values():
        if tower is not frozen:
            fully_shard(tower, mesh=mesh)
    fully_shard(root, mesh=mesh, ignored_params=set(frozen.parameters()))
    return root


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
                found[f"gradient {key}"] = _whole(parameter.grad)
        optimizer.step()
        root.after_optimizer_step()
        optimizer.zero_grad()
    return found | {f"weight {key}": _whole(p) for key, p in trained.items()}


def _whole(value: Any) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


PRECISION: dict[str, Callable[[], Any]] = {"float64": in_double, "float32": nullcontext}
WRAPPERS: dict[str, Callable[[Root], Any]] = {"ddp": ddp, "fsdp2": fsdp2}


@cache
def ways() -> list[tuple[str, str, str]]:
    """Precision, wrapper, case: all under DDP in float64, a part in other ways: each second is paid 7 times."""
    found = [("float64", "ddp", name) for name in cases()]
    found += [("float64", "fsdp2", name) for name in cases() if "exchange" not in name or "everything" in name]
    return found + [("float32", "ddp", name) for name in cases() if name.endswith(("pairs", "everything"))]


def quick_registries() -> Any:
    """Installed packages are looked through once, not at every name: 20 ms each."""
    return mock.patch.object(Registry, "_entry_points", cache(Registry._entry_points))


@quick_registries()
def single() -> dict[str, Tensor]:
    """What one process with the whole batch finds."""
    found: dict[str, Tensor] = {}
    for precision, context in PRECISION.items():
        for name in cases():
            with context():
                whole = gradients(lambda root: root, name, range(N))
            found.update({f"{precision}/{name}/{key}": value for key, value in whole.items()})
    return found


@quick_registries()
def compare(reference: str) -> dict[str, Any]:
    """On every rank: the largest relative error of every kind of thing, by precision, wrapper and case."""
    ranks = world()
    start = sum(SHARDS[ranks.size][: ranks.rank])
    rows = range(start, start + SHARDS[ranks.size][ranks.rank])
    whole = load_file(reference)
    out: dict[str, Any] = {"rows": len(rows), "world": ranks.size}
    for precision, wrapper, name in ways():
        with PRECISION[precision]():
            found = gradients(WRAPPERS[wrapper], name, rows)
        out[f"{precision}/{wrapper}/{name}"] = errors(found, {k: whole[f"{precision}/{name}/{k}"] for k in found})
    return out


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of the loss, of a gradient and of a weight; relative to the largest entry of that tensor."""
    out: dict[str, float] = {}
    floors = {
        kind: 1e-2 * max((float(v.abs().max()) for k, v in expected.items() if k.startswith(kind)), default=0)
        for kind in ("loss", "gradient", "weight")
    }
    for name, value in found.items():
        kind = name.partition(" ")[0]
        assert value.dtype == expected[name].dtype, name
        assert value.isfinite().all(), name
        gap, size = float((value - expected[name]).abs().max()), float(expected[name].abs().max())
        out[kind] = max(out.get(kind, 0.0), gap / max(size, floors[kind], 1e-12))
    return out
