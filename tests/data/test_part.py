"""A held-out share of a source: by group, stable as the data grows, and nothing on both sides."""

from __future__ import annotations

import pytest
from data_fakes import write

from mmrep.config import ConfigError, component


def sides(folder, n, *, share=0.3, group="g", seed=0):
    rows = "".join(f"text {i},{i // 3}\n" for i in range(n))
    table = {"type": "table", "files": str(write(folder / f"{n}.csv", f"caption,g\n{rows}")), "group": group}
    return [
        component("sources", "part", source=table, share=share, keep=keep, seed=seed).build()
        for keep in ("rest", "held-out")
    ]


def captions(source):
    return [source[i].fields["caption"] for i in range(len(source))]


def test_the_sides_are_the_whole_and_no_group_is_on_both(tmp_path):
    rest, held = sides(tmp_path, 300)
    assert sorted(captions(rest) + captions(held)) == sorted(f"text {i}" for i in range(300))
    assert not set(rest.groups()) & set(held.groups())
    assert len(held) / 300 == pytest.approx(0.3, abs=0.1)
    assert captions(held) == sorted(captions(held), key=lambda text: int(text.split()[1]))  # the source's order
    assert held.column("caption") == captions(held)


def test_a_group_keeps_its_side_when_the_data_grows_and_changes_it_with_the_seed(tmp_path):
    before, after, other = (sides(tmp_path, n, seed=seed)[1] for n, seed in ((150, 0), (300, 0), (150, 1)))
    assert captions(after)[: len(before)] == captions(before)
    assert captions(other) != captions(before)
    assert before.fingerprint() != other.fingerprint()


def test_without_groups_each_record_is_its_own(tmp_path):
    rest, held = sides(tmp_path, 300, group=None)
    assert not rest.has_group
    assert len(held) / 300 == pytest.approx(0.3, abs=0.08)
    thirds = {int(text.split()[1]) // 3 for text in captions(held)} & {int(t.split()[1]) // 3 for t in captions(rest)}
    assert thirds  # what would have been a group is split


def test_a_bad_record_stays_a_bad_record_and_an_empty_side_is_refused(tmp_path):
    lines = "".join(f'{{"caption": "t", "g": {i}}}\n' for i in range(60)) + "no json\n"
    table = {"type": "table", "files": str(write(tmp_path / "t.jsonl", lines))}
    parts = [component("sources", "part", source=table, share=0.5, keep=k).build() for k in ("rest", "held-out")]
    bad = [part.record(i) for part in parts for i in range(len(part)) if not hasattr(part.record(i), "fields")]
    assert [note.cause for note in bad] == ["malformed row"]
    with pytest.raises(ConfigError, match=r"keep: 'held-out' is empty: share 1e-09 of 300 records"):
        sides(tmp_path, 300, share=1e-9)


def test_a_stream_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is a stream"):
        component(
            "sources", "part", source={"type": "webdataset", "shards": str(write(tmp_path / "a.tar", ""))}
        ).build()
