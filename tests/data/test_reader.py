from __future__ import annotations

import numpy as np
import pytest
import torch
from data_fakes import Choice, Flip, Noise, TinyImage, TinyText, make_reader, make_source, png

from mmrep.data.reader import Item, Reader
from mmrep.data.sample import Quarantined, Sample, stable_hash
from mmrep.embed.memo import content_key
from mmrep.encoder import Encoder
from mmrep.views.view import uniform


def plain() -> Reader:
    return Reader({"image": TinyImage(), "caption": TinyText()})


@pytest.mark.parametrize(
    ("fields", "field", "cause"),
    [
        ({"image": png()[:60], "caption": "a"}, "image", "unreadable file"),  # truncated
        ({"image": b"no picture"}, "image", "unreadable file"),
        ({"image": png(size=100)}, "image", "decompression bomb"),
        ({"image": "/nowhere/at/all.png"}, "image", "missing file"),
        ({"image": 7}, "image", "unexpected AttributeError"),
        ({"image": png(), "caption": " "}, "caption", "empty text"),
        ({"caption": 3.5}, "caption", "wrong type"),
        ({"caption": "\ud800"}, "caption", "invalid utf-8"),
        ({"caption": None}, "", "empty sample"),
        ({"other": 1}, "", "empty sample"),
    ],
)
def test_a_bad_sample_is_noted_with_its_cause(fields, field, cause):
    note = plain().read(Sample("x", fields), 0)
    assert isinstance(note, Quarantined)
    assert (note.id, note.field, note.cause) == ("x", field, cause)


class Broken(TinyText):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def prepare(self, raw, *, view=None, seed=0):
        raise self.error


@pytest.mark.parametrize("error", [MemoryError(), ImportError(), NotImplementedError(), AssertionError(), NameError()])
def test_what_no_data_can_cause_stops_at_once_and_names_the_sample(error):
    with pytest.raises(type(error)) as caught:
        Reader({"caption": Broken(error)}).read(Sample("x", {"caption": "a"}), 0)
    assert "field 'caption' of sample 'x'" in caught.value.__notes__[0]


def test_an_unexpected_error_says_where():
    note = Reader({"caption": Broken(KeyError("k"))}).read(Sample("x", {"caption": "a"}), 0)
    assert note.cause == "unexpected KeyError"
    assert "test_reader.py:" in note.detail


def test_a_quarantined_record_is_passed_on():
    note = Quarantined("x", "", "c", "d")
    assert plain().read(note, 0) is note


def test_randomness_derives_from_seed_epoch_id_field_and_view():
    encoders = {"image": TinyImage(), "twin": TinyImage()}
    views = {"image": [Noise(), Noise()], "twin": [Noise()]}

    def read(seed=1, epoch=2, id="x"):
        return Reader(encoders, views, seed=seed).read(Sample(id, {"image": png(), "twin": png()}), epoch)

    def noise(item, field="image", view=0):
        return float(item.inputs[field][view]["pixels"][0, 0, 0])

    base = read()
    assert noise(base) == noise(read())
    others = [read(seed=9), read(epoch=3), read(id="z")]
    values = [noise(base), *map(noise, others), noise(base, view=1), noise(base, "twin")]
    assert len(set(values)) == 6
    assert len({base.seed, *(o.seed for o in others)}) == 4


def test_collate_keeps_compact_rows_in_order():
    reader, source = make_reader(), make_source(7)
    batch = reader.collate([reader.read(source[i], 0) for i in range(6)])
    assert batch.ids == [f"s{i}" for i in range(6)]
    assert batch.present["image"].all()
    assert batch.present["caption"].tolist() == [True, True, False, True, True, False]
    noisy, plain = (view["pixels"] for view in batch.inputs["image"])
    assert len(noisy) == len(plain) == 6
    assert torch.equal(plain, plain.round())
    assert (noisy != plain).flatten(1).any(1).all()
    texts = [bytes(row[row > 0].tolist()).decode() for row in batch.inputs["caption"][0]["ids"]]
    assert [text.split()[-1] for text in texts] == ["0", "1", "3", "4"]
    assert batch.seeds.tolist() == [stable_hash(3, 0, f"s{i}") for i in range(6)]
    pairs = batch.group.view(3, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    assert len(set(pairs[:, 0].tolist())) == 3


def test_samples_without_a_group_are_positives_of_themselves_only():
    reader = Reader({"caption": TinyText()}, group=True)
    groups = {"1": None, "2": None, "3": "1"}
    items = [reader.read(Sample(id, {"caption": "a"}, group=group), 0) for id, group in groups.items()]
    assert len(set(reader.collate(items).group.tolist())) == 3


def test_labels_and_bad_samples_go_with_the_batch():
    reader = plain()
    samples = [Sample("a", {"caption": "x"}, label=4), Sample("b", {"caption": ""}), Sample("c", {"caption": "y"})]
    batch = reader.collate([reader.read(s, 0) for s in samples])
    assert (batch.ids, batch.labels) == (["a", "c"], [4, None])
    assert [q.id for q in batch.quarantined] == ["b"]
    assert batch.group is None
    assert "image" not in batch.inputs
    assert batch.present["image"].tolist() == [False, False]


def test_a_batch_of_bad_samples_is_empty():
    batch = make_reader(memoised=["caption"]).collate([Quarantined("b", "", "c", "d")])
    assert len(batch) == 0
    assert batch.inputs == {}
    assert batch.items == {}
    assert [batch.present[f].shape for f in ("image", "caption")] == [(0,), (0,)]
    assert batch.seeds.shape == batch.group.shape == (0,)
    assert batch.group.dtype == batch.seeds.dtype == torch.long


def test_memoised_fields_keep_items_and_keys():
    reader, source = make_reader(views={}, memoised=["caption"]), make_source(4)
    batch = reader.collate([reader.read(source[i], 0) for i in range(4)])
    assert "caption" not in batch.inputs
    texts = [bytes(item["ids"].tolist()).decode() for item in batch.items["caption"]]
    assert texts == ["number 0", "number 1", "number 3"]
    assert batch.keys["caption"] == [content_key(item) for item in batch.items["caption"]]


def test_memoised_fields_have_one_reading_and_no_view_on_the_device():
    encoders: dict[str, Encoder] = {"image": TinyImage()}
    Reader(encoders, {"image": [Noise()]}, memoised=["image"])
    for views in ([Flip()], [Noise(), Noise()]):
        with pytest.raises(ValueError, match="image"):
            Reader(encoders, {"image": views}, memoised=["image"])
    with pytest.raises(ValueError, match="'images'"):
        Reader(encoders, {"images": [Noise()]})


def test_only_fields_without_sample_views_are_fixed():
    assert make_reader().fixed == set()
    assert make_reader(views={"image": [Flip(), None]}).fixed == {"image", "caption"}
    assert make_reader(views={"image": [Flip()], "caption": [Choice()]}).fixed == {"image"}


def test_a_kept_reading_is_used_in_place_of_preparing():
    reader, source = make_reader(views={"caption": [Choice()]}), make_source(2)
    kept = reader.read(source[0], 0).only(reader.fixed)
    assert list(kept.inputs) == ["image"]
    before = reader.encoders["image"].calls
    item = reader.read(source[0], 5, kept)
    assert isinstance(item, Item)
    assert reader.encoders["image"].calls == before
    assert item.inputs["image"] is kept.inputs["image"]
    assert item.inputs["caption"]
    assert item.seed != kept.seed


def test_stable_hash_is_the_same_everywhere():
    assert stable_hash(0, 1, "s1", np.int64(4)) == 8977102512316541603  # from b2sum -l 64


def test_a_large_batch_comes_in_parts_of_nearly_equal_size_and_the_whole_keeps_what_belongs_to_samples():
    reader = make_reader(memoised=["caption"])
    source = make_source(5)
    items = [reader.read(source[i], 0) for i in range(5)]
    whole, parted = reader.collate(items), reader.collate(items, micro_batch=2)
    assert [part.ids for part in parted.parts] == [whole.ids[:1], whole.ids[1:3], whole.ids[3:]]
    assert parted.ids == whole.ids
    assert parted.inputs == parted.items == {}
    for name in ("seeds", "group"):
        value = getattr(whole, name)
        assert value is getattr(parted, name) is None or torch.equal(value, getattr(parted, name))
    for field, present in whole.present.items():
        assert torch.equal(parted.present[field], present)
        assert torch.equal(torch.cat([part.present[field] for part in parted.parts]), present)
    assert [k for part in parted.parts for k in part.keys.get("caption", [])] == whole.keys["caption"]
    assert [part.ids for part in reader.collate(items, micro_batch=5).parts] == [whole.ids]
    assert [part.ids for part in reader.collate([], micro_batch=5).parts] == [[]]


class Drawn(Noise):
    """Adds what it draws, and tells it."""

    size = 5

    def parameters(self, decoded, seed):
        return {"amount": uniform(torch.tensor([seed]), 1)[0, 0], "rows": torch.tensor(decoded.shape[-2:])}


def test_what_a_view_draws_sample_by_sample_is_handed_out_with_the_batch():
    source = make_source(4)
    reader = make_reader(views={"image": [Drawn(), None, Drawn()]})
    plain = make_reader(views={})
    samples = [source[0], Sample("no picture", {"caption": "a"}), source[1], source[2]]
    batch = reader.collate([reader.read(sample, 0) for sample in samples])
    clean = plain.collate([plain.read(sample, 0) for sample in samples]).inputs["image"][0]["pixels"]
    assert set(batch.params) == {"image"}
    assert [set(view) for view in batch.params["image"]] == [{"amount", "rows"}, set(), {"amount", "rows"}]
    for view in (0, 2):
        drawn = batch.params["image"][view]
        assert drawn["rows"].tolist() == [[8, 8]] * 3
        torch.testing.assert_close(
            batch.inputs["image"][view]["pixels"] - clean, drawn["amount"][:, None, None, None].expand_as(clean),
            atol=2e-5, rtol=0,
        )  # fmt: skip
    assert not torch.equal(batch.params["image"][0]["amount"], batch.params["image"][2]["amount"])
    moved = batch.to("meta")
    assert moved.params["image"][0]["amount"].is_meta
    parted = reader.collate([reader.read(sample, 0) for sample in samples], micro_batch=2)
    assert torch.equal(
        torch.cat([part.params["image"][2]["amount"] for part in parted.parts]), batch.params["image"][2]["amount"]
    )
    assert parted.params == {}


def test_a_memoised_field_and_a_kept_reading_keep_what_was_drawn():
    source = make_source(2)
    reader = make_reader(views={"image": [Drawn()], "caption": [None]}, memoised=["image"])
    batch = reader.collate([reader.read(source[0], 0)])
    assert batch.params["image"][0]["amount"].shape == (1,)
    whole = reader.read(source[0], 0)
    assert isinstance(whole, Item)
    assert whole.only(["caption"]).params == {}
    assert whole.only(["image"]).params == whole.params
    again = reader.read(source[0], 1, whole.only(reader.fixed))
    assert not torch.equal(again.params["image"][0]["amount"], whole.params["image"][0]["amount"])


def test_a_recorded_view_passes_for_the_view_it_records():
    import pickle

    from mmrep.views.view import Recorded

    recorded = pickle.loads(pickle.dumps(Recorded(Drawn())))
    assert recorded.size == 5
    assert recorded.role == "global"
    pixels = torch.zeros(3, 4, 4)
    assert torch.equal(recorded.sample(pixels, 9), Drawn().sample(pixels, 9))
    assert torch.equal(recorded.params["amount"], Drawn().parameters(pixels, 9)["amount"])
    assert not hasattr(recorded, "no_such_thing")
