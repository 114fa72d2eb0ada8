"""A process that dies, fails or has no data stops the others soon, and they say who it was and why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmrep.training.errors import LostProcess
from mmrep.training.roll_call import accounted, is_broken_collective
from tests.training import engine_run
from tests.training.processes import ended, found, kill, run, started

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    engine_run.make_recipe(tmp_path)
    return tmp_path


@pytest.mark.parametrize("victim", [1, 0])  # the first one also keeps the rendezvous
def test_a_killed_process_stops_the_others_with_its_name(folder, victim):
    with started(engine_run.endless, 3, folder) as processes:
        kill(processes[victim], folder / f"mark-{victim}")
        others = [process for rank, process in enumerate(processes) if rank != victim]
        assert ended(others, 60) < 60
        name = f"pid {processes[victim].pid}"
    for rank in {0, 1, 2} - {victim}:
        seen = found(folder, engine_run.endless, rank)
        assert seen["error"] == "LostProcess", seen
        assert seen["message"].startswith("step "), seen
        assert "--resume" in seen["message"]
        if victim:
            assert f"process {victim} ({name} on " in seen["message"], seen
            assert "is gone without a word" in seen["message"]
            assert f"process {3 - victim - rank} (" not in seen["message"], "the living are not named"
        else:
            assert "process 0 is gone, or the launcher that kept the rendezvous" in seen["message"], seen


def test_the_memory_error_of_one_process_is_told_by_the_others(folder):
    first, second = run(engine_run.out_of_memory, 2, folder)
    assert second == {"error": "MemoryError", "message": "no room for a picture of 3 GiB"}
    assert first["error"] == "LostProcess"
    assert "stopped: MemoryError: no room for a picture of 3 GiB" in first["message"]
    assert first["message"].startswith("step 6: process 0 can go on no more")


def test_what_the_first_process_refuses_the_others_do_not_wait_for(folder):
    first, second = run(engine_run.refused, 2, folder)
    assert first["error"] == "ConfigError"
    assert second["error"] == "LostProcess"
    assert second["message"].startswith("before the first step")
    assert "is not empty and holds no run" in second["message"]


def test_only_the_cause_is_named(folder):
    first = run(engine_run.roll_call, 3, folder)[0]
    assert first["error"] == "LostProcess"
    assert "stopped: MemoryError: full" in first["message"]
    assert "process 1" not in first["message"]


def test_the_first_process_waits_until_a_late_one_has_read_who_is_gone(folder):
    with started(engine_run.late_reader, 3, folder) as processes:
        ended(processes, 60)
    for rank in (0, 2):
        assert f"process 1 (pid {processes[1].pid} on " in found(folder, engine_run.late_reader, rank)["message"]


def test_uneven_streams_end_each_epoch_by_agreement(folder):
    assert [one.get("steps", one) for one in run(engine_run.uneven, 2, folder)] == [6, 6]


def test_an_empty_stream_on_one_process_is_an_error_on_all(folder):
    first, second = run(engine_run.empty, 2, folder)
    assert second["error"] == "ConfigError"
    assert "process 1 found no full batch in its part of the stream" in second["message"]
    assert first["error"] == "LostProcess"
    assert "process 1 found no full batch in its part of the stream" in first["message"]


@pytest.mark.slow
def test_under_torchrun_a_killed_process_ends_the_launch_with_its_rank(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               "-m", "tests.training.engine_run", str(folder), "endless"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not (folder / "mark-1").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        victim = _child_of_rank(launcher.pid, "1")
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        _, errors = launcher.communicate(timeout=60)
    finally:
        launcher.terminate()
    assert time.monotonic() - killed < 60
    assert launcher.returncode
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in errors
    assert "rank      : 1 (local_rank: 1)" in errors


def _child_of_rank(parent, rank):
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status, variables = (process / "status").read_text(), (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"PPid:\t{parent}\n" in status and f"RANK={rank}".encode() in variables:
            return int(process.name)
    raise AssertionError("no such process")


def test_alone_nothing_is_changed():
    with pytest.raises(RuntimeError, match="gloo"), accounted(lambda: "here"):
        raise RuntimeError("Connection closed by peer in gloo")


def test_only_broken_connections_are_taken_for_a_lost_process():
    assert is_broken_collective(RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer"))
    assert is_broken_collective(RuntimeError("NCCL error: remote process exited or there was a network error"))
    assert not is_broken_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_broken_collective(MemoryError("gloo"))


def test_the_message_says_where_and_what_to_do():
    error = LostProcess("step 7", 2, {})
    assert "every process is alive" in str(error)
    assert json.dumps(error.gone) == "{}"
