"""Compiled encoders: the same training, under the same names."""

from __future__ import annotations

import pytest
import torch

from mmrep.recipe import read_recipe
from mmrep.run import Run
from tests.world import make_world, write_recipe


@pytest.mark.slow  # the compiler takes a minute
def test_a_compiled_run_is_the_eager_one(tmp_path):
    folder = make_world(tmp_path / "world")
    train = {"steps": 6, "batch_size": 16, "precision": "fp32", "workers": 0, "log_every": 1, "save_every": 3}
    states, counts = [], []
    for name, compiled in (("eager", False), ("compiled", True)):
        torch._dynamo.utils.counters.clear()
        changes = {"train": {**train, "compile": compiled}, "optim": {"optimizer": "sgd", "lr": 0.1}, "evaluations": {}}
        run = Run(read_recipe(str(write_recipe(folder, **changes))), tmp_path / name)
        run.train()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        states.append(run.model.state_dict())
    assert counts[0] == 0
    assert counts[1] >= 2  # a graph for each tower at least: it was compiled, not only asked for
    assert set(states[0]) == set(states[1])
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
