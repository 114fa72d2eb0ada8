from __future__ import annotations

import json

import pytest

from mmrep.data.quarantine import FILE, Quarantine, TooManyBadSamples
from mmrep.data.sample import Quarantined


def note(id, field="image", cause="truncated image"):
    return Quarantined(str(id), field, cause, f"détail of {id}")


def lines(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_each_sample_and_field_is_listed_once(tmp_path):
    quarantine = Quarantine(tmp_path, limit=1.0)
    quarantine.add([note(1), note(2)], 10)
    quarantine.add([note(1), note(1, "caption", "empty text")], 20)
    assert lines(tmp_path) == [note(1).as_dict(), note(2).as_dict(), note(1, "caption", "empty text").as_dict()]
    assert "2 samples" in quarantine.summary()
    assert "2 truncated image, 1 empty text" in quarantine.summary()


def test_nothing_bad_writes_nothing(tmp_path):
    quarantine = Quarantine(tmp_path, limit=0.0)
    quarantine.add([], 5000)
    assert quarantine.summary() == ""
    assert not (tmp_path / FILE).exists()


def test_the_run_stops_past_the_share_and_says_why(tmp_path):
    quarantine = Quarantine(tmp_path, limit=0.1, minimum=40)
    quarantine.add([note(i) for i in range(6)], 39)  # 15 %, too early to tell
    quarantine.add([], 60)  # 10 %: at the limit
    with pytest.raises(TooManyBadSamples) as caught:
        quarantine.add([note(9, "caption", "empty text")], 61)
    for words in ("11.5% of the 61", "10.0%", "6 truncated image, 1 empty text", "'9'", "détail of 0", FILE):
        assert words in str(caught.value)


def test_the_share_counts_readings_so_that_it_means_the_same_in_every_epoch():
    quarantine = Quarantine(None, limit=0.1, minimum=10)
    for epoch in range(1, 30):
        quarantine.add([note(1)], epoch * 10)
    with pytest.raises(TooManyBadSamples):
        quarantine.add([note(1), note(1)], 300)


def test_a_limit_of_zero_tolerates_none():
    with pytest.raises(TooManyBadSamples):
        Quarantine(None, limit=0).add([note(1)], 5)


def test_a_run_of_which_nothing_can_be_read_stops_early():
    quarantine = Quarantine(None, limit=0.5)
    quarantine.add([note(i) for i in range(16)], 16)
    with pytest.raises(TooManyBadSamples):
        quarantine.add([note(i) for i in range(16, 32)], 32)


def test_a_resumed_run_goes_on_with_the_file_and_mends_a_torn_line(tmp_path):
    Quarantine(tmp_path, limit=1).add([note(1), note(2)], 10)
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"id": "3", "fie')
    quarantine = Quarantine(tmp_path, limit=1)
    assert quarantine.bad == 2
    quarantine.add([note(2), note(3)], 30)
    written = (tmp_path / FILE).read_text().splitlines()
    assert written[2] == '{"id": "3", "fie'
    assert json.loads(written[3])["id"] == "3"
    assert len(written) == 4
    assert "3 samples" in quarantine.summary()


def test_two_processes_share_a_file(tmp_path):
    a, b = (Quarantine(tmp_path, limit=0.5, processes=2) for _ in range(2))
    a.add([note(1)], 10)
    b.add([note(2)], 10)
    a.add([note(3)], 20)
    assert [line["id"] for line in lines(tmp_path)] == ["1", "2", "3"]
    assert Quarantine(tmp_path, limit=0.5, processes=2).bad == 1.5


def test_a_share_is_between_0_and_1():
    with pytest.raises(ValueError, match="5"):
        Quarantine(None, limit=5)
