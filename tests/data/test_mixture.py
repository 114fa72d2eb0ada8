"""Mixtures: exact proportions, stated ends of an epoch, fields that meet, ids that never clash."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from data_fakes import TinyText, make_reader, png, write
from test_loader import drawn, ids
from test_webdataset import shard

from mmrep.config import ConfigError, component, dump, parse
from mmrep.data.limited import Limited
from mmrep.data.loader import BatchLoader, evaluation_items
from mmrep.data.mixture import MixtureConfig
from mmrep.data.reader import Reader
from mmrep.data.sample import Quarantined, Sample


def part(name, n, weight=None, **fields):
    """A list source of ``n`` captions."""
    records = [{"caption": f"{name} {i}", "k": i} for i in range(n)]
    return {"source": {"type": "list", "records": records, **fields}, **({} if weight is None else {"weight": weight})}


def build(stop="first", shared_groups=False, **parts):
    return component("sources", "mixture", parts=parts, stop=stop, shared_groups=shared_groups).build()


def text_loader(source, **options):
    return BatchLoader(source, Reader({"caption": TinyText()}), **{"batch_size": 10, "seed": 1, **options})


def epoch(source, seed=0):
    """The ids of a shuffled epoch."""
    if source.streaming:
        return [record.id for record in source.stream(seed=seed)]
    return [source.record(i).id for i in source.epoch_order(seed).tolist()]


def counts(found):
    return Counter(id.split("/")[0] for id in found)


WEIGHTED = [
    ("first", {"a": (100, 3), "b": (100, 1)}, {"a": 100, "b": 33}),
    ("all", {"a": (100, 3), "b": (100, 1)}, {"a": 300, "b": 100}),
    ("first", {"a": (70, 0.1), "b": (1000, 0.3), "c": (50, 0.6)}, {"a": 8, "b": 25, "c": 50}),
    ("all", {"a": (7, 0.5), "b": (30, 0.5)}, {"a": 30, "b": 30}),
    ("first", {"a": (40, 2.0)}, {"a": 40}),
    ("first", {"a": (30, 0.1), "b": (90, 0.3)}, {"a": 30, "b": 90}),  # 0.3 / 0.1 is less than 3 in binary
]


@pytest.mark.parametrize(("stop", "sizes", "expected"), WEIGHTED)
def test_an_epoch_keeps_the_weights_exactly_and_all_along(stop, sizes, expected):
    source = build(stop, **{name: part(name, n, weight) for name, (n, weight) in sizes.items()})
    total = sum(Fraction(str(weight)) for _, weight in sizes.values())
    for seed in range(4):
        found = epoch(source, seed)
        assert counts(found) == expected
        assert len(found) == source.epoch_length
        assert len(source) == sum(n for n, _ in sizes.values())
        for stopped in range(1, len(found)):
            done = counts(found[:stopped])
            for name, (_, weight) in sizes.items():
                assert abs(done[name] - stopped * Fraction(str(weight)) / total) <= len(sizes)
        for name, (n, _) in sizes.items():
            times = Counter(id for id in found if id.startswith(name + "/"))
            assert max(times.values()) - min(times.values() if len(times) == n else [0]) <= 1  # pass after pass
    assert epoch(source, 0) == epoch(source, 0) != epoch(source, 1)
    turns = {tuple(id.split("/")[0] for id in epoch(source, seed)) for seed in range(8)}
    assert (len(turns) > 1) == (len(sizes) > 1)  # no part is always the first


@pytest.mark.parametrize("stop", ["first", "all"])
def test_without_weights_an_epoch_is_every_record_once(stop):
    source = build(stop, a=part("a", 5), b=part("b", 50), c=part("c", 9))
    everything = sorted(f"{name}/{i}" for name, n in (("a", 5), ("b", 50), ("c", 9)) for i in range(n))
    assert sorted(epoch(source)) == everything
    assert sorted(s.id for s in source.stream()) == everything
    assert counts(epoch(source)[:32])["b"] in range(22, 28)


def test_what_an_epoch_leaves_out_comes_in_another():
    source = build(a=part("a", 10, 1), b=part("b", 40, 1))
    epochs = [{id for id in epoch(source, seed) if id.startswith("b")} for seed in range(30)]
    assert all(len(found) == 10 for found in epochs)
    assert len(set.union(*epochs)) == 40


def test_read_in_order_it_is_every_record_once_whatever_the_weights():
    source = build(a=part("a", 4, 3), b=part("b", 12, 1))
    assert [s.id for s in source.stream()][:4] == ["b/0", "a/0", "b/1", "b/2"]
    assert counts(s.id for s in source.stream()) == {"a": 4, "b": 12}
    batches = drawn(text_loader(source, shuffle=False, drop_last=False, batch_size=6))
    assert [id for batch in batches for id in batch.ids] == [s.id for s in source.stream()]
    assert [source[i].id for i in range(16)] == [s.id for s in source.stream()]
    assert counts(s.id for s in Limited(source, 8).stream()) == {"a": 2, "b": 6}  # a smoke run sees every part


def test_a_sample_read_again_in_an_epoch_has_other_views():
    source = build("all", a=part("a", 4, 1), b=part("b", 12, 1))
    found = {}
    for batch in drawn(text_loader(source, batch_size=6)):
        for id, seed in zip(batch.ids, batch.seeds.tolist(), strict=True):
            found.setdefault(id, []).append(seed)
    assert all(len(seeds) == (3 if id.startswith("a") else 1) for id, seeds in found.items())
    assert len({seed for seeds in found.values() for seed in seeds}) == 24


def test_columns_meet_and_missing_ones_are_missing():
    a = part("a", 3)
    b = {"source": {"type": "list", "records": [{"title": "b", "image": png(0), "k": 7}], "id": "k", "label": "title"},
         "columns": {"caption": "title"}}  # fmt: skip
    source = build(a=a, b=b)
    assert set(source.columns) == {"caption", "k", "image"}
    found = {s.id: s for s in source.stream()}
    assert found["b/7"] == Sample("b/7", {"caption": "b", "image": png(0), "k": 7}, label="b")
    assert found["a/0"].fields == {"caption": "a 0", "k": 0}
    assert dict(zip(found, source.column("caption"), strict=True)) == {
        id: sample.fields["caption"] for id, sample in found.items()
    }
    assert dict(zip(found, source.column("image"), strict=True)) == {
        id: sample.fields.get("image") for id, sample in found.items()
    }
    reader = make_reader(group=False, views={})
    batch = next(iter(BatchLoader(source, reader, batch_size=4)))
    assert batch.present["caption"].all()
    assert batch.present["image"].tolist() == [id == "b/7" for id in batch.ids]


def test_two_columns_can_change_names():
    a = {"source": {"type": "list", "records": [{"x": 1, "y": 2}]}, "columns": {"x": "y", "y": "x"}}
    source = build(a=a, b=part("b", 1))
    assert next(s for s in source.stream() if s.id == "a/0").fields == {"x": 2, "y": 1}
    assert sorted(source.column("x"), key=str) == [2, None]


def test_labels_become_names_where_the_classes_differ(tmp_path):
    for path in ("one/cat/a.png", "one/dog/b.png", "two/dog/a.png", "same/cat/x.png", "same/dog/y.png"):
        write(tmp_path / path, png())
    folder = {
        name: {"source": {"type": "imagefolder", "path": f"{tmp_path}/{name}"}} for name in ("one", "two", "same")
    }
    differ = build(one=folder["one"], two=folder["two"])
    assert differ.class_names is None
    assert {s.id: s.label for s in differ.stream()} == {
        "one/cat/a.png": "cat", "one/dog/b.png": "dog", "two/dog/a.png": "dog",
    }  # fmt: skip
    equal = build(one=folder["one"], same=folder["same"])
    assert equal.class_names == ["cat", "dog"]
    assert sorted(s.label for s in equal.stream()) == [0, 0, 1, 1]


def test_groups_are_of_one_part_unless_shared():
    parts = {"a": part("a", 2, group="k"), "b": part("b", 2, group="k"), "c": part("c", 1)}
    source = build(**parts)
    assert source.has_group
    found = {s.id: s.group for s in source.stream()}
    assert found == {"a/0": "a/0", "a/1": "a/1", "b/0": "b/0", "b/1": "b/1", "c/0": None}
    assert dict(zip(found, source.groups(), strict=True)) == found
    shared = build(shared_groups=True, **parts)
    assert {s.id: s.group for s in shared.stream()} == {"a/0": 0, "a/1": 1, "b/0": 0, "b/1": 1, "c/0": None}
    assert shared.groups() == [s.group for s in shared.stream()]


def test_bad_records_keep_their_part():
    bad = {"source": {"type": "list", "records": [{"t": "x", "k": 1}, {"t": "y", "k": None}, {"t": " ", "k": 3}],
                      "id": "k"}, "columns": {"caption": "t"}}  # fmt: skip
    source = build(a=part("a", 2), bad=bad)
    notes = [
        item for _, item in evaluation_items(source, Reader({"caption": TinyText()})) if isinstance(item, Quarantined)
    ]
    assert {(n.id, n.field, n.cause) for n in notes} == {
        ("bad/#1", "", "missing id"),
        ("bad/3", "caption", "empty text"),
    }
    assert source.record_id(next(i for i in range(5) if "#1" in source.record(i).id)) == "bad/#1"


def test_a_mixture_of_mixtures():
    inner = {"source": {"type": "mixture", "parts": {"x": part("x", 6, 1), "y": part("y", 60, 1)}}, "weight": 1}
    source = build(inner=inner, b=part("b", 30, 2))
    found = epoch(source)
    assert counts(found) == {"inner": 12, "b": 24}
    assert Counter(id.split("/")[1] for id in found if id.startswith("inner")) == {"x": 6, "y": 6}
    assert len(set(found)) == 36


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("stop", ["first", "all"])
def test_steps_per_epoch_are_known_and_the_order_is_that_of_one_process(world, stop):
    source = build(stop, a=part("a", 23, 2), b=part("b", 31, 1))
    straight = drawn(text_loader(source), epochs=3)
    parts = [drawn(text_loader(source, rank=r, world_size=world), epochs=3) for r in range(world)]
    assert [batch.ids for batch in straight] == [[i for b in bs for i in b.ids] for bs in zip(*parts, strict=True)]
    assert len(straight) == 3 * text_loader(source).steps_per_epoch == 3 * (source.epoch_length // 10)


def stream_parts(tmp_path, a=(8, 3), b=(30, 1)):
    """Part a: shards of 4 samples; part b: a list."""
    for i in range(a[0] // 4):
        shard(tmp_path / f"{i}.tar", range(4))
    web = {"type": "webdataset", "shards": f"{tmp_path}/*.tar", "columns": {"caption": "txt"}}
    return {"a": {"source": web, "weight": a[1]}, "b": part("b", *b)}


def test_streams_keep_the_weights_too(tmp_path):
    source = build(**stream_parts(tmp_path, a=(32, 3), b=(30, 1)))
    assert source.streaming
    assert source.columns == ("caption", "k")
    for seed in range(3):
        found = epoch(source, seed)
        assert counts(found)["a"] == 32
        assert counts(found)["b"] in (10, 11)
        assert len(set(found)) == len(found)
        for stopped in range(1, len(found)):
            assert abs(counts(found[:stopped])["a"] - 0.75 * stopped) <= 2
    assert epoch(source, 1) == epoch(source, 1) != epoch(source, 2)
    assert len({id for seed in range(12) for id in epoch(source, seed) if id.startswith("b")}) == 30  # shuffled
    with pytest.raises(TypeError, match="stream"):
        len(source)


def test_streams_begin_anew_until_all_were_read(tmp_path):
    source = build("all", **stream_parts(tmp_path, a=(8, 3), b=(30, 1)))
    records = list(source.stream(seed=3))
    found = Counter(r.id for r in records)
    assert {id: n for id, n in found.items() if id.startswith("b")} == {f"b/{i}": 1 for i in range(30)}
    assert all(n in (11, 12) for id, n in found.items() if id.startswith("a"))
    assert {(r.id, r.times) for r in records} == {(id, n) for id, most in found.items() for n in range(most)}
    batches = drawn(text_loader(source, drop_last=False))
    assert len({seed for batch in batches for seed in batch.seeds.tolist()}) == len(records)


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_processes_share_a_stream_without_duplicates(tmp_path, parts):
    source = build(**stream_parts(tmp_path, a=(32, 1), b=(40, 1)))
    plain = [r.id for p in range(parts) for r in source.stream(p, parts)]
    assert sorted(plain) == sorted(s.id for s in source.stream())
    assert len(set(plain)) == len(plain) == 72
    shuffled = [[r.id for r in source.stream(p, parts, 5)] for p in range(parts)]
    together = [id for each in shuffled for id in each]
    assert len(set(together)) == len(together)
    assert len(together) > 40


def test_a_process_whose_piece_of_a_part_is_empty_reads_the_others(tmp_path):
    source = build("all", **stream_parts(tmp_path, a=(32, 1), b=(2, 1)))
    each = [[r.id for r in source.stream(p, 4, 5)] for p in range(4)]
    assert [sum(id.startswith("b") for id in ids) > 0 for ids in each] == [True, True, False, False]
    assert {id for ids in each for id in ids} == {s.id for s in source.stream()}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "parts: at least one"),
        ({"a": part("a", 3, 0)}, r"parts\.a\.weight: .*greater than 0, got 0"),
        ({"a": part("a", 3, -1.5)}, r"parts\.a\.weight: .*greater than 0, got -1\.5"),
        ({"a": part("a", 3, float("inf"))}, r"parts\.a\.weight: .*finite"),
        ({"a": part("a", 3, 1), "b": part("b", 3)}, r"parts\.b: give every part a weight, or none"),
        ({"a": part("a", 1, 1), "b": part("b", 90, 0.01)}, r"parts\.b\.weight: so small .* epoch of 1 samples"),
        ({"a": {"source": {"type": "lits", "records": []}}}, r"parts\.a\.source\.type: unknown .*did you mean 'list'"),
        ({"a": {**part("a", 1), "colums": {}}}, r"parts\.a\.colums: unknown; did you mean 'columns'"),
        ({"a": {**part("a", 1), "columns": {"text": "captoin"}}},
         r"parts\.a: columns: the data has no column 'captoin'; did you mean 'caption'"),
        ({"a": {**part("a", 1), "columns": {"k": "caption"}}}, r"parts\.a: columns\.k: the source has a column 'k'"),
        ({"a": {**part("a", 1), "columns": {"x": "k", "y": "k"}}}, "'k' is read into two fields"),
        ({"a/b": part("a", 1)}, "no '/'"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_with_their_path(parts, words):
    with pytest.raises(ConfigError, match=words):
        build(**parts)


def test_a_stream_needs_a_weight_and_stop_is_first_or_all(tmp_path):
    parts = stream_parts(tmp_path, a=(8, None), b=(3, None))
    del parts["a"]["weight"]
    with pytest.raises(ConfigError, match=r"parts\.a\.weight: needed, since the length of a stream is unknown"):
        build(**parts)
    with pytest.raises(ConfigError, match=r"stop: .*'first' or 'all'"):
        build("frist", a=part("a", 1))


def test_a_recipe_can_name_it_and_is_written_back():
    data = {"parts": {"a": part("a", 2, 1.5), "b": {**part("b", 2, 1), "columns": {"text": "caption"}}}, "stop": "all"}
    chosen = component("sources", "mixture", **data)
    assert parse(MixtureConfig, dump(chosen.config)) == chosen.config
    one, other = chosen.build(), build(a=part("a", 3))
    assert one.fingerprint() == chosen.build().fingerprint() != other.fingerprint()


def test_resume_in_the_middle_of_a_mixed_epoch():
    source = build("all", a=part("a", 23, 2), b=part("b", 31, 1))
    straight = ids(drawn(text_loader(source), epochs=2))
    one, other = text_loader(source), text_loader(source)
    for _ in zip(range(4), one, strict=False):
        pass
    other.load_state_dict(one.state_dict())
    assert ids([batch for _ in range(2) for batch in other]) == straight[one.position :]
