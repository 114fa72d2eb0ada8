from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch

from mmrep.training import checkpoint
from mmrep.training.checkpoint import Packet, latest, load_packet, load_state, path_of, save, steps, verify
from mmrep.training.errors import CheckpointError


def packets(value: float):
    return {"module": Packet({"w": torch.full((40,), value)}), "rank-00000": Packet({}, {"value": value}).to_bytes()}


def write(folder, step, **options):
    return save(folder, step, packets(step), {"note": step}, **options)


def is_whole_and_right(path):
    verify(path)
    step = int(path.name.removeprefix("step-"))
    assert load_state(path)["note"] == step
    assert torch.equal(load_packet(path, "module").tensors["w"], torch.full((40,), float(step)))
    assert load_packet(path, "rank-00000").data == {"value": step}


def test_packet_round_trip(tmp_path):
    tied = torch.randn(3, 4)
    tensors = {
        "a": tied, "b": tied, "view": tied.T, "half": torch.randn(2).bfloat16(), "scalar": torch.tensor(3.5),
        "flags": torch.tensor([True, False]), "none": torch.zeros(0, 3), "nan": torch.tensor([torch.nan, torch.inf]),
    }  # fmt: skip
    data = {"pi": 0.1 + 0.2, "none": None, "list": [1, "two"]}
    (tmp_path / "p").write_bytes(Packet(tensors, data).to_bytes())
    found = Packet.read(tmp_path / "p")
    assert found.data == data
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name].nan_to_num(7), tensor.nan_to_num(7))


def test_shared_memory_is_written_once():
    tied = torch.randn(1000)
    assert len(Packet({"a": tied, "b": tied}).to_bytes()) < 1.5 * len(Packet({"a": tied}).to_bytes())


def test_holds_json_and_safetensors_only(tmp_path):
    path = write(tmp_path, 7)
    assert path == tmp_path / "step-00000007"
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}
    assert b"pickle" not in b"".join(p.read_bytes() for p in path.iterdir())
    is_whole_and_right(path)


def test_keeps_the_newest(tmp_path):
    for step in (2, 4, 6, 8, 10):
        write(tmp_path, step, keep=2)
    assert steps(tmp_path) == [8, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000008", "step-00000010"]
    assert latest(tmp_path) == path_of(tmp_path, 10)


def test_order_is_by_number_not_by_name(tmp_path):
    write(tmp_path, 99_999_999)
    write(tmp_path, 100_000_000)
    assert latest(tmp_path) == tmp_path / "step-100000000"


def test_nothing_there(tmp_path):
    assert latest(tmp_path / "no") is None
    (tmp_path / "step-abc").mkdir()
    (tmp_path / ".tmp-step-00000009").mkdir()
    assert latest(tmp_path) is None


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
@pytest.mark.parametrize("name", ["module.safetensors", "rank-00000.safetensors", "state.json", "manifest.json"])
def test_a_damaged_one_is_skipped_with_the_reason(tmp_path, caplog, damage, name):
    write(tmp_path, 1)
    damage(write(tmp_path, 2) / name)
    if (damage, name) == (_flip, "manifest.json"):
        (tmp_path / "step-00000002" / name).write_text("[]")
    assert latest(tmp_path) == path_of(tmp_path, 1)
    assert "skipping a damaged checkpoint" in caplog.text
    assert "step-00000002" in caplog.text


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path):
    _flip(write(tmp_path, 2) / "module.safetensors")
    is_whole_and_right(write(tmp_path, 2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_a_whole_one_of_the_same_step_is_left_alone(tmp_path):
    path = write(tmp_path, 2)
    before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    write(tmp_path, 2)
    assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == before


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(handle):
        found = os.fstat(handle)
        events.append(("folder" if stat.S_ISDIR(found.st_mode) else "file", found.st_ino))
        fsync(handle)

    def watched_rename(self, target):
        events.append(("rename", {p.name: p.stat().st_ino for p in self.iterdir()} | {".": self.stat().st_ino}))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    write(tmp_path, 1)
    at = next(i for i, e in enumerate(events) if e[0] == "rename")
    inodes = dict(events[at][1])
    assert ("folder", inodes.pop(".")) in events[:at]
    assert {("file", inode) for inode in inodes.values()} <= set(events[:at])
    assert len(inodes) == 4
    assert ("folder", tmp_path.stat().st_ino) in events[at:]


def test_killed_between_any_two_file_operations(tmp_path):
    """Each child dies at its n-th file operation; what it leaves must be the old checkpoint or the new one."""
    start = tmp_path / "start"
    for step in (1, 2):
        write(start, step, keep=2)
    seen = set()
    for n in range(1, 500):
        folder = tmp_path / "run"
        shutil.copytree(start, folder)
        if _dies(lambda folder=folder: write(folder, 3, keep=2), n):
            found = latest(folder)
            assert found is not None, f"killed at operation {n}: nothing left"
            assert found.name in {"step-00000002", "step-00000003"}
            is_whole_and_right(found)
            seen.add(found.name)
            for step in steps(folder):  # nothing half-removed keeps a checkpoint's name either
                is_whole_and_right(path_of(folder, step))
            is_whole_and_right(write(folder, 4, keep=2))
            assert not [p for p in folder.iterdir() if p.name.startswith(".tmp")]
            shutil.rmtree(folder)
        else:
            break
    else:
        pytest.fail("never finished")
    assert n > 15
    assert seen == {"step-00000002", "step-00000003"}


def _dies(action, n):
    """Fork; die without any clean-up at the n-th audited file operation. False if the action was done before."""
    child = os.fork()
    if child == 0:
        left = [n]
        watched = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir"}

        def hook(event, args):
            if event in watched:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        sys.addaudithook(hook)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in {0, 9}
    return status == 9


def test_disk_full_is_said_and_the_last_one_stands(tmp_path, monkeypatch):
    write(tmp_path, 1)
    original = checkpoint._write
    for name in ("module.safetensors", "rank-00000.safetensors", "state.json", "manifest.json"):

        def full(path, content, name=name):
            if path.name == name:
                path.write_bytes(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(path, content)

        monkeypatch.setattr(checkpoint, "_write", full)
        with pytest.raises(CheckpointError, match=r"step 2 .*No space left on device.*step-00000001 stands"):
            write(tmp_path, 2)
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    is_whole_and_right(latest(tmp_path))


def test_a_real_limit_on_file_size(tmp_path):
    write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"File too large.*step-00000001 stands"):
            save(tmp_path, 2, {"module": Packet({"w": torch.zeros(10_000)})}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert latest(tmp_path) == path_of(tmp_path, 1)
    assert json.loads((path_of(tmp_path, 1) / "state.json").read_text())["step"] == 1


def test_the_first_one_fails(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="there is no earlier one"):
        write(tmp_path / "file", 1)
