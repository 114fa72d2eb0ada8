"""The guard: it measures before the first step, logs, and ends a run that forgets, with its work saved."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import yaml

from mmrep.config import ConfigError
from mmrep.guard import Guard, GuardConfig
from mmrep.recipe import read_recipe
from mmrep.run import Run
from mmrep.training.collectives import world as here
from mmrep.training.errors import GuardError
from tests.ranks import run_ranks
from tests.world import make_world, write_recipe

SHORT = {"train.eval_every": 4, "train.steps": 12, "train.log_every": 1, "train.save_every": "null"}
FIGURE = "eval/knn/accuracy"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def run(world, folder, guard, **changes):
    data = yaml.safe_load(write_recipe(world).read_text())
    data["evaluations"] = {name: data["evaluations"][name] for name in ("knn", "retrieval")}
    data["guard"] = guard
    path = world / "guarded.yaml"
    path.write_text(yaml.safe_dump(data))
    settings = {**SHORT, **changes}
    return Run(read_recipe(str(path), [f"{key}={value}" for key, value in settings.items()]), folder)


def lines(folder, figure=FIGURE):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[figure] for line in found if figure in line}


def test_it_measures_before_the_first_step_and_while_the_run_is_well(world, tmp_path):
    guard = {"evaluation": "knn", "figure": "accuracy", "drop": 0.9}
    look = run(world, None, guard)
    before = look.evaluate(["knn"], look.untrained())["knn"]["rows"][0]["accuracy"]
    run(world, tmp_path / "a", guard, monitor="[knn]").train()
    found = lines(tmp_path / "a")
    assert list(found) == [0, 4, 8, 12]
    assert found[0] == before


def test_a_run_that_falls_ends_with_its_work_saved_and_goes_on_from_there(world, tmp_path):
    folder = tmp_path / "b"
    guard = {"evaluation": "knn", "figure": "accuracy", "floor": 1.1}
    with pytest.raises(GuardError, match=r"step 4: accuracy of 'knn' is .* less than 1\.1 .*step-00000004"):
        run(world, folder, guard).train()
    assert list(lines(folder)) == [0, 4]
    assert (folder / "checkpoints/step-00000004/manifest.json").is_file()
    with pytest.raises(GuardError, match="step 8"):
        run(world, folder, guard).train(resume=True)
    assert list(lines(folder)) == [0, 4, 8]


def test_a_drop_counts_from_the_beginning_also_after_a_resume(world, tmp_path):
    """The trap: a resumed run that takes its own beginning, low already, for the reference."""
    folder = tmp_path / "c"
    guard, often = {"evaluation": "knn", "figure": "accuracy", "drop": 0.9}, {"train.save_every": 4}
    run(world, folder, guard, **often).train()
    metrics = folder / "metrics.jsonl"
    found = [json.loads(line) for line in metrics.read_text().splitlines()]
    high = [{**line, FIGURE: 5.0} if line["step"] == 0 else line for line in found]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in high))
    shutil.rmtree(folder / "checkpoints/step-00000012")
    with pytest.raises(GuardError, match=r"step 12: .*5 before the first step, of which 0\.9 may be lost"):
        run(world, folder, guard, **often).train(resume=True)
    assert list(lines(folder)) == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("guard", "changes", "words"),
    [
        ({"evaluation": "kn", "figure": "accuracy", "drop": 0.1}, {}, "unknown 'kn'; did you mean 'knn'"),
        ({"evaluation": "knn", "figure": "accuracy"}, {}, "give a floor, or how large a drop"),
        ({"evaluation": "knn", "figure": "accuracy", "drop": 0.1}, {"train.eval_every": "null"}, "which is null"),
    ],
)
def test_a_guard_that_could_not_guard_is_refused(world, tmp_path, guard, changes, words):
    with pytest.raises(ConfigError, match=words):
        run(world, tmp_path / "d", guard, **changes)


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ({"evaluation": "knn", "figure": "acuracy", "drop": 0.1}, "has no 'acuracy'; did you mean 'accuracy'"),
        ({"evaluation": "retrieval", "figure": "R@1", "direction": "image", "drop": 0.1}, "direction: unknown 'image'"),
    ],
)
def test_a_figure_that_is_not_there_is_told_before_the_first_step(world, tmp_path, guard, words):
    with pytest.raises(ConfigError, match=words):
        run(world, tmp_path / "e", guard).train()
    assert not (tmp_path / "e" / "metrics.jsonl").exists()


def wrong_name_on_ranks():
    """Only the first process has the figures, and all must refuse the name."""
    row = {"who": "model", "accuracy": 0.5}
    found = {"knn": {"type": "knn", "data": None, "rows": [row]}} if here().rank == 0 else {}
    run = SimpleNamespace(trained=lambda root: nullcontext(), evaluate=lambda *a, **b: found)
    trainer = SimpleNamespace(step=0, device="cpu", is_main=here().rank == 0, metrics=SimpleNamespace(path=None))
    try:
        Guard(GuardConfig(evaluation="knn", figure="acuracy", drop=0.1), run, None).on_fit_begin(trainer)
    except ConfigError as error:
        return str(error)
    return "went on"


def test_every_process_refuses_a_figure_that_is_not_there(tmp_path):
    told = run_ranks(wrong_name_on_ranks, 2, tmp_path)
    assert told == [told[0]] * 2
    assert "has no 'acuracy'; did you mean 'accuracy'" in told[0]
