"""Which frames are read: closed forms, and every frame can be reached."""

from __future__ import annotations

import numpy as np
import pytest

from mmrep.config import ConfigError, component
from mmrep.modalities.video.sampling import Sampling, at_rate, choose, ends, phases, uniform


def regular(count: int, fps: float = 10.0) -> tuple[np.ndarray, float]:
    return np.arange(count) / fps, count / fps


def test_uniform_reads_the_middle_of_equal_parts():
    assert uniform(100, 4).tolist() == [12, 37, 62, 87]
    assert uniform(10, 3).tolist() == [1, 5, 8]
    assert uniform(8, 8).tolist() == list(range(8))
    for count in (9, 17, 50):
        want = [int((2 * i + 1) * count // (2 * 8)) for i in range(8)]
        assert uniform(count, 8).tolist() == want


def test_uniform_of_a_short_video_reads_every_frame_once():
    assert uniform(3, 8).tolist() == [0, 1, 2]
    assert uniform(1, 8).tolist() == [0]


def test_at_rate_takes_the_frame_that_is_shown_in_the_middle_clip():
    times, end = regular(100)
    # 4 frames at 2 a second are 1.5 s from first to last: the clip begins at (10 - 1.5) / 2 = 4.25 s.
    assert at_rate(times, end, 4, 2.0).tolist() == [42, 47, 52, 57]
    assert at_rate(times, end, 4, 2.0, phase=0.0).tolist() == [0, 5, 10, 15]
    assert at_rate(times, end, 4, 2.0, phase=0.999).tolist() == [84, 89, 94, 99]


def test_at_rate_goes_by_time_where_frames_last_differently():
    times = np.array([0.0, 0.1, 2.0, 2.1])
    assert at_rate(times, 3.0, 3, 1.0, phase=0.0).tolist() == [0, 1, 2]
    assert at_rate(times, 3.0, 6, 2.0, phase=0.0).tolist() == [0, 1, 1, 1, 2, 3]


def test_at_rate_ends_with_a_short_video():
    times, end = regular(10)
    assert at_rate(times, end, 8, 2.0).tolist() == [0, 5]  # 1 s long: 0 s, 0.5 s, and 1.0 s is past the end
    assert at_rate(times, end, 12, 10.0).tolist() == list(range(10))
    assert at_rate(np.zeros(1), 1e-6, 8, 10.0).tolist() == [0]


@pytest.mark.parametrize("sampling", ["uniform", "fps"])
@pytest.mark.parametrize("count", [5, 23, 60])
def test_every_frame_can_be_reached_and_no_other(sampling: str, count: int):
    times, end = regular(count)
    how = Sampling(frames=4, sampling=sampling, fps=2.0)
    reached = set()
    for phase in np.linspace(0, 1 - 2**-24, 997):
        reached |= set(choose(times, end, how, [phase]).ravel().tolist())
    assert reached == set(range(count)) if sampling == "uniform" or end > 1.5 else reached <= set(range(count))


def test_clips_lie_evenly_and_are_equally_long():
    assert phases(1) == [0.5]
    assert phases(4) == [0.125, 0.375, 0.625, 0.875]
    times, end = regular(100)
    how = Sampling(frames=2, clips=2)
    assert choose(times, end, how, phases(2)).tolist() == [[12, 62], [37, 87]]
    how = Sampling(frames=4, sampling="fps", fps=2.0)
    assert choose(times, end, how, phases(2)).tolist() == [[21, 26, 31, 36], [63, 68, 73, 78]]


@pytest.mark.parametrize("sampling", ["uniform", "fps"])
def test_a_short_video_is_filled_up_or_stays_short(sampling: str):
    times, end = regular(3)
    fields = {"frames": 5, "sampling": sampling, "fps": 10.0}
    assert choose(times, end, Sampling(**fields), [0.5]).tolist() == [[0, 1, 2, 2, 2]]
    assert choose(times, end, Sampling(**fields, short="mask"), phases(2)).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_wrong_sampling_says_what_is_allowed():
    for fields, message in [
        ({"frames": 0}, "greater than or equal to 1"),
        ({"sampling": "unifrom"}, "did you mean 'uniform'"),
        ({"fps": 0}, "greater than 0"),
        ({"short": "loop"}, "repeat"),
    ]:
        with pytest.raises(ConfigError, match=message):
            component("encoders", "video-transformer", **fields)


def test_ends_reads_the_first_and_the_last_frame_whatever_the_phase():
    assert ends(10, 4).tolist() == [0, 3, 6, 9]
    assert ends(3, 4).tolist() == [0, 0, 1, 2]
    assert ends(5, 1).tolist() == [0]
    times, end = regular(10)
    how = Sampling(frames=4, sampling="ends")
    assert choose(times, end, how, [0.1, 0.9]).tolist() == [[0, 3, 6, 9]] * 2
