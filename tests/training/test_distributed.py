"""Two real processes over gloo, started once by torchrun; the scenarios are in distributed_run.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmrep.training.checkpoint import latest
from tests.training.distributed_run import Exact
from tests.training.toys import ToyRoot, lines, toy_trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               "-m", "tests.training.distributed_run", str(out)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = launcher.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # which ends the processes that it started
        pytest.fail(f"a deadlock:\n{launcher.communicate()[1][-4000:]}")
    assert launcher.returncode == 0, errors[-4000:]
    return out


def found(runs, scenario):
    return [json.loads((runs / f"{scenario}-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_are_one_on_the_whole_batch(runs):
    first, second = found(runs, "plain")
    assert first["backend"] == "gloo"
    assert first["summary"]["processes"] == second["summary"]["processes"] == 2
    assert (first["main"], second["main"]) == (True, False)
    assert first["weights"] == second["weights"]
    alone = toy_trainer(None, root=Exact())
    alone.fit()
    for name, value in alone.root.state_dict().items():
        np.testing.assert_allclose(np.array(first["weights"][name]), value.numpy(), rtol=2e-4, atol=2e-5)


def test_metrics_are_means_over_processes(runs, tmp_path):
    toy_trainer(tmp_path, root=Exact()).fit()
    one, two = lines(tmp_path), lines(runs / "plain")
    assert len(one) == len(two) == 7
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert a["samples"] == b["samples"]
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-3), key


def test_resume_on_two_processes_is_bitwise(runs):
    first, second = found(runs, "dropout")
    for one in (first, second):
        assert one["straight"] == one["resumed"]
    assert all(first["straight"][name] == second["straight"][name] for name, _ in ToyRoot().named_parameters())
    assert first["masks"] != second["masks"]  # not the same dropout on both
    assert lines(runs / "straight") == lines(runs / "cut")


def test_processes_evaluate_one_model(runs):
    """Each normalises its own shard in training; what is evaluated is the first one's statistics, as saved."""
    first, second = found(runs, "dropout")
    assert first["statistics"] == second["statistics"]
    assert len(first["statistics"]) == 2


def test_a_nan_on_one_process_stops_both(runs):
    first, second = found(runs, "nan_on_one")
    assert first["error"] == second["error"] == "NonFiniteLoss"
    assert first["step"] == second["step"] == "5"
    assert "other = nan" in second["message"]
    assert first["ids"] != second["ids"]


def test_a_full_disk_stops_both(runs):
    for one in found(runs, "disk_full"):
        assert one["error"] == "CheckpointError"
        assert "No space left" in one["message"]
    assert latest(runs / "full" / "checkpoints").name == "step-00000004"


def test_uneven_streams_end_by_agreement(runs):
    for one in found(runs, "uneven_streams"):
        assert one == {"steps": 8, "epoch": 2, "position": 0}


def test_an_interrupt_of_one_process_stops_both_with_one_checkpoint(runs):
    for one in found(runs, "one_is_interrupted"):
        assert one["error"] == "KeyboardInterrupt"
    assert latest(runs / "stop" / "checkpoints").name == "step-00000006"


def test_a_run_is_not_overwritten(runs):
    for one in found(runs, "existing"):
        assert one["error"] == "ResumeError"
        assert "already holds a run" in one["message"]
