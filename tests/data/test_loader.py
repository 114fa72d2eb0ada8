from __future__ import annotations

import multiprocessing
import resource
import time
from collections import Counter
from itertools import chain, islice

import pytest
import torch
from data_fakes import Choice, Flip, make_reader, make_source, same

from mmrep.config import ConfigError
from mmrep.data.loader import BatchLoader, evaluation_batches, evaluation_items
from mmrep.data.order import share
from mmrep.data.records import Records
from mmrep.data.sample import Quarantined
from mmrep.encoder import BadSampleError


class Stream(Records):
    """A streaming source of records in memory, in 5 shards."""

    streaming = True
    shards = 5

    def stream(self, part=0, parts=1, seed=None):
        order = torch.randperm(self.shards, generator=torch.Generator().manual_seed(seed or 0)).tolist()
        for shard in order[part::parts]:
            for index in range(shard, len(self._rows), self.shards):
                yield self.record(index)


def make_stream(n: int) -> Stream:
    return Stream(make_source(n).config)


def loader(n=20, source=None, reader=None, **options):
    return BatchLoader(source or make_source(n), reader or make_reader(), **{"batch_size": 6, "seed": 5, **options})


def drawn(loader, epochs=1):
    return [batch for _ in range(epochs) for batch in loader]


def ids(batches):
    return [batch.ids for batch in batches]


def flat(lists):
    return list(chain.from_iterable(lists))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_global_order_does_not_depend_on_the_number_of_processes(world):
    straight = drawn(loader(23, drop_last=False), epochs=2)
    parts = [drawn(loader(23, drop_last=False, rank=r, world_size=world), epochs=2) for r in range(world)]
    for k, batch in enumerate(straight):
        assert flat(part[k].ids for part in parts) == batch.ids
        assert torch.equal(torch.cat([part[k].seeds for part in parts]), batch.seeds)
        sizes = [len(part[k]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    assert {len(part) for part in parts} == {8}


def test_share_covers_everything_once():
    for n in range(12):
        assert [i for r in range(5) for i in range(n)[share(n, r, 5)]] == list(range(n))


def test_workers_change_nothing():
    options = {"reader": make_reader(memoised=["caption"])}
    alone = drawn(loader(**options), epochs=2)
    together = drawn(loader(workers=2, **options), epochs=2)
    assert len(alone) == 6
    assert all(map(same, alone, together))
    assert alone[0].items["caption"]
    assert not same(alone[0], alone[3])


def test_workers_change_nothing_in_a_stream():
    options = {"source": make_stream(21), "drop_last": False, "buffer": 4}
    alone, together = (drawn(loader(workers=workers, **options), epochs=2) for workers in (0, 2))
    assert len(alone) == 8
    assert all(map(same, alone, together))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (3, 0), (3, 2), (5, 0)])
def test_every_sample_once_an_epoch(streaming, world, workers):
    n, source = 20, make_stream(20) if streaming else make_source(20)
    options = {"source": source, "drop_last": False, "world_size": world, "workers": workers, "batch_size": 8}
    loaders = [loader(rank=r, **options) for r in range(world)]
    for _ in range(2):
        counted = Counter(id for each in loaders for batch in each for id in batch.ids)
        assert counted == Counter({f"s{i}": 1 for i in range(n)})


def test_epochs_and_seeds_draw_different_orders():
    first, second = ids(drawn(loader(24))), ids(drawn(loader(24), epochs=2))
    assert first == second[:4]
    assert first != second[4:]
    assert first != ids(drawn(loader(24, seed=6)))
    assert flat(first) != [f"s{i}" for i in range(24)]
    assert flat(ids(drawn(loader(24, shuffle=False)))) == [f"s{i}" for i in range(24)]


def test_a_shuffled_stream_is_shuffled_and_reshuffled():
    options = {"source": make_stream(24), "buffer": 6}
    epochs = ids(drawn(loader(**options), epochs=2))
    plain = flat(ids(drawn(loader(shuffle=False, **options))))
    assert flat(epochs[:4]) != plain
    assert flat(epochs[:4]) != flat(epochs[4:])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_equals_going_straight(streaming, workers):
    def make():
        return loader(source=make_stream(20) if streaming else make_source(20), workers=workers, batch_size=5, buffer=4)

    straight = drawn(make(), epochs=2)
    assert len(straight) == 8
    states, one = [], make()
    for _ in range(2):
        states.extend(one.state_dict() for _ in one)
    for done in (0, 2, 3, 5) if workers else range(7):
        other = make()
        other.load_state_dict(states[done])
        rest = list(islice((batch for _ in range(3) for batch in other), 7 - done))
        assert all(map(same, straight[done + 1 :], rest))
        assert len(rest) == 7 - done


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_read_ahead_does_not_count(workers):
    one = loader(24, workers=workers)
    straight = drawn(loader(24))
    for _ in zip(range(2), one, strict=False):
        pass
    position = one.position
    assert one.state_dict()["position"] == position
    assert all(map(same, straight[position:], list(one)))
    assert (one.epoch, one.position) == (1, 0)


def test_a_state_does_not_say_how_many_processes_if_the_order_does_not_depend_on_it():
    one = loader(24)
    batches = iter(one)
    next(batches)
    two = [loader(24, rank=r, world_size=2) for r in range(2)]
    for each in two:
        each.load_state_dict(one.state_dict())
    assert [a + b for a, b in zip(*(ids(drawn(each)) for each in two), strict=True)] == ids(batches)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 21}, "number of samples was 20 and is 21"),
        ({"batch_size": 4}, "global batch size was 6 and is 4"),
        ({"seed": 1}, "seed was 5 and is 1"),
        ({"shuffle": False}, "shuffle"),
    ],
)
def test_a_state_of_another_order_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        loader(**options).load_state_dict(loader().state_dict())


def test_a_stream_refuses_another_number_of_processes():
    source = make_stream(20)
    with pytest.raises(ValueError, match="number of processes was 1 and is 2"):
        loader(source=source, world_size=2).load_state_dict(loader(source=source).state_dict())


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_random_state_alone(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(loader(workers=workers), epochs=2)
    assert torch.equal(before, torch.get_rng_state())


def test_steps_per_epoch():
    assert loader(20).steps_per_epoch == 3 == len(drawn(loader(20)))
    assert loader(20, drop_last=False).steps_per_epoch == 4 == len(drawn(loader(20, drop_last=False)))
    assert loader(source=make_stream(20)).steps_per_epoch is None


def test_impossible_options_say_the_numbers():
    with pytest.raises(ConfigError, match=r"takes 64 samples and the data has 20"):
        loader(20, batch_size=64)
    with pytest.raises(ConfigError, match=r"3 samples .* 4 processes"):
        loader(20, batch_size=3, world_size=4)
    with pytest.raises(ConfigError, match="workers=0"):
        loader(20, cache=True, workers=1)
    with pytest.raises(ConfigError, match="map-style"):
        loader(source=make_stream(20), cache=True)
    with pytest.raises(ConfigError, match="'caption'; did you mean 'captoin'"):
        loader(source=Records.from_lists(image=[1] * 9, captoin=["a"] * 9))


def test_a_part_of_a_stream_without_a_full_batch_is_an_error_not_an_endless_loop():
    with pytest.raises(ConfigError, match="it needs 30 samples"):
        drawn(loader(source=make_stream(20), batch_size=30))


def test_an_epoch_can_be_ended_by_agreement():
    one = loader(source=make_stream(20))
    next(iter(one))
    one.end_epoch()
    assert (one.epoch, one.position) == (1, 0)


@pytest.mark.parametrize("views", [{}, {"image": [Flip()], "caption": [Choice()]}, {"image": [Flip()]}])
def test_the_cache_changes_nothing_and_decodes_once(views):
    plain, cached = make_reader(views=views, memoised=["caption"]), make_reader(views=views, memoised=["caption"])
    expected = drawn(loader(reader=plain, batch_size=4), epochs=3)
    found = drawn(loader(reader=cached, batch_size=4, cache=True), epochs=3)
    assert all(map(same, expected, found))
    assert plain.encoders["image"].calls == 60
    assert cached.encoders["image"].calls == 20
    assert (cached.encoders["caption"].calls == plain.encoders["caption"].calls) == ("caption" in views)


def test_a_cached_source_is_read_once():
    source, reads = make_source(12), []
    record = source.record
    source.record = lambda index: (reads.append(index), record(index))[1]
    drawn(loader(source=source, cache=True), epochs=3)
    assert sorted(reads) == list(range(12))


class Holes(Records):
    def __getitem__(self, index):
        if index % 4 == 1:
            raise BadSampleError("torn record", f"at {index}")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_records_that_cannot_be_read_are_quarantined(workers):
    batches = drawn(loader(source=Holes(make_source(12).config), workers=workers))
    assert sorted(note.id for batch in batches for note in batch.quarantined) == ["#1", "#5", "#9"]
    assert all(len(batch) + len(batch.quarantined) == 6 for batch in batches)


def test_many_memoised_items_need_few_file_descriptors():
    n = 600
    source = Records.from_lists(caption=[f"number {i}" for i in range(n)])
    reader = make_reader(views={}, memoised=["caption"], group=False)
    del reader.encoders["image"], reader.columns["image"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        alone, other = (drawn(loader(source=source, reader=reader, batch_size=n, workers=w)) for w in (0, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert same(alone[0], other[0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_reads_each_sample_once_in_order(workers, streaming, world):
    source = make_stream(11) if streaming else make_source(11)
    reader = make_reader(views={})
    parts = [
        list(evaluation_batches(source, reader, batch_size=4, rank=r, world_size=world, workers=workers))
        for r in range(world)
    ]
    counted = [id for part in parts for batch in part for id in batch.ids]
    assert sorted(counted) == sorted(f"s{i}" for i in range(11))
    if world == 1:
        assert counted == [sample.id for sample in source.stream()]
        items = list(evaluation_items(source, reader))
        assert [item.id for _, item in items] == counted
        assert all(sample.id == item.id for sample, item in items)


def test_evaluation_items_pair_bad_records_with_their_note():
    pairs = list(evaluation_items(Holes(make_source(3).config), make_reader(views={})))
    assert [isinstance(item, Quarantined) for _, item in pairs] == [False, True, False]


def test_workers_stop_with_the_loader():
    before = set(multiprocessing.active_children())
    one = loader(24, workers=1)
    batches = iter(one)
    next(batches)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 1
    batches.close()
    start = time.monotonic()
    del one
    assert time.monotonic() - start < 4  # in a reference cycle: later, and 5 s a worker
    assert not any(process.is_alive() for process in started)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_state_at_the_end_of_an_epoch_goes_on_with_the_next(streaming):
    source = make_stream(20) if streaming else make_source(20)
    one, other = loader(source=source), loader(source=source)
    for _ in one:
        state = one.state_dict()
    assert (state["epoch"], state["position"]) == (0, 3)
    other.load_state_dict(state)
    assert ids(other) == []  # the epoch's end, which another process may have to hear of
    assert ids(other) == ids(one)
    assert (other.epoch, other.position) == (2, 0)
