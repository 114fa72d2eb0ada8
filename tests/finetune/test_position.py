"""Coefficients of task vectors learned on a few samples: of one's own loss, and of a recipe's."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import mmrep
from mmrep.config import ConfigError
from mmrep.finetune._command import merge
from mmrep.finetune.merge import add_task_vectors
from mmrep.finetune.position import learn_coefficients, learn_coefficients_on
from mmrep.model import Model
from mmrep.recipe import read_recipe
from mmrep.run import Run
from tests.finetune.test_merge import INPUTS, model, moved, vector
from tests.finetune.test_sweep import weights
from tests.world import make_world, write_recipe


def test_learned_coefficients_find_the_model_that_solves_the_probe():
    base = model()
    tuned = [moved(base, 1), moved(base, 2)]
    goal = add_task_vectors(base, tuned, [0.9, 0.3])
    encoder = base.tower("a").encoder
    inputs = encoder.collate([encoder.prepare(raw) for raw in INPUTS])
    with torch.no_grad():
        wanted = goal.tower("a")(inputs)

    def loss(m):
        return (m.tower("a")(inputs) - wanted).pow(2).sum()

    before = vector(base).clone()
    found = learn_coefficients(base, tuned, loss, steps=300, lr=0.05)
    assert found == pytest.approx([0.9, 0.3], abs=0.02)
    assert torch.equal(vector(base), before)
    with pytest.raises(ValueError, match="does not depend on the weights"):
        learn_coefficients(base, tuned, lambda m: torch.as_tensor(m.encode(INPUTS, "a")).sum())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, one that goes on from it, one that was spoiled since, and the recipe."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    path = str(write_recipe(folder))
    Run(read_recipe(path, ["train.steps=4"]), folder / "first").train()
    Run(read_recipe(path, ["train.steps=16", f"start={folder / 'first'}", "optim.lr=0.003"]), folder / "better").train()
    spoiled = mmrep.load(folder / "first/model")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in spoiled.parameters():
            p.add_(0.05 * torch.randn_like(p))
    spoiled.save_pretrained(folder / "spoiled")
    return folder, path


def loss_of(run, m):
    """Of the whole training set, in batches, without views or dropout."""
    root = run.root(copy.deepcopy(m)).eval()
    with torch.no_grad():
        return sum(float(root(batch)["loss"]) for batch in run.loader(root, rank=0, size=1))


def test_a_recipes_objectives_find_the_model_that_learned_and_leave_the_one_that_was_spoiled(world):
    folder, path = world
    base, better, spoiled = (mmrep.load(folder / n) for n in ("first/model", "better/model", "spoiled"))
    run = Run(read_recipe(path, [f"start={folder / 'first'}"]))
    before = weights(base).clone()
    good, bad = learn_coefficients_on(run, base, [better, spoiled], steps=40)
    assert good > 0.6 > 0.4 > bad
    assert torch.equal(weights(base), before)
    found, equal = (add_task_vectors(base, [better, spoiled], c) for c in ([good, bad], [0.5, 0.5]))
    assert loss_of(run, found) < loss_of(run, equal)


def test_the_command_merges_by_what_it_has_found(world, tmp_path):
    folder, path = world
    names = [str(folder / "better"), str(folder / "spoiled")]
    options = {"alpha": None, "base": str(folder / "first"), "scale": ()}
    said = merge(names, tmp_path / "out", **options, learn=path, steps=3)
    scales = [float(s) for s in re.findall(r"--scale (\S+)", said)]
    models = [mmrep.load(folder / n) for n in ("first/model", "better/model", "spoiled")]
    wanted = add_task_vectors(models[0], models[1:], scales)
    torch.testing.assert_close(weights(mmrep.load(tmp_path / "out")), weights(wanted), atol=1e-4, rtol=0)
    assert scales != [0.5, 0.5]
    for wrong, words in (
        ({"base": None}, "--learn: goes with --base"),
        ({"by_delta": True}, "--learn: goes with --base"),
        ({"learn": None}, "--steps: 1 or more, with --learn"),
        ({"steps": 0}, "--steps: 1 or more"),
    ):
        with pytest.raises(ConfigError, match=words):
            merge(names, tmp_path / "no", **{**options, "learn": path, "steps": 3, **wrong})


def test_a_base_without_a_temperature_gets_that_of_the_runs_beginning(world, tmp_path):
    """As an encoder of another library, of which a run made one with a temperature."""
    folder, _ = world
    bare = mmrep.load(folder / "first/model")
    bare.temperatures, bare.config = nn.ModuleDict(), replace(bare.config, temperatures={})
    bare.save_pretrained(tmp_path / "bare")
    better = mmrep.load(folder / "better/model")
    merge([str(folder / "better")], tmp_path / "out", alpha=None, base=str(tmp_path / "bare"), scale=(0.5,))
    merged = mmrep.load(tmp_path / "out")
    begin, now = (float(m.temperature("default").log_scale) for m in (Model(better.config), better))
    assert abs(begin - now) > 1e-4
    assert float(merged.temperature("default").log_scale) == pytest.approx((begin + now) / 2, abs=1e-6)
    first = weights(mmrep.load(folder / "first/model").tower("image"))
    wanted = (first + weights(better.tower("image"))) / 2
    torch.testing.assert_close(weights(merged.tower("image")), wanted)


def test_an_objective_with_weights_of_its_own_is_refused(world):
    folder, path = world
    objective = "{type: supervised, field: image, classes: [a, b, c]}"
    run = Run(read_recipe(path, [f"start={folder / 'first'}", f"objectives=[{objective}]"]))
    base = mmrep.load(folder / "first/model")
    with pytest.raises(ConfigError, match="supervised has weights of its own"):
        learn_coefficients_on(run, base, [base])
