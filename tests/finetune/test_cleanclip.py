"""A planted trigger dies under CleanCLIP, and lives longer under the image-text contrast alone."""

from __future__ import annotations

import pytest

from tests.bench.bench_backdoor import run


@pytest.mark.slow
def test_a_planted_trigger_dies_and_what_was_learned_stays(tmp_path):
    found = run(0, tmp_path, [])
    poisoned, plain, clean = (found[way] for way in ("poisoned", "CLIP on clean pairs", "CleanCLIP"))
    assert poisoned["attack_success"] > 0.8
    assert poisoned["clean_accuracy"] > 0.9
    assert clean["attack_success"] < 0.12  # of ten classes
    assert clean["attack_success"] < plain["attack_success"] - 0.03
    assert clean["clean_accuracy"] > 0.95
