"""N steps straight = some steps, ``kill -9``, resume, another ``kill -9``, …: bitwise, wherever the kills fall."""

from __future__ import annotations

import json
import random
import signal

import pytest
import torch

from mmrep.training import checkpoint
from tests.training.killable import DATA, STEPS, write_data
from tests.training.toys import lines


@pytest.fixture(scope="module")
def straight(tmp_path_factory, server):
    """Per kind of data, where it is and what a run without kills and without workers gives."""
    folder = tmp_path_factory.mktemp("straight")
    write_data(folder)
    done = {}

    def of(data, **options):
        key = (data, *options.items())
        if key not in done:
            done[key] = folder / "-".join(map(str, key))
            assert not server.run(out=str(done[key]), data=data, folder=str(folder), workers=0, **options)
        return folder, done[key]

    return of


def differences(one, other):
    """What is not bitwise the same at the end of two runs: weights, averages, queues, optimizer, generators, place."""
    one, other = (checkpoint.latest(folder / "checkpoints") for folder in (one, other))
    assert one.name == other.name
    found = []
    names = sorted(file.stem for file in one.glob("*.safetensors"))
    assert names == sorted(file.stem for file in other.glob("*.safetensors"))
    for name in names:
        a, b = (checkpoint.load_packet(path, name) for path in (one, other))
        if name.startswith("rank-"):
            a.data["counters"].pop("seconds"), b.data["counters"].pop("seconds")
        assert a.tensors.keys() == b.tensors.keys()
        found += [f"{name}/{key}" for key, value in a.tensors.items() if not torch.equal(value, b.tensors[key])]
        found += [] if a.data == b.data else [f"{name}: {a.data} != {b.data}"]
    return found


def ids(out):
    """Ids by step, of every attempt."""
    rows = [json.loads(line) for line in out.with_suffix(".ids").read_text().splitlines()]
    return {(step, rank, tuple(ids)) for step, rank, ids in rows}


def chain(server, out, kills, **arguments):
    """A run that is killed and resumed again and again, and in the end finished. Returns how many kills struck."""
    struck = 0
    for kill in kills:
        options = {"kill": kill} if isinstance(kill, tuple) else {"die_at": kill}
        struck += server.run(out=str(out), seed=seed_of(out), **options, **arguments)
    assert not server.run(out=str(out), seed=seed_of(out), **arguments)
    return struck


def seed_of(out):
    """Of the weights that a run starts with: others, once they should come from a checkpoint."""
    return 9 if checkpoint.steps(out / "checkpoints") else 0


def draw_kills(draw, n):
    """Two in three from outside, at a random time after a random step; the others amid a random save."""
    steps = sorted(draw.randrange(1, STEPS) for _ in range(n))
    return [(step, draw.random() * 0.03) if draw.random() < 0.67 else draw.randrange(1, 45) for step in steps]


def check(server, straight, out, data, workers, kills):
    folder, expected = straight(data)
    struck = chain(server, out, kills, data=data, folder=str(folder), workers=workers)
    assert differences(expected, out) == []
    assert lines(out) == lines(expected)
    assert ids(out) == ids(expected)
    return struck


def test_the_run_to_compare_with_has_what_it_should(straight):
    for data in DATA:
        _, out = straight(data)
        newest = checkpoint.latest(out / "checkpoints")
        module = checkpoint.load_packet(newest, "module").tensors
        assert {"objectives.remember.queue", "objectives.remember.centre", "average.average_0"} <= set(module)
        assert module["objectives.remember.filled"] == STEPS
        rank = checkpoint.load_packet(newest, "rank-00000")
        assert rank.data["loader"]["epoch"] == 3
        assert {"rng/torch.cpu", "rng/python", "rng/numpy"} <= set(rank.tensors)
        assert {row["step"] for row in lines(out)} == {3, 5, 6, 9, 10, 12, 15, 18}
        assert len(ids(out)) == STEPS
        assert len(list((out / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", DATA)
def test_a_few_kills(tmp_path, server, straight, data, workers):
    draw = random.Random(f"{data} {workers}")
    kills = [(draw.randrange(5, 8), draw.random() * 0.03), draw.randrange(10, 30), (draw.randrange(13, 16), 0.0)]
    assert check(server, straight, tmp_path / "run", data, workers, kills) >= 2  # the last may come too late


def test_one_of_two_processes_is_killed_and_the_streams_are_uneven(tmp_path, server, straight):
    """One process has 7 batches an epoch and the other 3; resumed at the end of an epoch, neither may run ahead."""
    folder, _ = straight("webdataset")
    arguments = {"data": "webdataset", "folder": str(folder), "workers": 0, "processes": 2}
    expected, out = tmp_path / "straight", tmp_path / "killed"
    assert server.start(out=str(expected), **arguments) == [0, 0]
    assert server.start(out=str(out), die_after=(13, 1), **arguments) == [1, -signal.SIGKILL]
    newest = checkpoint.latest(out / "checkpoints")
    assert newest.name == "step-00000012"
    for rank in ("rank-00000", "rank-00001"):
        loader = checkpoint.load_packet(newest, rank).data["loader"]
        assert (loader["epoch"], loader["position"]) == (3, 3)
    assert server.start(out=str(out), seed=9, **arguments) == [0, 0]
    assert differences(expected, out) == []
    assert lines(out) == lines(expected)
    assert ids(out) == ids(expected)


def test_a_finished_stream_is_not_begun_again(tmp_path, server, straight):
    folder, _ = straight("hf-stream")
    arguments = {"out": str(tmp_path / "run"), "data": "hf-stream", "folder": str(folder), "workers": 0, "epochs": 2}
    assert not server.run(**arguments)
    before = lines(tmp_path / "run")
    assert not server.run(**arguments)
    assert lines(tmp_path / "run") == before
    assert checkpoint.steps(tmp_path / "run/checkpoints")[-1] == 10
    assert max(step for step, *_ in ids(tmp_path / "run")) == 10


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", DATA)
def test_twenty_random_kills(tmp_path, server, straight, data, workers):
    draw = random.Random(f"20 {data} {workers}")
    struck, runs = 0, 0
    while struck < 20:
        struck += check(server, straight, tmp_path / f"run-{runs}", data, workers, draw_kills(draw, 4))
        runs += 1
        assert runs < 20, f"only {struck} kills struck"
    print(f"{data}, {workers} workers: {struck} kills in {runs} runs")
