"""A run that is resumed by another number of processes, started for real, over gloo."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mmrep.training import checkpoint
from tests.training.elastic import BATCH, STEPS
from tests.training.killable import write_data
from tests.training.toys import lines

PROGRAM = "tests.training.elastic:run"


@pytest.fixture(scope="module")
def start(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)

    def start(out, processes, data="map", **options):
        return server.start(
            program=PROGRAM, processes=processes, out=str(out), data=data, folder=str(folder), **options
        )

    start.log = server.log
    return start


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert start(out, 1) == [0]
    return out


def legs(start, out, processes, **options):
    """One number of processes after another: each goes on from the newest checkpoint, three steps before the death of
    its predecessor. Returns by leg the first and the last step of it that count."""
    done = []
    for number, size in enumerate(processes):
        first = 5 * number + 1
        last = number == len(processes) - 1
        stop = {} if last else {"stop": first + 7}
        statuses = start(out, size, seed=9 * min(number, 1), **stop, **options)
        right = not any(statuses) if last else all(statuses)  # 9, or 1 where another was quicker to die
        assert right, f"{size} processes: {statuses}\n{start.log()}"
        done.append((size, first, STEPS if last else first + 4))
    return done


def read(out, size, rank):
    """Of the last attempt, by step: ids, ids of bad samples, random numbers, samples counted."""
    rows = (json.loads(line) for line in (out.parent / f"{out.name}-{size}-{rank}.jsonl").read_text().splitlines())
    return {step: found for step, *found in rows}


def global_order(out, done):
    """By step, the ids that were trained on, over all processes in the order of their ranks; and the bad ones."""
    found = {}
    for size, first, last in done:
        ranks = [read(out, size, rank) for rank in range(size)]
        for step in range(first, last + 1):
            found[step] = [[id for rank in ranks for id in rank[step][kind]] for kind in (0, 1)]
    return found


def weights(out):
    return checkpoint.load_packet(checkpoint.latest(out / "checkpoints"), "module").tensors


@pytest.mark.parametrize("processes", [(1, 2, 4), (2, 1)])
def test_it_goes_on_as_if_nothing_had_changed(start, straight, tmp_path, processes):
    out = tmp_path / "run"
    done = legs(start, out, processes)
    assert global_order(out, done) == global_order(straight, [(1, 1, STEPS)])
    for size, first, last in done:
        for step in range(first, last + 1):
            assert sum(read(out, size, rank)[step][3] for rank in range(size)) == BATCH * step
    found, expected = weights(out), weights(straight)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if value.dtype != torch.float64] == [
        "model.temperatures.default.log_scale"
    ]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    ours, theirs = lines(out), lines(straight)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [3, 6, 9, 12, 15, 18, 20]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert a["samples"] == b["samples"]  # of the window, however many processes it was open in
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-6), (a["step"], key)


def test_it_is_deterministic_says_what_is_not_and_every_process_draws_its_own(server, start, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert start(one, 1, stop=8, dropout=0.3) == [9]
    shutil.copytree(one, other)
    for out in (one, other):
        assert start(out, 2, seed=9, dropout=0.3) == [0, 0]
    assert "was written by 1 processes and this run has 2" in server.log()
    assert "dropout" in server.log()
    first, second = weights(one), weights(other)
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    assert all(start(tmp_path / "anew", 2, stop=3, dropout=0.3))
    fresh = [read(tmp_path / "anew", 2, rank)[1][2] for rank in (0, 1)]
    drawn = [read(one, 2, rank)[6][2] for rank in (0, 1)]
    assert drawn == [read(other, 2, rank)[6][2] for rank in (0, 1)]
    for numbers in zip(*fresh, *drawn, strict=True):  # of each generator: not the run's first numbers once more
        assert len(set(numbers)) == 4


def test_what_one_process_cannot_read_stops_all(server, start, tmp_path):
    assert all(start(tmp_path / "run", 2, stop=8))
    assert start(tmp_path / "run", 2, blind=1) == [1, 1]
    assert server.log().count("ResumeError: [Errno 2] No such file or directory") == 2


def test_a_stream_is_refused_with_the_reason_on_every_process(server, start, tmp_path):
    out = tmp_path / "run"
    assert start(out, 1, data="webdataset", stop=8) == [9]
    assert start(out, 2, data="webdataset") == [1, 1]
    assert server.log().count("each reads a part of the stream of its own") == 2
    assert "start 1 processes" in server.log()
    assert start(out, 1, data="webdataset") == [0]
