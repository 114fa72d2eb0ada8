"""Every tuple loss and DeCUR, as objectives, on 1, 2 and 4 real processes with unequal shards: the gradient of one.

Numbers in brackets are the traps of cross-modal.md, section 3. A later tuple loss of the library, and a later switch of
one, is covered by being registered.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.objectives import tuple_parity as parity
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


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def reports(request, reference, tmp_path_factory):
    reports = run_ranks(parity.compare, request.param, tmp_path_factory.mktemp("ranks"), str(reference))
    assert [(r["world"], r["rows"]) for r in reports] == [(request.param, n) for n in parity.SHARDS[request.param]]
    return reports


@pytest.mark.parametrize(("wrapper", "name"), parity.ways())
def test_trap_3_1_the_gradient_of_many_is_that_of_one(reports, wrapper, name):
    for report in reports:
        found = report[f"{wrapper}/{name}"]
        assert set(found) == {"loss", "gradient", "weight"}
        assert max(found.values()) < 1e-8, found


@pytest.mark.parametrize("name", parity.cases())
def test_the_cases_have_power(single, name):
    """Nothing is compared with zero, but where there is no valid tuple: there all is exactly zero."""
    gradients = {k: v for k, v in single.items() if k.startswith(f"{name}/gradient")}
    loss = single[f"{name}/loss"].item()
    assert len(gradients) > 15
    if name.endswith(parity.NOTHING):
        assert loss == 0
        assert not any(bool(g.any()) for g in gradients.values())
    elif name.endswith("no statistic"):
        assert loss > 0.1  # of x alone
        assert not any(bool(g.any()) for k, g in gradients.items() if "towers.b" in k)
    else:
        assert loss > 0.1
        assert not {k for k, g in gradients.items() if g.abs().max() < 1e-6}


def test_every_tuple_loss_is_covered():
    assert {"gram", "triangle", "symile", "symile, negatives=all", "centroid, exchange=ring"} <= set(parity.variants())
    assert all(f"{variant}: everything" in parity.cases() for variant in parity.variants())
