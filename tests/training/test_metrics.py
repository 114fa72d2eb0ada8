from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mmrep.training.checkpoint import Packet
from mmrep.training.metrics import MetricsLog, temperatures
from mmrep.training.progress import Progress


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_means_over_the_window(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.add({"loss": torch.tensor(1.0), "sometimes": torch.tensor([4.0])}, 8)
    log.add({"loss": torch.tensor(3.0, requires_grad=True)}, 4)
    line = log.flush(2, {"lr": 0.5}, 3.0)
    assert line == {"step": 2, "lr": 0.5, "loss": 2.0, "sometimes": 4.0, "samples": 12, "samples_per_second": 4.0}
    log.add({"loss": torch.tensor(7.0)}, 1)
    log.flush(3, {}, 1.0)
    assert [row["loss"] for row in read(tmp_path / "m.jsonl")] == [2.0, 7.0]
    assert log.last["loss"] == 7.0


def test_adding_does_not_wait_for_the_device():
    """On the meta device any read of a value raises, as any read stalls a GPU."""
    log = MetricsLog(None)
    for _ in range(3):
        log.add({"loss": torch.zeros((), device="meta")}, 8)
    with pytest.raises((RuntimeError, NotImplementedError)):
        log.flush(3, {}, 1.0)


def test_an_added_tensor_may_be_changed_later():
    log = MetricsLog(None)
    value = torch.tensor(1.0)
    log.add({"loss": value}, 1)
    value.fill_(9.0)
    assert log.flush(1, {}, 1.0)["loss"] == 1.0


def test_rewind(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 4, "eval/r1": 1}\n{"step": 6}\n{"step": 1')
    MetricsLog(path).rewind(4)
    assert read(path) == [{"step": 2}, {"step": 4}, {"step": 4, "eval/r1": 1}]
    MetricsLog(tmp_path / "none").rewind(4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl"]


def test_an_open_window_is_state(tmp_path):
    straight, first = MetricsLog(None), MetricsLog(None)
    values = torch.randn(5, generator=torch.Generator().manual_seed(0))
    for v in values:
        straight.add({"loss": v}, 2)
    for v in values[:3]:
        first.add({"loss": v}, 2)
    (tmp_path / "p").write_bytes(first.state().to_bytes())
    second = MetricsLog(None)
    second.load_state(Packet.read(tmp_path / "p"), torch.device("cpu"))
    for v in values[3:]:
        second.add({"loss": v}, 2)
    assert second.flush(5, {}, 1.0) == straight.flush(5, {}, 1.0)


def test_windows_of_other_processes_are_merged(tmp_path):
    """Two processes had three steps open, three go on for two: the line is that of one process over five steps."""
    values = torch.randn(5, generator=torch.Generator().manual_seed(0))
    before, now = [MetricsLog(None) for _ in range(2)], [MetricsLog(None) for _ in range(3)]
    for v in values[:3]:
        for rank, log in enumerate(before):
            log.add({"loss": v + 2 * rank - 1} | ({"rare": v} if rank else {}), 4)
    packets = []
    for rank, log in enumerate(before):
        (tmp_path / str(rank)).write_bytes(log.state().to_bytes())
        packets.append(Packet.read(tmp_path / str(rank)))
    for rank, log in enumerate(now):
        log.load_merged(packets, [9, 8, 7][rank], torch.device("cpu"))
        for v in values[3:]:
            log.add({"loss": v + rank - 1}, [3, 3, 2][rank])
    states = [log.state() for log in now]
    loss = sum(s.tensors["loss"].item() for s in states) / sum(s.data["counts"]["loss"] for s in states)
    assert loss == pytest.approx(values.mean().item(), rel=1e-6)
    rare = sum(s.tensors["rare"].item() for s in states) / sum(s.data["counts"]["rare"] for s in states)
    assert rare == pytest.approx(values[:3].mean().item(), rel=1e-6)
    assert sum(s.data["samples"] for s in states) == 5 * 8


def test_lines_wait_for_room_on_the_disk(tmp_path, monkeypatch, caplog):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"step": 1})

    class Full:
        """A disk that takes the first half of a line."""

        def __init__(self, file):
            self.file, self.left = file, 5

        def write(self, content):
            taken = self.file.write(content[: self.left])
            self.left -= taken
            if not taken:
                raise OSError(28, "No space left on device")
            return taken

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    original = type(tmp_path).open
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "open", lambda path, *a, **k: Full(original(path, *a, **k)))
        log.write({"step": 2})
        log.write({"step": 3})
        with pytest.raises(OSError, match="No space"):
            log.sync()
    assert caplog.text.count("its lines wait in memory") == 1
    log.sync()
    assert read(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}]
    log.write({"step": 4})
    assert read(tmp_path / "m.jsonl")[-1] == {"step": 4}


def test_rewinding_takes_no_room_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n')
    before = path.stat().st_ino
    MetricsLog(path).rewind(2)
    assert read(path) == [{"step": 2}]
    assert path.stat().st_ino == before


def test_only_the_main_process_writes(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", main=False)
    log.add({"loss": torch.tensor(1.0)}, 1)
    log.flush(1, {}, 1.0)
    log.rewind(0)
    assert not list(tmp_path.iterdir())


def test_lines_are_json_even_if_numbers_are_not_finite(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.add({"loss": torch.tensor(torch.inf)}, 1)
    log.flush(1, {}, 1.0)

    def refuse(name):
        raise AssertionError(name)

    assert json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)["loss"] is None


def test_temperatures():
    part = nn.Module()
    part.log_scale = nn.Parameter(torch.tensor([2.0]))
    root = nn.ModuleDict({"model": nn.ModuleDict({"audio-text": part}), "other": nn.Linear(1, 1)})
    assert temperatures(root) == {"scale/audio-text": pytest.approx(7.389056)}


def test_a_compiled_temperature_keeps_its_name():
    part = nn.Module()
    part.log_scale = nn.Parameter(torch.tensor([2.0]))
    root = nn.ModuleDict({"audio-text": torch.compile(part, backend="eager")})
    assert temperatures(root) == {"scale/audio-text": pytest.approx(7.389056)}


class _Terminal:
    def __init__(self, tty):
        self.tty, self.text = tty, ""

    def isatty(self):
        return self.tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize(("tty", "main", "drawn"), [(True, True, True), (True, False, False), (False, True, False)])
def test_a_bar_only_for_somebody_who_looks(monkeypatch, tty, main, drawn):
    terminal = _Terminal(tty)
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(4, done=1, main=main)
    progress.advance()
    progress.show({"loss": 1.2345678, "samples_per_second": 10.0})
    progress.close()
    assert bool(terminal.text) is drawn
    if drawn:
        assert "2/4" in terminal.text
        assert "loss=1.235" in terminal.text
