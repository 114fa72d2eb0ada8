from __future__ import annotations

import pytest

from mmrep.config import ConfigError, dump, parse
from mmrep.schedules import Schedule


class _Optimizer:
    def __init__(self):
        self.param_groups = [{"lr": None}]


@pytest.mark.parametrize(("shape", "name"), [("cosine", "cosine_lr"), ("constant", "const_lr")])
def test_equals_open_clip(shape, name):
    scheduler = pytest.importorskip("open_clip_train.scheduler")
    theirs = getattr(scheduler, name)(_Optimizer(), 3e-4, 7, 40)
    ours = Schedule(shape=shape, warmup=7)
    for step in range(40):
        assert ours.value(3e-4, step, 40) == pytest.approx(theirs(step), rel=1e-12)


def test_linear_goes_straight_to_the_end():
    schedule = Schedule(shape="linear", end=1.0)
    assert [schedule.value(5.0, step, 4) for step in range(6)] == [5.0, 4.0, 3.0, 2.0, 1.0, 1.0]


def test_cosine_stops_at_the_floor_and_stays():
    schedule = Schedule(shape="cosine", warmup=2, end=0.1)
    values = [schedule.value(1.0, step, 10) for step in range(30)]
    assert values[:2] == [0.5, 1.0]
    assert values[2] == 1.0
    assert values[6] == pytest.approx(0.55)
    assert min(values[2:]) >= 0.1
    assert values[10:] == [0.1] * 20


def test_a_value_may_rise():
    """A teacher's momentum goes up to 1."""
    schedule = Schedule(shape="cosine", end=1.0)
    assert schedule.value(0.996, 0, 10) == pytest.approx(0.996)
    assert schedule.value(0.996, 5, 10) == pytest.approx(0.998)


def test_warm_up_is_a_share_below_one_and_steps_from_one_on():
    assert Schedule(warmup=0.05).warmup_steps(200) == 10
    assert Schedule(warmup=1).warmup_steps(200) == 1
    assert Schedule(warmup=30).warmup_steps(200) == 30
    assert Schedule(warmup=0.5).value(1.0, 0, 200) == pytest.approx(0.01)


def test_a_warm_up_longer_than_the_run_never_ends():
    schedule = Schedule(warmup=500)
    assert schedule.value(1.0, 9, 10) == pytest.approx(10 / 500)


def test_unknown_length():
    assert Schedule(shape="constant", warmup=4).value(1.0, 1, None) == 0.5
    assert Schedule(shape="constant", warmup=4).value(1.0, 99, None) == 1.0
    for schedule in (Schedule(shape="cosine"), Schedule(shape="linear"), Schedule(shape="constant", warmup=0.1)):
        with pytest.raises(ValueError, match="number of steps"):
            schedule.value(1.0, 0, None)


def test_is_a_config():
    schedule = parse(Schedule, {"shape": "linear", "warmup": "1e2", "end": "1e-5"})
    assert schedule == Schedule(shape="linear", warmup=100, end=1e-5)
    assert parse(Schedule, dump(schedule)) == schedule
    with pytest.raises(ConfigError, match="cosin"):
        parse(Schedule, {"shape": "cosin"})
