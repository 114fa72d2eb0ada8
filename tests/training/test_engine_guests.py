"""Distillation, anchor and L2-SP under DDP and FSDP2: always the run of one process, resumed too."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.training import engine_guests
from tests.training.processes import run
from tests.training.test_engines import FSDP2


def weights(folder):
    return load_file(folder / "straight" / "model" / "model.safetensors")


@pytest.mark.slow  # a minute on two busy cores
@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_it_is_the_run_of_one_process(engine, tmp_path):
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    environment = FSDP2 if engine == "FSDP2" else {}
    engine_guests.prepare(alone)
    shutil.copytree(alone, spread)
    (spread / "more.yaml").write_text((alone / "more.yaml").read_text().replace(str(alone), str(spread)))
    engine_guests.straight(alone)
    assert run(engine_guests.straight, 2, spread, environment) == [{}, {}]
    expected, seen = weights(alone), weights(spread)
    assert expected.keys() == seen.keys()
    assert "reductions.4.weight" in expected
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=1e-5, atol=1e-6, msg=name)
    shutil.rmtree(spread / "straight/checkpoints/step-00000003")
    shutil.rmtree(spread / "straight/model")
    assert run(engine_guests.resumed, 2, spread, environment) == [{}, {}]
    for name, value in weights(spread).items():
        assert torch.equal(seen[name], value), name
