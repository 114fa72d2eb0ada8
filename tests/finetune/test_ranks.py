"""Two real processes under DDP are one process on the whole batch, whatever is adapted or computed again."""

from __future__ import annotations

import pytest
from safetensors.torch import save_file

from tests.finetune import ranks_toys
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    whole = {f"{case}/{name}": value.contiguous() for case in ranks_toys.CASES
             for name, value in ranks_toys.run(case, range(ranks_toys.N), lambda root: root).items()}  # fmt: skip
    save_file(whole, folder / "whole.safetensors")
    return run_ranks(ranks_toys.compare, 2, tmp_path_factory.mktemp("two"), str(folder / "whole.safetensors"))


@pytest.mark.parametrize("case", ranks_toys.CASES)
def test_the_gradient_and_the_weights_are_those_of_one_process(gaps, case):
    for gap in gaps:
        assert gap[case].keys() == {"gradient", "weight"}
        assert max(gap[case].values()) < 1e-4
