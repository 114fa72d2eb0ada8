"""DDP and FSDP2 of Accelerate's own config, on one host and on two: always the run of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mmrep
from mmrep.run import open_run
from mmrep.training.engine import accelerator
from tests.training import engine_run
from tests.training.distributed_run import Exact
from tests.training.processes import run

ROOT = Path(__file__).parents[2]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    engine_run.make_recipe(folder)
    return folder, engine_run.straight(folder)


@pytest.fixture(scope="module", params=["DDP", "FSDP2"])
def spread(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    engine_run.make_recipe(folder)
    environment = FSDP2 if request.param == "FSDP2" else {}
    return request.param, folder, run(engine_run.straight, 2, folder, environment), environment


def weights(folder, name="straight"):
    return load_file(folder / name / "model" / "model.safetensors")


def same_weights(expected, seen):
    assert expected.keys() == seen.keys()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=1e-5, atol=1e-6)


def same_run(one, folder):
    """Weights and metrics of the run in ``folder`` are those of one process."""
    same_weights(weights(one), weights(folder))
    mine, theirs = (
        [json.loads(line) for line in (f / "straight" / "metrics.jsonl").read_text().splitlines()]
        for f in (one, folder)
    )
    assert len(mine) == len(theirs) == 5  # steps 3, 6 and 8, and the evaluations of steps 4 and 8
    for a, b in zip(mine, theirs, strict=True):
        timing = {"seconds", "samples_per_second"}
        assert a.keys() == b.keys()
        assert {k: v for k, v in b.items() if k not in timing} == pytest.approx(
            {k: v for k, v in a.items() if k not in timing}, rel=1e-4, abs=1e-6
        )


def test_it_is_the_run_of_one_process(alone, spread):
    engine, folder, found, _ = spread
    assert [one["kinds"] for one in found] == [["DTensor" if engine == "FSDP2" else "Parameter"]] * 2
    assert all(one["world"] == 2 and one["backend"] == "gloo" for one in found)
    # The others wait while the first process ranks and probes; gloo's own half an hour is not enough for that.
    assert all(one["patience"] == 3600 for one in found)
    same_run(alone[0], folder)


def test_the_first_process_has_the_figures_and_the_only_folder(alone, spread):
    _, folder, found, _ = spread
    assert found[1]["results"] == {}
    for name, result in alone[1]["results"].items():
        for a, b in zip(result["rows"], found[0]["results"][name]["rows"], strict=True):
            assert a.keys() == b.keys()
            assert all(b[k] == (pytest.approx(v, rel=1e-4) if isinstance(v, float) else v) for k, v in a.items()), name
    assert (folder / "straight" / "evaluation.json").is_file()
    assert not (folder / "straight-1").exists()


def test_a_resumed_run_is_bitwise_the_straight_one(spread):
    _, folder, _, environment = spread
    again = run(engine_run.resumed, 2, folder, environment)
    assert [one.get("steps", one) for one in again] == [4, 4]
    expected, seen = weights(folder), weights(folder, "resumed")
    assert all(torch.equal(seen[name], value) for name, value in expected.items())


def test_a_batch_in_parts_is_the_whole_batch(alone, spread):
    _, folder, _, environment = spread
    assert run(engine_run.parts, 2, folder, environment) == [{}, {}]
    same_weights(weights(alone[0]), weights(folder, "parts-0"))


def test_what_was_evaluated_is_what_was_saved(spread):
    _, folder, _, environment = spread
    evaluated = run(engine_run.statistics, 2, folder, environment)[0]
    saved = open_run(folder / "statistics").encoded("test")
    for name, value in saved.embeddings.items():
        torch.testing.assert_close(torch.tensor(evaluated[name]), torch.from_numpy(value), rtol=1e-4, atol=1e-5)


def test_all_start_from_the_first_process_and_stop_at_a_bad_gradient(spread):
    _, folder, _, environment = spread
    first, second = run(engine_run.toy, 2, folder, environment)
    assert first["start"] == second["start"]
    assert first["start"]["encode.weight"] == Exact(seed=0).encode.weight.tolist()
    for one in (first, second):
        assert one["step"] == 3
        assert one["culprits"] == ["gradient of encode.weight"]
        assert all(one["finite"].values())
        assert one["autocast"] == [True] * 3


def test_the_saved_model_opens_in_one_process(alone, spread):
    _, folder, _, _ = spread
    captions = ["a red disc", "a blue bar"]
    a, b = (mmrep.load(f / "straight" / "model").encode(captions, "text") for f in (alone[0], folder))
    torch.testing.assert_close(torch.as_tensor(b), torch.as_tensor(a), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_accelerate_launch_reaches_fsdp2(alone, tmp_path):
    config = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "use_cpu": True, "num_machines": 1,
        "num_processes": 2, "mixed_precision": "no", "main_process_port": 0, "fsdp_config": {"fsdp_version": 2},
    }  # fmt: skip
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    engine_run.make_recipe(tmp_path)
    launcher = start("accelerate.commands.launch", "--config_file", tmp_path / "accelerate.yaml",
                     "-m", "tests.training.engine_run", tmp_path, "straight")  # fmt: skip
    finish(launcher)
    assert json.loads((tmp_path / "straight-1.json").read_text())["kinds"] == ["DTensor"]
    same_run(alone[0], tmp_path)


@pytest.mark.slow
def test_two_hosts_are_one_process(alone, tmp_path):
    """Two agents, each with a process and a rank of its own, that meet at an address."""
    engine_run.make_recipe(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [
        start("torch.distributed.run", "--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1",
              "--master-addr", "127.0.0.1", "--master-port", port,
              "-m", "tests.training.engine_run", tmp_path, "straight")
        for node in (0, 1)
    ]  # fmt: skip
    for agent in agents:
        finish(agent)
    found = [json.loads((tmp_path / f"straight-{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["world"] for one in found] == [2, 2]
    assert not (tmp_path / "straight-1").exists()
    same_run(alone[0], tmp_path)


@pytest.mark.slow
def test_accelerate_launch_on_cpus_that_starts_one_process_is_refused(tmp_path):
    engine_run.make_recipe(tmp_path)
    launcher = start("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                     "-m", "tests.training.engine_run", tmp_path, "straight")  # fmt: skip
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode
    assert "was asked for several processes and, on CPUs, has started one" in errors
    assert not (tmp_path / "straight").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported.*fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "set fsdp_version: 2"),  # 1 is Accelerate's default
        ({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, "Set NO_WRAP"),
        (FSDP2, "there is one process"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, "asked for several processes and, on CPUs"),
    ],
)
def test_what_would_break_a_promise_is_refused(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        accelerator("fp32")


def start(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(launcher):
    try:
        _, errors = launcher.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # which ends the processes that it started
        pytest.fail(f"a deadlock:\n{launcher.communicate()[1][-4000:]}")
    assert launcher.returncode == 0, errors[-4000:]
