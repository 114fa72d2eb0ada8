"""Every batch-coupled loss, in the contrastive objective, on 1, 2 and 4 real processes: the gradient of one.

Shards are unequal and differ (objectives.md F22: equal shards hide local statistics); numbers in brackets are the traps
of cross-modal.md, section 3. A later loss of the library, and a later switch of a loss, is covered by being registered.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.objectives import parity
from tests.ranks import run_ranks

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


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


@pytest.fixture(scope="module", params=sorted(parity.SHARDS))
def reports(request, reference, tmp_path_factory):
    reports = run_ranks(parity.compare, request.param, tmp_path_factory.mktemp("ranks"), str(reference))
    assert [(r["world"], r["rows"]) for r in reports] == [(request.param, n) for n in parity.SHARDS[request.param]]
    return reports


@pytest.mark.parametrize(("precision", "wrapper", "name"), parity.ways())
def test_trap_3_1_the_gradient_of_many_is_that_of_one(reports, precision, wrapper, name):
    for report in reports:
        found = report[f"{precision}/{wrapper}/{name}"]
        assert set(found) == {"loss", "gradient", "weight"}
        assert max(found.values()) < TOLERANCE[precision], found


@pytest.mark.parametrize("name", parity.cases())
def test_the_cases_have_power(single, name):
    """Nothing is compared with zero, but where there is no valid pair: there all is exactly zero."""
    found = single
    gradients = {k: v for k, v in found.items() if k.startswith(f"float64/{name}/gradient")}
    loss = found[f"float64/{name}/loss"].item()
    assert len(gradients) > 15
    if name.endswith(parity.NOTHING):
        assert loss == 0
        assert not any(bool(g.any()) for g in gradients.values())
    else:
        assert loss > 0.1
        small = {k for k, g in gradients.items() if g.abs().max() < 1e-6}
        assert not small


def test_every_loss_and_every_exchange_is_covered():
    names = parity.variants()
    assert {"info-nce", "siglip"} <= set(names)
    for name, loss in names.items():
        if hasattr(loss.config, "exchange") and "," not in name:
            assert f"{name}, exchange=ring" in names
