"""Self-distillation, redundancy and masked objectives on 2 and 4 real processes with different, unequal shards.

The traps F6, F7, F8, F15 and F22 of the survey: a statistic of one process's rows, or a gradient divided by the number
of processes, cannot pass, because no two processes hold the same samples.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.objectives import ssl_parity as parity
from tests.objectives.parity import SHARDS
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def single():
    """One process with the whole batch, and no process group."""
    assert not torch.distributed.is_initialized()
    return parity.single()


@pytest.fixture(scope="module")
def reference(single, tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "reference.safetensors"
    save_file(single, path)
    return path


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def reports(request, reference, tmp_path_factory):
    reports = run_ranks(parity.compare, request.param, tmp_path_factory.mktemp("ranks"), str(reference))
    assert [(r["world"], r["rows"]) for r in reports] == [(request.param, n) for n in SHARDS[request.param]]
    return reports


@pytest.mark.parametrize("name", parity.NAMES)
def test_traps_f15_and_f22_the_gradient_of_many_is_that_of_one(reports, name):
    for report in reports:
        assert set(report[name]) == {"loss", "gradient", "weight"}
        assert max(report[name].values()) < 1e-8, report[name]


@pytest.mark.parametrize("name", parity.NAMES)
def test_the_cases_have_power(single, name):
    """Nothing is compared with zero, but the shift before a softmax over tokens, which changes nothing."""
    gradients = {k: v for k, v in single.items() if k.startswith(f"{name}/gradient")}
    assert len(gradients) > 5
    assert single[f"{name}/loss"].abs().item() > 1e-3
    dead = {k for k, g in gradients.items() if g.abs().max() < 1e-7}
    assert all("bias" in k for k in dead), dead
