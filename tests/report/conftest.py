"""A report with everything in it."""

from __future__ import annotations

import pytest
from report_world import make_evaluations, make_metrics, make_pairs

from mmrep.report import ReportData


@pytest.fixture
def report():
    return ReportData(
        title="a run",
        about="a made-up run",
        config="train:\n  steps: 60\n",
        versions={"python": "3.11", "torch": "2.9"},
        metrics=make_metrics(),
        evaluations=make_evaluations(),
        quarantined={"truncated image": 3},
        temperatures={"default": {"scale": 20.0, "bias": -9.5}},
        sets=[make_pairs(), make_pairs(12, fields=("image", "caption"), name="other", seed=5)],
    )
