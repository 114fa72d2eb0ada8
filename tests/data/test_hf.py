from __future__ import annotations

import datasets
import pytest
from data_fakes import TinyImage, TinyText, make_reader, png, write

from mmrep.config import ConfigError, component
from mmrep.data.hf import HFDataset
from mmrep.data.loader import BatchLoader, evaluation_items
from mmrep.data.reader import Reader
from mmrep.data.sample import Quarantined, Sample

N = 12


@pytest.fixture(scope="module")
def dataset():
    rows = {
        "image": [{"bytes": png(i) if i != 4 else png(i)[:50], "path": None} for i in range(N)],
        "caption": [None if i == 2 else f"№ {i}" for i in range(N)],
        "kind": [i % 3 for i in range(N)],
        "key": [f"k{i}" for i in range(N)],
    }
    kinds = datasets.ClassLabel(names=["a", "b", "c"])
    features = {"image": datasets.Image(), "caption": datasets.Value("string"), "kind": kinds}
    return datasets.Dataset.from_dict(rows, datasets.Features({**features, "key": datasets.Value("string")}))


@pytest.fixture
def reader():
    return Reader({"image": TinyImage(), "caption": TinyText()})


def expected(i):
    return Sample(
        f"k{i}",
        {"image": png(i), **({} if i == 2 else {"caption": f"№ {i}"}), "kind": i % 3, "key": f"k{i}"},
        label=i % 3,
        group=i % 3,
    )


def test_a_dataset_in_memory(dataset, reader):
    source = HFDataset.wrap(dataset, id="key", label="kind", group="kind")
    assert [source[i] for i in range(N) if i != 4] == [expected(i) for i in range(N) if i != 4]
    assert source.columns == ("image", "caption", "kind", "key")
    assert source.class_names == ["a", "b", "c"]
    assert source.has_group
    bad = [item for _, item in evaluation_items(source, reader) if isinstance(item, Quarantined)]
    assert [(note.id, note.field, note.cause) for note in bad] == [("k4", "image", "unreadable file")]
    assert source.fingerprint() == HFDataset.wrap(dataset, id="key", label="kind", group="kind").fingerprint()
    assert HFDataset.wrap(dataset)[3].id == "3"
    formatted = HFDataset.wrap(dataset.with_format("numpy"))[3].fields
    assert formatted == expected(3).fields
    assert type(formatted["kind"]) is int


@pytest.mark.parametrize(("shards", "parts"), [(1, 1), (4, 2), (4, 3), (2, 5), (1, 3)])
@pytest.mark.parametrize("seed", [None, 1])
def test_every_part_of_a_stream(dataset, shards, parts, seed):
    source = HFDataset.wrap(dataset.to_iterable_dataset(num_shards=shards), label="kind")
    assert source.streaming
    each = [list(source.stream(part, parts, seed)) for part in range(parts)]
    assert all(each)
    found = [s for part in each for s in part]
    assert sorted(s.fields["key"] for s in found) == sorted(f"k{i}" for i in range(N))
    assert len({s.id for s in found}) == N
    assert sorted(s.id for s in found) == sorted(s.id for s in source.stream())
    assert {s.fields["key"]: s.label for s in found} == {f"k{i}": i % 3 for i in range(N)}
    assert all(isinstance(s.fields["image"], bytes) for s in found)


def test_a_seed_reorders_the_shards_of_a_stream(dataset):
    source = HFDataset.wrap(dataset.to_iterable_dataset(num_shards=6))
    orders = [[s.id for s in source.stream(seed=seed)] for seed in (None, 1, 1, 2)]
    assert orders[1] == orders[2]
    assert orders[0] != orders[1] != orders[3]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_stream(dataset, workers):
    source = HFDataset.wrap(dataset.to_iterable_dataset(num_shards=3), id="key")
    batches = list(BatchLoader(source, make_reader(views={}, group=False), batch_size=4, workers=workers))
    assert sorted(id for batch in batches for id in batch.ids) == sorted(f"k{i}" for i in range(N) if i != 4)


def test_saved_folders(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1, 0])}).save_to_disk(tmp_path / "more")
    build = lambda **fields: component("sources", "hf-dataset", id="key", **fields).build()  # noqa: E731
    assert build(path=f"{tmp_path}/one", label="kind", group="kind")[3] == expected(3)
    assert [s.id for s in build(path=f"{tmp_path}/more", split="test").stream()] == ["k1", "k0"]
    assert len(list(build(path=f"{tmp_path}/more", streaming=True).stream())) == N
    with pytest.raises(ConfigError, match=r"no 'tset'; did you mean 'test'\? It has: train, test"):
        build(path=f"{tmp_path}/more", split="tset")


@pytest.mark.parametrize("streaming", [False, True])
def test_files_read_by_a_builder(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path / "t.jsonl", '{"caption": "ä"}\n{"caption": null}\n')
    source = component("sources", "hf-dataset", path="json", data_files=str(file), streaming=streaming).build()
    found = list(source.stream())
    assert [s.fields for s in found] == [{"caption": "ä"}, {}]
    assert [s.id for s in found] == (["0:0", "0:1"] if streaming else ["0", "1"])


def test_wrong_datasets_are_refused(dataset, tmp_path):
    with pytest.raises(ConfigError, match="choose one of its splits: a, b"):
        HFDataset.wrap(datasets.DatasetDict({"a": dataset, "b": dataset}))
    with pytest.raises(ConfigError, match="'kinds'; did you mean 'kind'"):
        HFDataset.wrap(dataset, label="kinds")
    with pytest.raises(ConfigError, match="more than once"):
        HFDataset.wrap(dataset, id="kind")
    with pytest.raises(ConfigError, match="empty"):
        HFDataset.wrap(dataset.select([]))
    with pytest.raises(ConfigError, match="got list"):
        HFDataset.wrap([1])
    with pytest.raises(ConfigError, match="csv"):
        component("sources", "hf-dataset", path="csv", data_files=f"{tmp_path}/none.csv").build()
