"""Batches without two samples of a group, and batches of similar length within a budget of tokens."""

from __future__ import annotations

import logging
import random
from collections import Counter
from itertools import chain

import pytest
import torch
from data_fakes import TinyImage, TinyText, make_reader, make_source
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import drawn, ids, make_stream
from test_splits import Text

from mmrep.config import ConfigError, component, parse
from mmrep.data.batching import LEAST_BATCHES, Batching, codes
from mmrep.data.lengths import from_column, measured
from mmrep.data.limited import Limited
from mmrep.data.loader import BatchLoader
from mmrep.data.order import Order
from mmrep.data.reader import Reader
from mmrep.data.records import Records
from mmrep.data.source import Source
from mmrep.recipe import DataConfig


def order(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def make(n, size, seed=0, *, drop_last=True, **options):
    """The record numbers of each batch of an epoch, and the batching."""
    batching = Batching(n, size, drop_last=drop_last, **options)
    drawn = order(n, seed)
    return [drawn[batch].tolist() for batch in batching.batches(drawn, seed)], batching


def ragged(n, seed=0):
    """Lengths with a long tail, as of captions."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator) * 0.6 + 2.5).exp().clamp(3, 77).long()


def padded(batches, lengths):
    return sum(len(batch) * lengths[batch].max().item() for batch in batches)


# Groups -------------------------------------------------------------------------------------------------------------


def most_full_batches(sizes, batch_size):
    """By trying: the most batches that can be filled when each takes from the groups that have most left."""
    steps = 0
    for wanted in range(1, sum(sizes) // batch_size + 1):
        left = [min(size, wanted) for size in sizes]
        for _ in range(wanted):
            left.sort(reverse=True)
            if batch_size > len(left) or left[batch_size - 1] == 0:
                return steps
            left = [n - (i < batch_size) for i, n in enumerate(left)]
        steps = wanted
    return steps


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=4, max_size=12), st.integers(2, 4), st.integers(0, 99))
def test_full_batches_without_a_group_twice_are_as_many_as_can_be(sizes, batch_size, seed):
    groups = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    batches, batching = make(len(groups), batch_size, seed, groups=groups)
    assert all(len(batch) == batch_size == len(set(groups[batch].tolist())) for batch in batches)
    assert len(set(chain(*batches))) == len(batches) * batch_size == batching.used
    assert len(batches) == batching.steps == most_full_batches(sizes, batch_size)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 99))
def test_without_drop_last_every_sample_is_in_a_batch(sizes, batch_size, seed):
    groups = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    batches, batching = make(len(groups), batch_size, seed, drop_last=False, groups=groups)
    assert all(0 < len(batch) == len(set(groups[batch].tolist())) <= batch_size for batch in batches)
    assert sorted(chain(*batches)) == list(range(len(groups)))
    assert len(batches) == batching.steps == max(max(sizes), -(-len(groups) // batch_size))


def test_what_a_large_group_leaves_out_changes_with_the_epoch(caplog):
    groups = [0] * 30 + list(range(1, 31))
    source = Records.from_lists(caption=["x"] * 60, group=groups)
    with caplog.at_level(logging.WARNING):
        one = Order(source=source, batch_size=5, distinct_groups=True)
    assert one.steps_per_epoch == 7  # 7 of the group of thirty and 28 of the rest
    assert "25 of 60 samples are left out of each epoch" in caplog.text
    seen = Counter()
    for _ in range(60):
        seen.update({record for batch in one for record, _ in batch})
        one.end_epoch()
    assert set(seen) == set(range(60))
    assert max(seen[i] for i in range(30)) < 40
    assert min(seen[i] for i in range(30, 60)) > 40


def test_groups_meet_all_others_and_come_early_and_late():
    groups = torch.arange(120) // 2
    met, places = Counter(), Counter()
    for seed in range(60):
        batches, _ = make(120, 12, seed, groups=groups)
        for k, batch in enumerate(batches):
            places[k] += 7 in batch
            met.update(groups[batch].tolist() if 7 in batch else [])
    assert len(places) == 10
    assert max(places.values()) < 20  # 6 each on average
    assert met.pop(3) == 60
    assert len(met) == 59
    assert max(met.values()) < 30  # 11 each on average


def test_a_global_batch_has_no_group_twice_and_is_the_same_for_any_number_of_processes():
    source = make_source(24)  # groups of two
    options = {"batch_size": 6, "distinct_groups": True, "seed": 5}
    straight = drawn(BatchLoader(source, make_reader(), **options), epochs=2)
    assert all(len(set(batch.group.tolist())) == len(batch) == 6 for batch in straight)
    plain = drawn(BatchLoader(source, make_reader(), batch_size=6, seed=5), epochs=4)
    assert any(len(set(batch.group.tolist())) < 6 for batch in plain)
    for world in (2, 3):
        parts = [
            drawn(BatchLoader(source, make_reader(), rank=r, world_size=world, **options), 2) for r in range(world)
        ]
        assert ids(straight) == [[i for b in row for i in b.ids] for row in zip(*parts, strict=True)]


def test_samples_without_a_group_are_each_their_own():
    assert codes(["a", None, "a", None, 1, "1"]).tolist() == [0, 1, 0, 2, 3, 4]


def test_a_mixture_that_repeats_a_sample_keeps_it_apart():
    parts = {name: {"source": {"type": "list", "records": [{"caption": f"{name}{i}", "g": i} for i in range(n)],
                               "group": "g"}, "weight": 1} for name, n in (("a", 5), ("b", 40))}  # fmt: skip
    source = component("sources", "mixture", parts=parts, stop="all").build()
    reader = Reader({"caption": TinyText()}, group=True)
    for batch in drawn(BatchLoader(source, reader, batch_size=8, distinct_groups=True), epochs=3):
        assert len(set(batch.ids)) == 8
    with pytest.raises(ConfigError, match=r"a group can have 8 samples .* than the epoch has batches \(4\)"):
        BatchLoader(source, reader, batch_size=20, distinct_groups=True)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Records.from_lists(caption=["x"] * 9), "distinct_groups: the data has no groups: name the column"),
        (make_stream(9), "distinct_groups: needs a map-style source"),
        (make_source(9), r"needs as many groups, and the data has 5"),
    ],
)
def test_distinct_groups_are_refused_with_the_reason(source, words):
    with pytest.raises(ConfigError, match=words):
        Order(source=source, batch_size=6, distinct_groups=True)


def test_a_source_that_would_have_to_read_every_record_says_so():
    class Slow(Source):
        def __len__(self):
            return 9

    config = Records.from_lists(caption=["x"], group=[1]).config
    with pytest.raises(ConfigError, match=r"Slow cannot give the column 'group' .* no method `column`"):
        Order(source=Slow(config), batch_size=2, distinct_groups=True)


def test_every_source_knows_the_groups_that_its_samples_have(tmp_path):
    import datasets
    from data_fakes import png, write

    for i, folder in enumerate("abba"):
        write(tmp_path / f"p/{folder}/{i}.png", png(i))
    write(tmp_path / "m/x.png", png())
    write(tmp_path / "m/metadata.csv", "file_name,kind\nx.png,7\ngone.png,\n")
    write(tmp_path / "t.csv", "a,g\n1,x\n2,\n3,y\n4,x\n")
    write(tmp_path / "t.jsonl", '{"g": 3.0}\n{"g": null}\n{broken\n{"g": [1]}\n')
    table = datasets.Dataset.from_dict({"g": [1, None, 2]})
    from mmrep.data.hf import HFDataset

    build = lambda type, **fields: component("sources", type, **fields).build()  # noqa: E731
    for source in [
        build("imagefolder", path=f"{tmp_path}/p", group="class_name"),
        build("imagefolder", path=f"{tmp_path}/m", group="kind"),
        build("table", files=f"{tmp_path}/t.csv", group="g"),
        build("table", files=f"{tmp_path}/t.jsonl", group="g"),
        Limited(build("table", files=f"{tmp_path}/t.csv", group="g"), 3),
        HFDataset.wrap(table, group="g"),
        Limited(build("emoji", split="test"), 20),
        make_source(7),
    ]:
        records = [source.record(i) for i in range(len(source))]
        assert list(source.groups()) == [getattr(record, "group", None) for record in records], source
        assert any(group is not None for group in source.groups())


# Lengths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [None, 640, 1500])
@pytest.mark.parametrize("n", [2000, 333])
def test_buckets_pad_little_and_keep_to_the_budget(n, max_tokens):
    lengths = ragged(n)
    plain = padded(make(n, 32)[0], lengths) / n
    for seed in range(3):
        batches, batching = make(n, 32, seed, lengths=lengths, max_tokens=max_tokens)
        used = list(chain(*batches))
        assert len(set(used)) == len(used) == batching.used == (n if max_tokens else n - n % 32)
        assert len(batches) == batching.steps
        assert max(map(len, batches)) <= 32
        assert min(map(len, batches)) == batching.smallest
        assert max_tokens or min(map(len, batches)) == 32
        assert max(padded([batch], lengths) for batch in batches) <= (max_tokens or 32 * 77)
        share = lengths[torch.tensor(used)].sum().item() / padded(batches, lengths)
        assert share > (0.8 if n == 2000 else 0.4)  # few batches make few buckets
        assert padded(batches, lengths) / len(used) < (0.5 if n == 2000 else 0.85) * plain


def test_a_budget_is_used_and_not_only_kept():
    lengths = torch.full((960,), 10)
    batches, _ = make(960, 64, lengths=lengths, max_tokens=160)
    assert {len(batch) for batch in batches} == {16}
    lengths = ragged(4000)
    batches, _ = make(4000, 1000, lengths=lengths, max_tokens=1500)
    tokens = [padded([batch], lengths) for batch in batches]
    assert sum(tokens) / len(tokens) > 0.9 * 1500


@pytest.mark.parametrize("max_tokens", [None, 800])
def test_buckets_still_mix(max_tokens):
    """The same samples do not stay together, and long ones do not come first or last."""
    lengths, n = ragged(1000), 1000
    met, centre, longest = Counter(), [], int(lengths.argmax())
    for seed in range(40):
        batches, _ = make(n, 20, seed, lengths=lengths, max_tokens=max_tokens)
        for k, batch in enumerate(batches):
            if longest in batch:
                met.update(set(batch) - {longest})
                centre.append(k / (len(batches) - 1))
    size = sum(met.values()) / 40 + 1
    assert len(met) >= 3 * size
    assert max(met.values()) < 25
    assert 0.3 < sum(centre) / len(centre) < 0.7
    assert min(centre) < 0.15
    assert max(centre) > 0.85


def test_a_bucket_has_batches_enough_to_mix():
    for max_tokens in (None, 700):
        batching = Batching(1000, 20, drop_last=True, lengths=ragged(1000), max_tokens=max_tokens)
        assert min(bucket.batches for bucket in batching._buckets) >= LEAST_BATCHES
        assert len(batching._buckets) > 8


def test_without_drop_last_buckets_hold_everything():
    batches, batching = make(333, 32, drop_last=False, lengths=ragged(333))
    assert sorted(chain(*batches)) == list(range(333))
    assert len(batches) == batching.steps == 11


def test_groups_stay_apart_in_buckets_too():
    lengths, groups = ragged(600), torch.arange(600) // 3
    for seed in range(3):
        for max_tokens in (None, 500):
            batches, _ = make(600, 16, seed, lengths=lengths, groups=groups, max_tokens=max_tokens)
            assert all(len(set(groups[batch].tolist())) == len(batch) for batch in batches)
    with pytest.raises(ConfigError, match=r"a group can have at most 4 samples here .* and one has 6"):
        Batching(600, 16, drop_last=True, lengths=lengths, groups=torch.arange(600) // 6)


def captions(n):
    generator = random.Random(0)
    return [None if i % 9 == 4 else " " if i % 9 == 5 else "wort " * generator.randint(1, 12) for i in range(n)]


def text_loader(texts, **options):
    source = Records.from_lists(caption=texts, words=[len(t.split()) if t else None for t in texts])
    reader = Reader({"caption": Text(), "image": TinyImage()} if "image" in options else {"caption": Text()})
    return BatchLoader(source, reader, **{"batch_size": 8, "bucket_by": "caption", "seed": 4, **options})


def test_lengths_are_those_of_the_encoder():
    source = Records.from_lists(caption=["ab", None, " ", "ö"])
    assert measured(source, "caption", Text()).tolist() == [2, 0, 0, 2]


@pytest.mark.parametrize(
    "options", [{}, {"lengths": "words"}, {"max_tokens": 300}, {"lengths": "words", "max_tokens": 60}]
)
def test_batches_by_length_are_the_same_for_any_number_of_processes_and_after_a_resume(options):
    texts = captions(90)
    straight = [b.ids + [n.id for n in b.quarantined] for b in drawn(text_loader(texts, **options), epochs=2)]
    one = text_loader(texts, **options)
    assert len(straight) == 2 * one.steps_per_epoch
    for world in (2, 3):
        parts = [drawn(text_loader(texts, rank=r, world_size=world, **options), 2) for r in range(world)]
        together = [[i for b in row for i in b.ids + [n.id for n in b.quarantined]] for row in zip(*parts, strict=True)]
        assert [sorted(batch) for batch in together] == [sorted(batch) for batch in straight]
        assert all(max(sizes) - min(sizes) <= 1 for row in zip(*parts, strict=True)
                   for sizes in [[len(b) + len(b.quarantined) for b in row]])  # fmt: skip
    for _ in zip(range(4), one, strict=False):
        pass
    other = text_loader(texts, **options)
    other.load_state_dict(one.state_dict())
    rest = [b.ids + [n.id for n in b.quarantined] for _ in range(2) for b in other]
    assert rest == straight[one.position :]


def test_stated_lengths_spare_the_measuring():
    texts = captions(400)
    one = text_loader(texts, lengths="words")
    assert one._loader is None
    assert one._options["dataset"].reader.encoders["caption"].calls == 0
    for batch in one:
        words = [len(texts[int(id)].split()) for id in batch.ids if texts[int(id)]]
        assert max(words, default=0) - min(words, default=0) <= 3


def test_a_resume_with_other_lengths_or_options_is_refused():
    texts = captions(60)
    state = text_loader(texts).state_dict()
    with pytest.raises(ValueError, match="the lengths was"):
        text_loader(texts, lengths="words").load_state_dict(state)
    with pytest.raises(ValueError, match="the max_tokens was None and is 300"):
        text_loader(texts, max_tokens=300).load_state_dict(state)
    with pytest.raises(ValueError, match=r"the lengths was .* and is None"):
        text_loader(texts, bucket_by=None).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bucket_by": "captoin"}, "bucket_by: unknown field 'captoin'; did you mean 'caption'"),
        ({"bucket_by": None, "max_tokens": 9}, "max_tokens: means something only with bucket_by"),
        ({"bucket_by": None, "lengths": "words"}, "lengths: means something only with bucket_by"),
        ({"lengths": "wrods"}, "lengths: the data has no column 'wrods'; did you mean 'words'"),
        ({"lengths": "caption"}, "lengths: column 'caption' holds lengths, whole numbers from 0"),
        ({"max_tokens": 50}, "max_tokens: 50 is less than the longest sample, of 60 tokens"),
        ({"max_tokens": 60, "world_size": 4}, "max_tokens: 60 allows batches of 1 samples, .* among 4 processes"),
    ],
)
def test_mistakes_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        text_loader(captions(90), **options)


def test_streams_weighted_mixtures_and_encoders_of_one_length_are_refused():
    with pytest.raises(ConfigError, match="bucket_by: needs a map-style source"):
        BatchLoader(make_stream(20), make_reader(), batch_size=4, bucket_by="caption")
    with pytest.raises(ConfigError, match="bucket_by: all samples of 'image' have one length, as TinyImage sees it"):
        BatchLoader(make_source(20), make_reader(), batch_size=4, bucket_by="image")
    with pytest.raises(ConfigError, match=r"got 1\.5"):
        from_column(Records.from_lists(n=[1, 1.5]), "n")
    parts = {name: {"source": {"type": "list", "records": [{"caption": "x" * (i + 1)} for i in range(n)]}, "weight": 1}
             for name, n in (("a", 10), ("b", 30))}  # fmt: skip
    source = component("sources", "mixture", parts=parts).build()
    reader = Reader({"caption": Text()})
    with pytest.raises(ConfigError, match="max_tokens: the weights of this mixture draw other samples each epoch"):
        BatchLoader(source, reader, batch_size=4, bucket_by="caption", max_tokens=100)
    batches = drawn(BatchLoader(source, reader, batch_size=4, bucket_by="caption"), epochs=2)
    assert {len(batch) for batch in batches} == {4}
    assert len(batches) == 10


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bucket_by": "captoin"}, r"data\.bucket_by: unknown field 'captoin'; did you mean 'caption'"),
        ({"max_tokens": 100}, r"data\.max_tokens: means something only with data\.bucket_by"),
        ({"lengths": "n"}, r"data\.lengths: means something only with data\.bucket_by"),
        ({"bucket_by": "caption", "max_tokens": 0}, r"data\.max_tokens: .*greater than or equal to 1"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused(fields, words):
    data = {"train": {"type": "list", "records": [{"caption": "a"}]}, "fields": {"caption": "text"}}
    assert parse(DataConfig, {**data, "bucket_by": "caption", "max_tokens": 9}, "data").max_tokens == 9
    with pytest.raises(ConfigError, match=words):
        parse(DataConfig, {**data, **fields}, "data")


def test_a_recipe_trains_on_a_mixture_in_batches_of_its_kind(tmp_path):
    from mmrep.recipe import read_recipe
    from mmrep.run import Run
    from tests.world import make_world, recipe, write_recipe

    folder = make_world(tmp_path / "world")
    data = recipe(folder)["data"]
    parts = {"a": {"source": data["train"]}, "b": {"source": data["evaluation"]["test"]}}
    data |= {"train": {"type": "mixture", "parts": parts, "shared_groups": True}, "evaluation": {}}
    data |= {"distinct_groups": True, "bucket_by": "caption", "max_tokens": 130}
    path = write_recipe(folder, data=data, evaluations={}, train={"epochs": 2, "batch_size": 12, "workers": 0})
    run, dry = Run(read_recipe(str(path)), folder / "run"), Run(read_recipe(str(path)))
    loader = dry.loader(dry.root(dry.untrained()), rank=0, size=1)
    assert all(len(set(batch.group.tolist())) == len(batch) <= 130 // 15 for batch in drawn(loader))
    run.train()
    assert (folder / "run/model/config.json").is_file()
    state = (folder / "run/metrics.jsonl").read_text().splitlines()[-1]
    assert f'"step": {2 * loader.steps_per_epoch}' in state
