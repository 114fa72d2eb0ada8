"""The points between two models, on a tiny world: the ends are the two models, and the command line says it."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

import mmrep
from mmrep import cli
from mmrep.config import ConfigError
from mmrep.finetune.sweep import charts, sweep, write_sweep
from mmrep.recipe import read_recipe
from mmrep.run import Run, open_run
from tests.world import make_world, write_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, and one that goes on from it in large steps."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    path = str(write_recipe(folder))
    Run(read_recipe(path, ["train.steps=12"]), folder / "first").train()
    Run(read_recipe(path, ["train.steps=12", f"start={folder / 'first'}", "optim.lr=0.02"]), folder / "second").train()
    return folder


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_the_ends_of_a_sweep_are_the_two_models(world):
    run, start = open_run(world / "second"), mmrep.load(world / "first/model")
    points = sweep(run, start, alphas=(1, 0.5, 0), evaluations=["retrieval"])
    assert [p.alpha for p in points] == [1, 0.5, 0]
    assert points[0].results == run.evaluate(["retrieval"])
    assert points[2].results == run.evaluate(["retrieval"], start)
    assert points[0].results != points[2].results
    with pytest.raises(ConfigError, match="did you mean 'retrieval'"):
        sweep(run, start, evaluations=["retreival"])


def test_a_sweep_is_drawn_over_alpha_beside_chance(world, tmp_path):
    run, start = open_run(world / "second"), mmrep.load(world / "first/model")
    points = sweep(run, start, alphas=(1, 0), evaluations=["retrieval", "knn"])
    drawn = charts(points)
    assert [c.title for c in drawn] == ["R@5 on retrieval", "accuracy on knn"]
    row = next(r for r in points[1].results["retrieval"]["rows"] if r["who"] == "model")
    assert f"{row['direction']} from {row['R@5']:.3g} at alpha 0 to" in drawn[0].summary
    assert "chance 0.31" in drawn[0].summary
    page = write_sweep(points, tmp_path, about="<b>").read_text()
    assert page.count("<svg") == 2
    assert "<b>" not in page
    assert json.loads((tmp_path / "sweep.json").read_text())[0]["alpha"] == 1


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["mmrep", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        assert (stop.value.code or 0) == code, out.out + out.err
        return out.out if code == 0 else out.err

    return run


def test_merge_writes_a_saved_model_with_its_fingerprint_and_how_it_was_made(command, world, tmp_path):
    first, second, out = world / "first", world / "second", tmp_path / "merged"
    command("merge", first, second, "--alpha", 0.25, "--out", out)
    a, b, merged = (mmrep.load(f) for f in (first / "model", second / "model", out))
    torch.testing.assert_close(weights(merged), 0.75 * weights(a) + 0.25 * weights(b))
    assert "--alpha 0.25" in (out / "README.md").read_text()
    command("merge", first, second, "--out", tmp_path / "soup")
    torch.testing.assert_close(weights(mmrep.load(tmp_path / "soup")), (weights(a) + weights(b)) / 2)
    command("merge", second, "--base", first, "--scale", -1, "--out", tmp_path / "away")
    torch.testing.assert_close(weights(mmrep.load(tmp_path / "away")), 2 * weights(a) - weights(b))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["A", "--out", "x"], "two models at least"),
        (["A", "B", "C", "--alpha", "0.5", "--out", "x"], "--alpha: interpolates two models, got 3"),
        (["A", "B", "--alpha", "0.5", "--base", "C", "--out", "x"], "give one of them"),
        (["A", "B", "--scale", "1", "--out", "x"], "--scale: goes with --base"),
        (["A", "B", "--base", "C", "--scale", "1", "--out", "x"], "--scale: 1 for 2 models"),
        (["A", "B", "--out", "."], r"exists already"),
    ],
)
def test_options_that_do_not_go_together_are_refused(command, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert re.search(words, command("merge", *arguments, code=2))


def test_the_sweep_command_draws(command, world, tmp_path):
    said = command("sweep", world / "first", world / "second", "knn", "--steps", 2, "--out", tmp_path / "s")
    assert [line for line in said.splitlines() if line.startswith("##")] == [
        "## alpha 0", "## alpha 0.5", "## alpha 1",
    ]  # fmt: skip
    assert (tmp_path / "s/sweep.html").is_file()
