from __future__ import annotations

import io
import json
import tarfile

import pytest
from data_fakes import TinyImage, TinyText, make_reader, png, same

from mmrep.config import ConfigError, component
from mmrep.data.loader import BatchLoader, evaluation_items
from mmrep.data.reader import Reader
from mmrep.data.sample import Quarantined, Sample

COLUMNS = {"image": "png;jpg", "caption": "txt"}
COLUMN_ENDS = ("png", "txt")


def tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shard(path, keys):
    return tar(path, {f"{key}.{end}": png(key) if end == "png" else f"№ {key}" for key in keys for end in COLUMN_ENDS})


@pytest.fixture
def shards(tmp_path):
    for i in range(3):
        shard(tmp_path / f"train-{i:03}.tar", range(4))
    return tmp_path


def build(path, **fields):
    return component("sources", "webdataset", shards=str(path), **fields).build()


def ids(source, *args):
    return [record.id for record in source.stream(*args)]


def test_extensions_become_columns(tmp_path):
    files = {
        "d/x.JPG": b"\xff", "d/x.seg.png": b"s", "d/x.txt": "größe", "d/x.cls": "3", "d/x.json": json.dumps({"a": [1]}),
        "d/y.png": b"p", "__meta__/z.txt": "", "README": "no extension",
    }  # fmt: skip
    path = tar(tmp_path / "a.tar", files)
    first, second, *_ = build(path).stream()
    assert first == Sample("a.tar/d/x", {"jpg": b"\xff", "seg.png": b"s", "txt": "größe", "cls": 3, "json": {"a": [1]}})
    assert second.fields == {"png": b"p"}
    mapped = build(path, columns={"image": ".png; jpg", "kind": "cls"}, label="kind", group="kind")
    first, second, *_ = mapped.stream()
    assert (first.fields, first.label, first.group) == ({"image": b"\xff", "kind": 3}, 3, 3)
    assert (second.fields, second.label) == ({"image": b"p"}, None)
    assert mapped.columns == ("image", "kind")
    assert mapped.streaming
    assert mapped.has_group


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{000..002}.tar", "train-{000,001,002}.tar"])
def test_patterns_and_keys_that_recur_in_shards(shards, pattern):
    assert ids(build(shards / pattern)) == [f"train-{i:03}.tar/{k}" for i in range(3) for k in range(4)]


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("seed", [None, 4])
def test_parts_hold_each_sample_once(shards, parts, seed):
    source = build(shards / "*.tar")
    each = [ids(source, p, parts, seed) for p in range(parts)]
    assert sorted(i for part in each for i in part) == sorted(ids(source))
    assert all(each) or parts > 12


def test_a_seed_reorders_the_shards(shards):
    source = build(shards / "*.tar")
    orders = [ids(source, 0, 1, seed)[::4] for seed in range(12)]
    assert len(set(map(tuple, orders))) > 2
    assert all(sorted(order) == sorted(ids(source)[::4]) for order in orders)


def damaged(path, how):
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    last = members[-1]
    if how == "in content":
        data = data[: last.offset_data + 3]
    elif how == "in header":
        data = data[: last.offset + 100]
    elif how == "between files":
        data = data[: last.offset]
    elif how == "between samples":
        data = data[: members[-2].offset]
    elif how == "overwritten":
        data = data[: last.offset] + b"x" * 512 + data[last.offset + 512 :]
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["in content", "in header", "between files", "between samples", "overwritten"])
@pytest.mark.parametrize("columns", [COLUMNS, {}])
def test_a_damaged_shard_gives_what_is_whole(shards, how, columns):
    damaged(shards / "train-001.tar", how)
    records = list(build(shards / "*.tar", columns=columns).stream())
    notes = [r for r in records if isinstance(r, Quarantined)]
    assert [(n.id, n.field, n.cause) for n in notes] == [("train-001.tar", "", "damaged shard")]
    kept = [r.id for r in records if isinstance(r, Sample)]
    # Without columns nothing says whether the last sample was whole, even where the cut fell behind it.
    whole = 3 if columns or how != "between samples" else 2
    assert kept == [f"train-{i:03}.tar/{k}" for i in range(3) for k in range(whole if i == 1 else 4)]


def test_a_damaged_compressed_shard(tmp_path):
    path = tar(tmp_path / "a.tar.gz", {f"{i}.png": png(i, 64) for i in range(6)}, mode="w:gz")
    assert len(ids(build(path))) == 6
    path.write_bytes(path.read_bytes()[:-30000])
    records = list(build(path, columns={"image": "png"}).stream())
    assert records[-1].cause == "damaged shard"
    assert 0 < len(records) - 1 < 6


def test_what_is_no_tar_is_a_damaged_shard(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"no tar at all")
    assert [r.cause for r in build(path).stream()] == ["damaged shard"]


def test_bad_files_are_bad_samples(tmp_path):
    files = {"0.txt": b"\xff", "1.json": "{", "2.cls": "x", "3.png": png()[:40], "3.txt": "ok", "4.txt": "fine"}
    source = build(tar(tmp_path / "a.tar", files), columns={**COLUMNS, "meta": "json", "kind": "cls"})
    read = evaluation_items(source, Reader({"image": TinyImage(), "caption": TinyText()}))
    assert [getattr(item, "cause", item.id) for _, item in read] == [
        "invalid utf-8", "invalid json", "invalid cls", "unreadable file", "a.tar/4",
    ]  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_of_all_processes_hold_each_sample_once(shards, world):
    source, reader = build(shards / "*.tar", columns=COLUMNS), make_reader(group=False, views={})
    options = {"batch_size": 4, "world_size": world, "drop_last": False, "buffer": 3}
    alone, together = (
        [list(BatchLoader(source, reader, rank=r, workers=n, **options)) for r in range(world)] for n in (0, 2)
    )
    assert sorted(i for batches in alone for b in batches for i in b.ids) == sorted(ids(source))
    assert all(same(a, b) for x, y in zip(alone, together, strict=True) for a, b in zip(x, y, strict=True))


def test_wrong_shards_are_refused(shards):
    with pytest.raises(ConfigError, match=r"train-003.tar' matches no file; did you mean 'train-00"):
        build(shards / "train-{002..003}.tar")
    with pytest.raises(ConfigError, match="label: the data has no column 'captions'; did you mean 'caption'"):
        build(shards / "*.tar", columns=COLUMNS, label="captions")
    before = build(shards / "*.tar").fingerprint()
    shard(shards / "train-000.tar", range(5))
    assert build(shards / "*.tar").fingerprint() != before
