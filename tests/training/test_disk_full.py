"""A disk that gets full: the run says so, the last whole checkpoint stands, and the run can be resumed from it."""

from __future__ import annotations

import pytest

from mmrep.training import checkpoint
from mmrep.training.errors import CheckpointError
from mmrep.training.metrics import MetricsLog
from tests.training.killable import write_data
from tests.training.test_kill_points import differences, seed_of
from tests.training.toys import lines, same, toy_trainer


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    write_data(folder)
    assert not server.run(out=str(folder / "run"), data="map", folder=str(folder), workers=0)
    return folder, folder / "run"


def limited(server, out, folder, **options):
    return server.start(program="tests.training.full_disk:limited", out=str(out), folder=str(folder), **options)


def sizes(out):
    return {file.name: file.stat().st_size for file in checkpoint.latest(out / "checkpoints").glob("*")}


def is_resumed(server, out, folder, straight):
    """No temporary is left, and the run goes on as if nothing had been."""
    assert all(entry.name.startswith("step-") for entry in (out / "checkpoints").iterdir())
    assert not server.run(out=str(out), data="map", folder=str(folder), workers=0, seed=seed_of(out))
    assert differences(straight, out) == []
    assert lines(out) == lines(straight)


@pytest.mark.parametrize("full", [lambda s: 1, lambda s: s["state.json"] - 1, lambda s: s["rank-00000.safetensors"] - 1,
                                  lambda s: max(s.values()) - 1])  # fmt: skip
def test_a_write_fails(tmp_path, server, straight, full):
    folder, expected = straight
    out = tmp_path / "run"
    assert limited(server, out, folder, size=full(sizes(expected)), at=6, last=True) == [1]
    said = server.log().splitlines()[-1]
    assert f"could not save the checkpoint of step 8 in {out}/checkpoints: [Errno 27] File too large" in said
    assert f"{out}/checkpoints/step-00000004 stands; make room and go on with --resume" in said
    assert checkpoint.latest(out / "checkpoints").name == "step-00000004"
    is_resumed(server, out, folder, expected)


def test_the_run_goes_on_where_another_save_follows(tmp_path, server, straight):
    """Two saves fail, then there is room again: nothing is lost, the lines of metrics.jsonl neither."""
    folder, expected = straight
    out = tmp_path / "run"
    assert limited(server, out, folder, size=1, at=6, until=14, last=False) == [0]
    log = server.log()
    assert log.count("the run goes on and tries again at the next save") == 2
    assert "could not save the checkpoint of step 12" in log
    assert "metrics.jsonl: File too large; its lines wait in memory" in log
    assert differences(expected, out) == []
    assert lines(out) == lines(expected)


def test_three_failures_in_a_row_stop_the_run(tmp_path, server, straight):
    folder, expected = straight
    out = tmp_path / "run"
    assert limited(server, out, folder, size=1, at=6, last=False) == [1]
    assert "could not save the checkpoint of step 16" in server.log().splitlines()[-1]
    assert "step-00000004 stands; make room" in server.log().splitlines()[-1]
    is_resumed(server, out, folder, expected)


@pytest.mark.parametrize("checkpoints", [0.5, 1.4, 2.6])
def test_a_small_disk(tmp_path, server, straight, checkpoints):
    """Room for so many checkpoints, where two are kept and a third is written before the first goes."""
    folder, expected = straight
    out, mount = tmp_path / "run", tmp_path / "disk"
    mount.mkdir()
    pages = sum(-(-size // 4096) for size in sizes(expected).values())
    program = "tests.training.full_disk:small_disk"
    (status,) = server.start(
        program=program, out=str(out), folder=str(folder), size=int(checkpoints * pages) * 4096, mount=str(mount)
    )
    if status == 77:
        pytest.skip("nothing may be mounted here")
    assert status == 1
    said = server.log().splitlines()[-1]
    assert "No space left on device" in said
    assert ("stands" in said) is (checkpoints > 1)
    is_resumed(server, out, folder, expected)


def test_no_checkpoint_promises_lines_that_are_not_on_the_disk(tmp_path, monkeypatch):
    straight = toy_trainer(tmp_path / "a")
    straight.fit()
    original = MetricsLog._append

    def full(self, **options):
        if b'"step": 6' in self._unwritten:
            raise OSError(28, "No space left on device")
        original(self, **options)

    monkeypatch.setattr(MetricsLog, "_append", full)
    with pytest.raises(CheckpointError, match=r"No space left.*step-00000004 stands"):
        toy_trainer(tmp_path / "b").fit()
    monkeypatch.undo()
    toy_trainer(tmp_path / "b").fit(resume=True)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_a_full_disk_stops_the_run_and_it_can_be_resumed(tmp_path, monkeypatch):
    straight = toy_trainer(tmp_path / "a")
    straight.fit()
    original = checkpoint._write

    def full(path, content):
        if "step-00000004" not in str(path):
            raise OSError(28, "No space left on device")
        return original(path, content)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(CheckpointError, match=r"No space left.*step-00000004 stands"):
        toy_trainer(tmp_path / "b").fit()
    monkeypatch.undo()
    resumed = toy_trainer(tmp_path / "b", root=straight.root.__class__(seed=9))
    resumed.fit(resume=True)
    same(straight, resumed)


def test_no_checkpoint_is_written_without_what_the_root_keeps_beside_it(tmp_path):
    trainer, tries = toy_trainer(tmp_path, keep=9), []

    def write():
        tries.append(trainer.step)
        if trainer.step == 8:
            raise OSError(28, "No space left on device")

    trainer._state.before_save = write
    trainer.fit()
    assert tries == [4, 8, 12, 16, 20]
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 12, 16, 20]
