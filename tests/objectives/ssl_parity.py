"""What test_ssl_parity runs on every rank: self-distillation, redundancy and masked objectives, against one process.

Shards and the measure of errors are those of `parity`; the weights compared are also the teacher's, centres and
running statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmrep._gradients_measure import in_double
from mmrep.config import component
from mmrep.data.batch import Batch
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
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
GUIDED = {"hidden": 9, "temperature": 0.5}
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
    "sct": ("cross-view", {"field": "x", "queue": 7, "head": {"hidden": 9}}, {}),
    "sct, a rank without": (
        "cross-view",
        {"field": "x", "queue": 30, "head": None, "reference_temperature": 0.01},
        {"missing": HERE},
    ),
    "self-guided": ("self-guided", {"field": "x", "sampled": 1, **GUIDED}, {}),
    "self-guided, a rank without": ("self-guided", {"field": "x", **GUIDED}, {"missing": HERE}),
    "attention": ("attention", {"field": "x"}, {}),
    "attention, a rank without": ("attention", {"field": "x"}, {"missing": HERE}),
    "masked": ("masked", {"field": "x", "target": {"type": "teacher"}}, {}),
    "masked, a rank without": ("masked", {"field": "x"}, {"missing": HERE}),
}

ELECTRA: dict[str, Any] = {"generator": {"width": 8, "depth": 1, "heads": 2}}
TSDAE: dict[str, Any] = {"decoder": {"depth": 1, "heads": 2}}

Make = Callable[[range, int], Batch]
"""Some rows of a step's global batch."""


def _toy(name: str) -> tuple[Root, Make]:
    kind, fields, settings = CASES[name]
    root = ssl_toys.build(component("objectives", kind, **fields), fields=_fields(name))
    return root, lambda rows, step: ssl_toys.batch(rows, fields="xy", views=3, step=step, **settings)


def _sequence(missing: frozenset[Any] = frozenset()) -> tuple[Root, Make]:
    how = {"views": [0, 1, 2], "condition": {"angle": 1}, "action": 4, "heads": 2, "depth": 1, "hidden": 7}
    root = ssl_toys.build(component("objectives", "sequence", field="x", **how))

    def batch(rows: range, step: int) -> Batch:
        made = ssl_toys.batch(rows, views=3, step=step, missing=missing)
        here = torch.tensor([i for i in rows if ("x", i) not in missing], dtype=torch.get_default_dtype())
        made.params = {"x": [{"angle": (view + 1) ** 2 * (here + step) / 9} for view in range(3)]} if len(here) else {}
        return made

    return root, batch


def _mixed(missing: frozenset[int] = frozenset()) -> tuple[Root, Make]:
    torch.manual_seed(0)
    vit = component("encoders", "image-vit", size=8, patch=4, width=12, depth=1, heads=2)
    model = Model(ModelConfig(dim=8, towers={"a": TowerConfig(encoder=vit)}, temperatures={}))
    predictor = {"type": "transformer", "width": 8, "depth": 1, "heads": 2}
    chosen = component("objectives", "mixed", field="x", predictor=predictor)

    def batch(rows: range, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randint(0, 256, (N, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return _rows(rows, {"pixels": pixels}, missing)

    return Root(model, [chosen], fields={"x": "a"}, views={}), batch


def _hybrid(missing: frozenset[int] = frozenset()) -> tuple[Root, Make]:
    vit = component("encoders", "image-vit", size=8, patch=2, width=12, depth=2, heads=2)

    def model(seed: int) -> Model:
        torch.manual_seed(seed)
        return Model(ModelConfig(dim=8, towers={"a": TowerConfig(encoder=vit)}, temperatures={}))

    teachers = {"relations": {"model": "saved", "layers": {1: 2}}, "features": {"model": "saved"}}
    chosen = component("objectives", "hybrid", field="x", drop=0.3, **teachers)
    with mock.patch("mmrep.objectives.hybrid.load", side_effect=[model(1), model(2)]):
        root = Root(model(0), [chosen], fields={"x": "a"}, views={})

    def batch(rows: range, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randint(0, 256, (N, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return _rows(rows, {"pixels": pixels}, missing)

    return root, batch


def _text(kind: str, missing: frozenset[int] = frozenset(), **fields: Any) -> tuple[Root, Make]:
    torch.manual_seed(0)
    encoder = component("encoders", "text-transformer", tokenizer="bytes", width=12, depth=1, heads=2, max_length=12)
    model = Model(ModelConfig(dim=8, towers={"a": TowerConfig(encoder=encoder)}, temperatures={}))
    chosen = component("objectives", kind, field="x", **fields)

    def batch(rows: range, step: int) -> Batch:
        texts = [f"{'abcde' * (i % 3)}{i} {step}" for i in range(N)]  # of several lengths: shards pad differently
        encoder = model.tower("a").encoder
        here = [i for i in rows if i not in missing]
        made = _rows(rows, {}, missing, whole=False)
        if here:  # a whole reading, and in front of it a damaged one, for `denoise`
            views = [[texts[i][1:] for i in here], [texts[i] for i in here]]
            made.inputs["x"] = [encoder.collate([encoder.prepare(text) for text in view]) for view in views]
        return made

    return Root(model, [chosen], fields={"x": "a"}, views={}), batch


def _rows(rows: range, inputs: dict[str, Tensor], missing: frozenset[int], *, whole: bool = True) -> Batch:
    here = [i for i in rows if i not in missing]
    some = {key: value[here] for key, value in inputs.items()} if whole else inputs
    return Batch(
        ids=[str(i) for i in rows], inputs={"x": [some]} if here else {}, seeds=torch.tensor(list(rows)) * 31 + 5,
        present={"x": torch.tensor([i not in missing for i in rows], dtype=torch.bool)},
    )  # fmt: skip


def _w2v_bert() -> tuple[Root, Make]:
    target = {"type": "gumbel-codes", "groups": 2, "codes": 4, "dim": 6, "width": 5}
    fields = {"input": "mask-token", "predictor": {"type": "tokenwise"}, "target": target, "negatives": "all"}
    root = ssl_toys.build(component("objectives", "w2v-bert", field="x", layer=1, **fields))
    return root, lambda rows, step: ssl_toys.batch(rows, step=step)


def _moved(*objectives: Any, missing: frozenset[Any] = frozenset(), began: str = "") -> tuple[Root, Make]:
    """A model that has moved since its objectives were built."""
    model = ssl_toys.build(fields={"x": "a", "y": "b"}).model.requires_grad_()
    model.began = frozenset(name for name in model.state_dict() if began in name) if began else None
    root = Root(model, objectives, fields={"x": "a", "y": "b"}, views={})
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in root.model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return root, lambda rows, step: ssl_toys.batch(rows, fields="xy", views=1, step=step, missing=missing)


def _anchor(missing: frozenset[Any] = frozenset(), **fields: Any) -> tuple[Root, Make]:
    return _moved(component("objectives", "anchor", fields=["x", "y"], **fields), missing=missing)


def _distill(missing: frozenset[Any] = frozenset(), reductions: tuple[int, ...] = ()) -> tuple[Root, Make]:
    teacher = ssl_toys.build(fields={"x": "a", "y": "b"}, dim=5, seed=8).model.eval()
    sources = [{"model": "saved", "column": column, "tower": tower} for column, tower in (("x", "a"), ("y", "b"))]
    losses = dict.fromkeys(("cosine", "mse", "similarity", "similarity-mse", "distance", "angle", "rank"), 1.0)
    chosen = component("objectives", "distill", student="x", teachers=sources, losses=losses, dims=[3, 4])
    with mock.patch("mmrep.objectives.distill.load", return_value=teacher):
        root = ssl_toys.build(chosen, reductions=reductions)

    def batch(rows: range, step: int) -> Batch:
        return _with_guests(root, ssl_toys.batch(rows, views=1, step=step, missing=missing), rows, step, missing)

    return root, batch


def _with_guests(root: Root, made: Batch, rows: range, step: int, missing: frozenset[Any]) -> Batch:
    """As the loader makes it, the columns of teachers read by them."""
    for name, guest in root.guests.items():
        here = [i for i in rows if (guest.column, i) not in missing]
        if here:
            encoder = guest.tower.encoder
            made.items[name] = [encoder.prepare(ssl_toys.raw(guest.column, i, step)) for i in here]
            made.items[name] = [
                {**x, "values": x["values"].to(next(guest.tower.parameters()).dtype)} for x in made.items[name]
            ]
            made.keys[name] = [f"{guest.column}{i}.{step}".encode() for i in here]
        made.present[name] = torch.tensor([(guest.column, i) not in missing for i in rows], dtype=torch.bool)
    return made


def _dependence(missing: frozenset[Any] = frozenset()) -> tuple[Root, Make]:
    teacher = ssl_toys.build(fields={"x": "a", "y": "b"}, dim=5, seed=8).model.eval()
    sources = [{"model": "saved", "column": "y", "tower": "b"}]
    mean = {"target": {"type": "content"}, "of": "mean", "weight": 0.5}
    loss = {"type": "vicreg", "invariance": 1.0, "variance": 1.0, "covariance": 0.5}
    chosen = component("objectives", "dependence", field="x", representations=[mean], teachers=sources, loss=loss)
    with mock.patch("mmrep.objectives.distill.load", return_value=teacher):
        root = ssl_toys.build(chosen)
    return root, lambda rows, step: _with_guests(
        root, ssl_toys.batch(rows, step=step, missing=missing), rows, step, missing
    )


def _l2_sp() -> tuple[Root, Make]:
    beside = component("objectives", "redundancy", fields=["x", "y"], views=[0], loss={"type": "vicreg"}, weight=0.1)
    return _moved(component("objectives", "l2-sp", alpha=0.3, beta=0.2), beside, began="encoder")


def _supervised(missing: frozenset[Any] = frozenset(), **fields: Any) -> tuple[Root, Make]:
    labels = ["red", "blue", None, "red", "green", "blue", "red", "green", "blue", "red", "lonely"]
    chosen = component(
        "objectives", "supervised", field="x", classes=["red", "blue", "green", "lonely"], dim=5, **fields
    )
    root = ssl_toys.build(chosen)

    def batch(rows: range, step: int) -> Batch:
        made = ssl_toys.batch(rows, views=1, step=step, missing=missing)
        made.labels = [labels[i] for i in rows]
        return made

    return root, batch


ROOTS: dict[str, Callable[[], tuple[Root, Make]]] = {
    "seq-jepa": _sequence,
    "seq-jepa, a rank without": lambda: _sequence(frozenset(HERE)),
    "mixed": _mixed,
    "mixed, a rank without": lambda: _mixed(frozenset(FIRST)),
    "mixed, some missing": lambda: _mixed(frozenset({0, 6, 7, 10})),
    "electra": lambda: _text("replaced", **ELECTRA),
    "electra, a rank without": lambda: _text("replaced", frozenset(FIRST), **ELECTRA),
    "tsdae": lambda: _text("denoise", **TSDAE),
    "tsdae, a rank without": lambda: _text("denoise", frozenset(FIRST), **TSDAE),
    "w2v-bert": _w2v_bert,
    "anchor": _anchor,
    "anchor, mse, a rank without": lambda: _anchor(frozenset(HERE), by="mse"),
    "anchor, similarity, some missing": lambda: _anchor(frozenset(SOME), by="similarity"),
    "l2-sp": _l2_sp,
    "hybrid, some missing": lambda: _hybrid(frozenset({0, 6, 7, 10})),
    "hybrid, a rank without": lambda: _hybrid(frozenset(FIRST)),
    "dependence": _dependence,
    "dependence, a rank without": lambda: _dependence(frozenset({*HERE, ("y", 9)})),
    "supervised": _supervised,
    "supcon, some missing": lambda: _supervised(frozenset(SOME), contrast=2.0, focal=False, of="embedding"),
    "core-tuning": lambda: _supervised(contrast=2.0, mix=True, temperature=0.5),
    "core-tuning, a rank without": lambda: _supervised(frozenset(HERE), contrast=2.0, mix=True, alpha=0.5),
    "distill": _distill,
    "distill, reduced, a rank without": lambda: _distill(frozenset({*HERE, ("y", 9)}), (2, 4)),
}
NAMES = [*CASES, *ROOTS]


@cache
def _fields(name: str) -> dict[str, str]:
    return {"x": "a", "y": "b"} if name.endswith("across") else {"x": "a"}


def _state(root: Any) -> dict[str, Tensor]:
    return {k: v for k, v in root.state_dict().items() if v.is_floating_point()}


def gradients(wrap: Any, name: str, rows: range) -> dict[str, Tensor]:
    """Loss, gradient after one backward pass, and all state after some steps of SGD, by name."""
    root, batch = ROOTS[name]() if name in ROOTS else _toy(name)
    root = ssl_toys.nudge(root.double()) if root.teacher is not None else root.double()
    wrapped = wrap(root)
    trained = {k: p for k, p in root.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1, momentum=0.9)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        loss = wrapped(batch(rows, step))["loss"]
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
        for name in NAMES:
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
        for name in NAMES:
            found = gradients(parity.ddp, name, rows)
            out[name] = parity.errors(found, {k: whole[f"{name}/{k}"] for k in found})
    return out
