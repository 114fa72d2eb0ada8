"""Distillation from saved models: targets, maps, widths, guests that read the data and are saved nowhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import mmrep
from mmrep.config import ConfigError, component
from mmrep.hub.fetch import ModelFolderError
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.recipe import read_recipe
from mmrep.run import Run, open_run
from mmrep.training.errors import ResumeError
from tests.losses.test_distillation import twin
from tests.objectives import ssl_toys
from tests.world import make_world, write_recipe

N = 7


def model(dim=6, seed=0, width=8, towers=("a",), **fields):
    torch.manual_seed(seed)
    made = TowerConfig(encoder=component("encoders", "toy-ssl", width=width), projector=component("projectors", "mlp"))
    return Model(ModelConfig(dim=dim, towers=dict.fromkeys(towers, made), temperatures={}, **fields))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two teachers: one of 5 dimensions, and one of 4 with two towers."""
    folder = tmp_path_factory.mktemp("teachers")
    model(5, 1, 12).save_pretrained(folder / "one")
    model(4, 2, 8, ("p", "q")).save_pretrained(folder / "two")
    return folder


def root(saved, *, dim=6, reductions=(), **fields):
    teachers = fields.pop("teachers", [{"model": "one", "column": "x"}, {"model": "two", "column": "y", "tower": "q"}])
    teachers = [{**t, "model": str(saved / t["model"])} for t in teachers]
    chosen = component("objectives", "distill", **{"student": "x", "teachers": teachers, **fields})
    return Root(model(dim, reductions=reductions), [chosen], fields={"x": "a"}, views={})


def batch(built, missing=()):
    """As the loader makes it, the columns x and y read by whoever wants them."""
    made = ssl_toys.batch(range(N), fields="x", views=1, missing=missing)
    for name, guest in built.guests.items():
        here = [i for i in range(N) if (guest.column, i) not in missing]
        encoder = guest.tower.encoder
        items = [encoder.prepare(ssl_toys.raw(guest.column, i)) for i in here]
        if items:
            made.items[name], made.keys[name] = items, [f"{guest.column}{i}".encode() for i in here]
        made.present[name] = torch.tensor([(guest.column, i) not in missing for i in range(N)])
    return made


def targets(saved, rows):
    one, two = mmrep.load(saved / "one"), mmrep.load(saved / "two")
    left = torch.as_tensor(one.encode([ssl_toys.raw("x", i) for i in rows], "a"))
    right = torch.as_tensor(two.encode([ssl_toys.raw("y", i) for i in rows], "q"))
    return F.normalize(torch.cat([F.normalize(left, dim=1), F.normalize(right, dim=1)], 1), dim=1)


def test_the_target_is_the_unit_embeddings_of_all_teachers_of_the_samples_that_have_all(saved):
    weights = {"cosine": 2.0, "similarity": 0.5, "rank": 3.0}
    built = root(saved, losses=weights, dims=[3], temperature=0.2, margin=0.1).eval()
    made = batch(built, missing={("x", 1), ("y", 4)})
    out = built(made)
    rows = [i for i in range(N) if i not in (1, 4)]
    target = targets(saved, rows)
    present = [i for i in range(N) if i != 1]
    whole = built.model.tower("a")(made.inputs["x"][0])[[present.index(i) for i in rows]]
    maps = built.objectives["distill"].maps
    assert {name: tuple(m.weight.shape) for name, m in maps.items()} == {"6": (9, 6), "3": (9, 3)}
    expected = 0.0
    for width in (6, 3):
        student = whole if width == 6 else F.normalize(whole[:, :width], dim=1)
        cosine = twin(student @ maps[str(width)].weight.T, target, "cosine")
        kept = [twin(student, target, kind, temperature=0.2, margin=0.1) for kind in ("similarity", "rank")]
        expected = expected + (2 * cosine + 0.5 * kept[0] + 3 * kept[1]) / 2
    torch.testing.assert_close(out["loss"], expected)
    trained = [p for p in built.parameters() if p.requires_grad]
    mine, theirs = (torch.autograd.grad(loss, trained, retain_graph=True) for loss in (out["loss"], expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_dims_are_those_of_the_models_reductions_where_it_has_them(saved, tmp_path):
    """Each is compared with the teachers, moves with the student, and is in the model that is saved."""
    built = root(saved, losses={"cosine": 2.0, "similarity-mse": 0.5}, dims=[2, 4], reductions=(4, 5)).eval()
    moved = built.model.reductions["4"].weight
    with torch.no_grad():
        assert torch.equal(moved, torch.eye(4, 6))  # it begins as the first dimensions
        moved += 0.3 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(1))
    made = batch(built)
    out, target = built(made), targets(saved, range(N))
    whole = built.model.tower("a")(made.inputs["x"][0])
    students = [whole, F.normalize(whole[:, :2], dim=1), F.normalize(whole @ moved.T, dim=1)]
    maps = built.objectives["distill"].maps
    expected = sum(
        (2 * twin(x @ maps[str(x.shape[1])].weight.T, target, "cosine") + 0.5 * twin(x, target, "similarity-mse")) / 3
        for x in students
    )
    torch.testing.assert_close(out["loss"], expected)
    trained = {name: p for name, p in built.named_parameters() if p.requires_grad}
    assert "model.reductions.4.weight" in trained
    assert "model.reductions.5.weight" not in trained, "nothing trains it: it rests"
    mine, theirs = (torch.autograd.grad(x, list(trained.values()), retain_graph=True) for x in (out["loss"], expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    built.model.save_pretrained(tmp_path / "m")
    loaded, raw = mmrep.load(tmp_path / "m"), [ssl_toys.raw("x", i) for i in range(N)]
    full, few = (torch.from_numpy(loaded.encode(raw, truncate_dim=d)) for d in (None, 4))
    torch.testing.assert_close(few, F.normalize(full @ moved.detach().T, dim=1))
    torch.testing.assert_close(loaded.reduce(full, 4), few)
    torch.testing.assert_close(torch.from_numpy(loaded.encode(raw, truncate_dim=3)), F.normalize(full[:, :3], dim=1))
    raw_length = torch.from_numpy(loaded.encode(raw, truncate_dim=4, normalize_embeddings=False))
    assert (raw_length.norm(dim=1) - 1).abs().max() > 0.1
    weights = load_file(tmp_path / "m/model.safetensors")
    weights["reductions.4.weight"] = weights["reductions.4.weight"].flip(0).contiguous()
    save_file(weights, tmp_path / "m/model.safetensors")
    with pytest.raises(ModelFolderError, match=r"reduction to 4 dimensions .off by"):
        mmrep.load(tmp_path / "m")


def test_a_student_that_is_frozen_whole_can_learn_reductions(saved):
    chosen = component("objectives", "distill", student="x", teachers=[{"model": str(saved / "one"), "column": "x"}],
                       dims=[3], losses={"similarity-mse": 1.0})  # fmt: skip
    tower = TowerConfig(encoder=component("encoders", "toy-ssl"), frozen="tower")
    frozen = Model(ModelConfig(dim=6, towers={"a": tower}, temperatures={}, reductions=(3,)))
    built = Root(frozen, [chosen], fields={"x": "a"}, views={})
    assert [name for name, p in built.named_parameters() if p.requires_grad] == ["model.reductions.3.weight"]


def test_reductions_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"reductions: 6 is not smaller.*6 dim"):
        model(6, reductions=(6,))
    with pytest.raises(ConfigError, match="names one twice"):
        model(6, reductions=(3, 3))


def test_equal_widths_need_no_map_and_relations_never(saved):
    assert not root(saved, dim=9).objectives["distill"].maps
    assert not root(saved, losses={"distance": 1, "angle": 2}).objectives["distill"].maps
    one = root(saved, dim=5, teachers=[{"model": "one", "column": "x"}], losses={"mse": 1})
    assert not list(one.objectives.parameters())


def test_a_guest_is_in_no_state_no_optimizer_and_goes_where_the_root_goes(saved):
    built = root(saved)
    (first, second) = built.guests.values()
    names = {name for name, _ in built.named_parameters()}
    assert names == {n for n in names if n.startswith(("model.towers.a.", "objectives.distill.maps."))}
    built.train()
    assert not first.tower.training
    assert not any(p.requires_grad for p in second.tower.parameters())
    built.double()
    assert next(first.tower.parameters()).dtype == torch.float64


def test_a_rank_or_batch_without_pairs_has_a_loss_of_zero(saved):
    built = root(saved)
    out = built(batch(built, missing={("y", i) for i in range(N)}))
    out["loss"].backward()
    assert out["loss"] == 0
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"student": "z"}, r"student: unknown 'z'"),
        ({"dims": [6]}, "dims: 6, but the student has 6"),
        ({"teachers": [{"model": "two", "column": "x"}]}, r"teachers\[0\]\.tower: .* has p, q: say which"),
        ({"teachers": [{"model": "two", "column": "x", "tower": "r"}]}, r"teachers\[0\]\.tower: .*'r'"),
        ({"teachers": [{"model": "three", "column": "x"}]}, r"teachers\[0\]\.model: there is no folder"),
        ({"teachers": [{"model": "one", "column": "x"}] * 2}, "already"),
    ],
)
def test_what_cannot_be_is_refused_when_built(saved, fields, words):
    with pytest.raises(ConfigError, match=words):
        root(saved, **fields)


def test_a_run_teaches_pictures_what_another_model_says_of_their_captions(tmp_path):
    """Cross-modal: the student has no text tower, and its data section names no caption."""
    folder = make_world(tmp_path / "world")
    data = yaml.safe_load(write_recipe(folder).read_text())
    Run(read_recipe(data, ["train.steps=40", "evaluations={}"]), folder / "teacher").train()
    del data["model"]["towers"]["text"], data["data"]["fields"]["caption"]
    data["model"]["dim"] = 12
    data["objectives"] = [{
        "type": "distill", "student": "image", "losses": {"cosine": 1, "similarity": 1}, "dims": [4],
        "teachers": [{"model": str(folder / "teacher"), "column": "caption", "tower": "text"}],
    }]  # fmt: skip
    data["evaluations"] = {"knn": data["evaluations"]["knn"]}
    data["train"] |= {"steps": 90, "log_every": 1, "save_every": 45}
    Run(read_recipe(data), folder / "student").train()
    losses = [json.loads(x)["distill/cosine"] for x in (folder / "student/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    student = open_run(folder / "student").model
    assert list(student.towers) == ["image"]
    assert not any("distill" in name or "teacher" in name for name in student.state_dict())
    for checkpoint in Path(folder / "student/checkpoints").glob("step-*"):
        with safe_open(checkpoint / "module.safetensors", framework="pt") as file:
            assert not any("text" in name for name in file.keys())
    features = list((folder / "student/features").rglob("*.safetensors"))
    assert features, "what the teacher says of each caption is kept"

    # Resumed half way, beside the same teacher and then beside one of which a single weight has moved.
    (last,) = (folder / "student/checkpoints").glob("step-00000090")
    shutil.rmtree(last)
    shutil.copytree(folder / "student", folder / "cut")
    Run(read_recipe(data), folder / "cut").train(resume=True)
    weights = folder / "teacher/model/model.safetensors"
    values = load_file(weights)
    name = next(name for name in values if name.startswith("towers.text.projector"))
    values[name].view(-1)[0] += 1e-4
    save_file(values, weights)
    with pytest.raises(ResumeError, match=r"another 'caption@.*#text': its weights or its config have changed"):
        Run(read_recipe(data), folder / "student").train(resume=True)
