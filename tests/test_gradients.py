"""`mmrep check gradients`: agrees where it should, and finds each planted mistake with the right cause.

One start of two processes looks at all recipes of `planted`; the command itself starts its own.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import multiprocessing

from mmrep import cli
from mmrep._gradients_table import Measured, causes, compare, term
from mmrep.config import ConfigError, dump
from mmrep.gradients import check_gradients
from tests import planted
from tests.ranks import run_ranks

TOWERS = {f"tower {tower}, {part}" for tower in "ab" for part in ("encoder", "projector")}
SCALE = "temperature default, scale"
LOSSES = {"loss", "loss contrastive/loss", "loss contrastive/x-y"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return run_ranks(planted.compare, 2, folder, str(folder))[0]


def differing(report, table=-1):
    return {row["term"] for row in report["tables"][table]["rows"] if not row["agrees"]}


def terms(report, start):
    """The terms whose cause begins so."""
    return {t for cause, found in report["causes"].items() if cause.startswith(start) for t in found}


def row(report, name, table=-1):
    return next(r for r in report["tables"][table]["rows"] if r["term"] == name)


def test_a_right_recipe_agrees_in_every_term(reports):
    """Some values are missing, and some samples cannot be read."""
    for name in ("clean", "planted-none"):
        report = reports[name]
        assert report["agree"]
        assert {r["term"] for r in report["tables"][0]["rows"]} == LOSSES | TOWERS | {SCALE}
        assert max(r["error"] for r in report["tables"][0]["rows"]) < 1e-12, "in float64, not in float32"
        assert report["shares"] == [8, 12]
        assert report["wrapper"] == "DistributedDataParallel"
        assert "All 8 terms agree." in report["text"]
    assert any("3 unreadable samples" in note for note in reports["clean"]["notes"])


def test_a_gather_that_detaches(reports):
    """The loss is right, so that no curve would show it."""
    whole, keys = reports["planted-detached-gather"], reports["planted-detached-keys"]
    assert (
        differing(whole) == TOWERS == terms(whole, "1/2 of what it should be: values of other processes were gathered")
    )
    assert all(row(whole, t)["ratio"] == pytest.approx(0.5) for t in TOWERS)
    assert (
        differing(keys) == {t for t in TOWERS if "tower b" in t} == terms(keys, "the loss is right and its gradient is")
    )


def test_a_temperature_counted_twice(reports):
    for name in ("planted-twice", "single precision and a bug", "sharded and a bug"):
        assert differing(reports[name]) == {SCALE} == terms(reports[name], "counted 2 times")


def test_a_mean_over_local_rows(reports):
    report = reports["planted-local-count"]
    assert differing(report) == LOSSES | TOWERS | {SCALE}
    assert terms(report, "right with equal shards and wrong with unequal ones") == differing(report)
    assert row(report, "tower a, encoder")["worst"].startswith("model.towers.a.encoder.")


def test_trap_f22_local_statistics(reports):
    report = reports["planted-local-statistics"]
    assert differing(report) == LOSSES | TOWERS | {SCALE}
    assert terms(report, "another value or direction, also with equal shards: a statistic") == differing(report)


def test_batch_normalisation_is_named_and_frozen(reports):
    report = reports["batch norm"]
    assert not report["agree"]
    assert differing(report, 0) == LOSSES | TOWERS | {SCALE}
    assert differing(report, 1) == set()
    assert report["causes"] == {}
    note = next(n for n in report["notes"] if n.startswith("Batch normalisation"))
    assert "model.towers.a.encoder.norm" in note
    assert "norm: group" in note
    assert "SyncBatchNorm" in note
    assert any("the losses and their collectives are right" in n for n in report["notes"])


def test_batch_normalisation_does_not_hide_a_mistake(reports):
    report = reports["batch norm and a bug"]
    assert terms(report, "right with equal shards") == differing(report, 1) == LOSSES | TOWERS | {SCALE}
    assert not any("collectives are right" in n for n in report["notes"])


def test_dropout_is_off_and_said_to_be(reports):
    for name in ("dropout", "functional dropout"):
        assert reports[name]["agree"]
        assert reports[name]["notes"][0].startswith("The towers are in eval mode: dropout and the like are off")
    assert "model.towers.a.encoder.dropout" in reports["dropout"]["notes"][0]


def test_a_tower_that_refuses_float64_is_compared_in_float32(reports):
    report = reports["single precision"]
    assert report["agree"]
    assert 1e-9 < max(r["error"] for r in report["tables"][0]["rows"]) < 1e-5
    assert any("float32" in n for n in report["notes"])


def test_a_parameter_without_gradient(reports):
    """DDP leaves its bucket unreduced in the first step, without a word."""
    report = reports["unused parameter"]
    assert terms(report, "no gradient arrives") == {"objective planted-regression"}
    assert terms(report, "not to be judged") == differing(report) - {"objective planted-regression"}
    assert "NO GRADIENT" in report["text"]
    assert "objectives.planted-regression.spare.weight" in report["text"]


def test_a_temperature_that_no_pair_names_is_no_such_parameter(reports):
    assert reports["unused temperature"]["agree"]


def test_objectives_have_rows_of_their_own(reports):
    report = reports["objective"]
    assert row(report, "objective planted-regression")["agrees"]
    assert terms(report, "1/2 of what it should be") == {"loss alone/loss", "objective alone"}
    assert terms(report, "a sum over objectives, of which these differ: loss alone/loss") == TOWERS | {"loss"}


def test_parts_of_a_batch_against_all_at_once(reports):
    assert reports["micro-batches"]["agree"]
    assert any("parts of 3 samples" in n for n in reports["micro-batches"]["notes"])


def test_fully_sharded(reports):
    assert reports["sharded"]["agree"]
    assert reports["sharded"]["wrapper"].startswith("FSDP")


def measured(scale=1.0, *, b=1.0, loss=1.0):
    gradients = {"model.towers.a.encoder.w": scale * torch.arange(1.0, 4), "model.towers.a.pool.w": torch.ones(2) * b}
    return Measured({"loss": torch.tensor(loss)}, gradients)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("many", "cause"),
    [
        (measured(0.25), "1/4 of"),
        (measured(4.0), "counted 4 times"),
        (measured(3.0), "counted 3 times"),
        (measured(math.nan), "not finite"),
        (measured(1.5), "the loss is right"),
        (measured(1.5, loss=1.1), "another value"),
    ],
)
def test_signatures(many, cause):
    table = compare("", measured(), many, 1e-9)
    found = causes(table, 4, None)
    assert [t for c, ts in found.items() if c.startswith(cause) for t in ts][-1:] == ["tower a, encoder"]
    assert all("tower a, pool" not in ts for ts in found.values())


def test_equal_shards_tell_a_count_from_statistics():
    table, even = (compare("", measured(), measured(x, loss=x), 1e-9) for x in (1.5, 1.0))
    assert next(iter(causes(table, 4, even))).startswith("right with equal shards")
    assert next(iter(causes(table, 4, table))).startswith("another value")


def test_rounding_in_a_gradient_of_zero_is_no_difference():
    """A bias that a softmax cancels has a gradient of 1e-17 here and another there."""
    one, many = measured(b=1e-17), measured(b=-3e-17)
    assert compare("", one, many, 1e-9).agree
    assert not compare("", one, measured(b=1e-7), 1e-9).agree


def test_terms():
    assert term("model.towers.image.encoder.stem.0.weight") == "tower image, encoder"
    assert term("model.temperatures.default.log_scale") == "temperature default, scale"
    assert term("model.temperatures.default.bias") == "temperature default, bias"
    assert term("objectives.jepa.predictor.weight") == "objective jepa"


def test_too_few_samples_or_processes_are_refused():
    recipe = planted.recipe()
    with pytest.raises(ConfigError, match=r"--processes 1: 2 or more"):
        check_gradients(recipe, processes=1)
    with pytest.raises(ConfigError, match=r"--samples 5: 2 processes need 6"):
        check_gradients(recipe, samples=5)


def test_a_launchers_number_goes_first(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"--processes 2: the launcher started 4"):
        check_gradients(planted.recipe(), processes=2)


@pytest.fixture
def mmrep(monkeypatch, capsys):
    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["mmrep", *map(str, arguments)])
        exit_code = 0
        try:
            cli.main()
        except SystemExit as stop:
            exit_code = stop.code or 0
        out = capsys.readouterr()
        assert exit_code == code, out.out + out.err
        return out.err if code == 2 else out.out

    return run


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """The planted parts as a third party would install them, for processes that import afresh."""
    info = tmp_path / "planted-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mmrep.encoders]\ntoy-installed = tests.toys:ToyEncoder\n"
        "[mmrep.losses]\ninstalled-twice = tests.planted:Twice\n"
    )
    root = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(tmp_path))
    data = dump(planted.recipe("installed-twice", encoder="toy-installed"))
    data["model"]["towers"]["b"]["encoder"]["type"] = "toy-installed"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "recipe.yaml"


def test_the_command_starts_processes_and_fails_with_the_term_that_differs(mmrep, plug_in):
    said = mmrep("check", "gradients", plug_in, "train.batch_size=12", code=1)
    assert "One process with 12 samples against 2 with 5 + 7 (DistributedDataParallel)" in said
    assert "1 of 8 terms differ." in said
    assert "counted 2 times" in said


def test_too_little_data_is_refused_before_processes_start(mmrep, plug_in):
    said = mmrep("check", "gradients", plug_in, "data.train.records=[{x: [1.0], y: [2.0]}]", code=2)
    assert "data.train has 1 samples, and 2 processes need 6" in said


def test_what_a_started_process_refuses_is_one_message(monkeypatch):
    def start(function, arguments, **options):
        Path(arguments[2], "refused").write_text("model.towers.a: this cannot be")
        raise multiprocessing.ProcessRaisedException("Traceback …", 0, 1)

    monkeypatch.setattr(multiprocessing, "start_processes", start)
    with pytest.raises(ConfigError, match=r"^model.towers.a: this cannot be$"):
        check_gradients(planted.recipe())


def test_under_torchrun_it_takes_the_processes_that_are_there(plug_in):
    command = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "--standalone", "-m", "mmrep",
               "check", "gradients", plug_in, "objectives[0].loss=info-nce", "--samples", "12"]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("All 8 terms agree.") == 1
    assert "12 samples against 2 with 5 + 7" in done.stdout


def test_check_still_takes_one_name(mmrep):
    assert "gradients" in mmrep("check", "--help")
    assert "which recipe?" in mmrep("check", "gradients", code=2)
    assert "did you mean 'quickstart'" in mmrep("check", "gradients", "quikstart", code=2)
    assert "path.to.key=value" in mmrep("check", "image-vit", "more", code=2)
    assert "options of `check gradients`" in mmrep("check", "image-vit", "--processes", "2", code=2)
