"""Tables and shards behind URLs: memory, a web server of this machine, and files; whole, missing and broken off."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fakes import TinyImage, TinyText, make_reader, png, write
from test_webdataset import COLUMNS, shard, tar

from mmrep.config import ConfigError, component
from mmrep.data.files import DataFile, expand, names
from mmrep.data.loader import BatchLoader, evaluation_items
from mmrep.data.reader import Reader
from mmrep.data.sample import Quarantined, Sample
from mmrep.registry import MissingPackageError


class Server(SimpleHTTPRequestHandler):
    """Serves a folder without ranges; a file named ``cut…`` breaks off after half of what was promised."""

    def copyfile(self, source, outputfile):
        data = source.read()
        half = Path(self.path.split("?")[0]).name.startswith("cut")
        outputfile.write(data[: len(data) // 2] if half else data)

    def send_head(self):
        if "forbidden" in self.path:
            return self.send_error(403)
        return super().send_head()

    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path):
    """A folder and its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def memory(tmp_path):
    """A folder, and a function that copies it into memory and returns its address."""
    fs = fsspec.filesystem("memory")

    def publish():
        for file in (f for f in tmp_path.rglob("*") if f.is_file()):
            fs.pipe(f"/bucket/{file.relative_to(tmp_path).as_posix()}", file.read_bytes())
        return "memory://bucket"

    yield tmp_path, publish
    fs.rm("/bucket", recursive=True) if fs.exists("/bucket") else None


@pytest.fixture(params=["path", "file", "memory", "http"])
def place(request, tmp_path):
    """Write to a folder, then call for its address."""
    if request.param == "memory":
        return request.getfixturevalue("memory")
    if request.param == "http":
        folder, url = request.getfixturevalue("web")
        return folder, lambda: url
    return tmp_path, lambda: str(tmp_path) if request.param == "path" else f"file://{tmp_path}"


def build(type, **fields):
    return component("sources", type, **fields).build()


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{000..002}.tar", "train-00[0-2].tar"])
def test_shards_are_the_same_wherever_they_are(place, pattern):
    folder, publish = place
    for i in range(3):
        shard(folder / f"train-{i:03}.tar", range(4))
    source = build("webdataset", shards=f"{publish()}/{pattern}", columns=COLUMNS)
    found = list(source.stream())
    assert [s.id for s in found] == [f"train-{i:03}.tar/{k}" for i in range(3) for k in range(4)]
    assert [s.fields for s in found] == [{"image": png(k), "caption": f"№ {k}"} for _ in range(3) for k in range(4)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_are_the_same_wherever_they_are(place, kind):
    folder, publish = place
    write(folder / "pictures/a.png", png(3))
    for part in range(2):
        file = folder / f"part-{part}.{kind}"
        if kind == "jsonl":
            write(file, f'{{"image": "pictures/a.png", "caption": "ö{part}"}}\n{{"caption": "zwei"}}\n')
        elif kind == "parquet":
            rows = [{"image": "pictures/a.png", "caption": f"ö{part}"}, {"image": None, "caption": "zwei"}]
            pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            tab = "\t" if kind == "tsv" else ","
            write(file, f"image{tab}caption\npictures/a.png{tab}ö{part}\n{tab}zwei\n")
    source = build("table", files=f"{publish()}/part-{{0,1}}.{kind}", paths=["image"])
    ids = [f"part-{part}.{kind}:{row}" for part in range(2) for row in range(2)]
    assert [s.id for s in source.stream()] == ids
    assert [s.fields["caption"] for s in source.stream()] == ["ö0", "zwei", "ö1", "zwei"]
    items = [item for _, item in evaluation_items(source, Reader({"image": TinyImage(), "caption": TinyText()}))]
    expected = TinyImage().prepare(png(3))["pixels"]
    assert all((items[i].inputs["image"][0]["pixels"] == expected).all() for i in (0, 2))
    assert "image" not in items[1].inputs


def test_a_picture_that_a_remote_table_names_and_that_is_not_there_is_a_bad_sample(memory):
    folder, publish = memory
    write(folder / "t.csv", "image\nnone.png\n")
    note = build("table", files=f"{publish()}/t.csv", paths=["image"]).record(0)
    assert (note.id, note.cause) == ("t.csv:0", "unreadable file")


def test_paths_of_a_remote_table_start_at_root(memory):
    folder, publish = memory
    write(folder / "t.csv", "image\na.png\n")
    write(folder / "other/a.png", b"abc")
    source = build("table", files=f"{publish()}/t.csv", paths=["image"], root="memory://bucket/other/")
    assert source[0].fields == {"image": b"abc"}


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_what_a_table_on_the_web_names(web, workers):
    folder, url = web
    for i in range(6):
        write(folder / f"{i}.png", png(i))
    write(folder / "t.csv", "image\n" + "".join(f"{i}.png\n" for i in range(6)))
    source = build("table", files=f"{url}/t.csv", paths=["image"])
    batches = list(BatchLoader(source, Reader({"image": TinyImage()}), batch_size=3, workers=workers))
    assert sorted(id for batch in batches for id in batch.ids) == [f"t.csv:{i}" for i in range(6)]


def test_a_transfer_that_breaks_off_is_a_damaged_shard(web):
    folder, url = web
    for name in ("cut.tar", "whole.tar"):
        tar(folder / name, {f"{i}.png": png(i, 512) for i in range(6)})  # more than what is on its way at a time
    records = list(build("webdataset", shards=f"{url}/*.tar", columns={"image": "png"}).stream())
    notes = [r for r in records if isinstance(r, Quarantined)]
    assert [(n.id, n.cause) for n in notes] == [("cut.tar", "damaged shard")]
    kept = [r.id for r in records if isinstance(r, Sample)]
    assert kept[-6:] == [f"whole.tar/{k}" for k in range(6)]
    assert kept[:-6] == [f"cut.tar/{k}" for k in range(len(kept) - 6)]
    assert 0 < len(kept) - 6 < 6


def test_a_shard_that_vanished_after_the_start_is_a_damaged_shard(place):
    folder, publish = place
    for i in range(2):
        shard(folder / f"{i}.tar", range(2))
    url = publish()
    source = build("webdataset", shards=f"{url}/*.tar", columns=COLUMNS)
    (folder / "0.tar").unlink()
    if url.startswith("memory"):
        fsspec.filesystem("memory").rm("/bucket/0.tar")
    reader = make_reader(group=False, views={})
    batches = list(BatchLoader(source, reader, batch_size=2, drop_last=False, shuffle=False))
    assert [id for batch in batches for id in batch.ids] == ["1.tar/0", "1.tar/1"]
    assert [(n.id, n.cause) for batch in batches for n in batch.quarantined] == [("0.tar", "damaged shard")]


def test_a_table_that_breaks_off_stops_the_run_with_its_address(web):
    folder, url = web
    write(folder / "cut.csv", "a\n" + "value\n" * 1000)
    with pytest.raises(ConfigError, match=r"files: http://127.*cut\.csv cannot be read as csv: "):
        build("table", files=f"{url}/cut.csv")


def test_a_missing_shard_is_named_with_its_likes(place):
    folder, publish = place
    shard(folder / "train-000.tar", range(1))
    with pytest.raises(ConfigError, match=r"shards: '.*train-001.tar' matches no file; did you mean 'train-000.tar'"):
        build("webdataset", shards=f"{publish()}/train-{{000..001}}.tar")
    with pytest.raises(ConfigError, match=r"'.*/test-\*.tar' matches no file"):
        build("webdataset", shards=f"{publish()}/test-*.tar")


def test_a_server_that_does_not_answer_and_a_protocol_that_nobody_knows(web):
    with pytest.raises(ConfigError, match=r"cannot be reached: ClientResponseError: 403"):
        build("table", files=f"{web[1]}/forbidden.csv")
    with pytest.raises(ConfigError, match=r"files: 'http://127.0.0.1:9/t.csv' cannot be reached"):
        build("table", files="http://127.0.0.1:9/t.csv")
    with pytest.raises(ConfigError, match=r"files: 'ftpp://x/t.csv': Protocol not known: ftpp"):
        build("table", files="ftpp://x/t.csv")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(MissingPackageError, match=r'pip install "mmrep\[s3\]"'):
        build("webdataset", shards="s3://bucket/train-{000..999}.tar")


def test_the_fingerprint_follows_a_remote_file(memory):
    folder, publish = memory
    write(folder / "t.csv", "a\n1\n")
    before = build("table", files=f"{publish()}/t.csv").fingerprint()
    assert before == build("table", files="memory://bucket/t.csv").fingerprint()
    write(folder / "t.csv", "a\n12\n")
    assert before != build("table", files=f"{publish()}/t.csv").fingerprint()


def test_names_of_files_are_short_and_unique(web):
    urls = ["https://h/d/x/a.tar?sig=1", "https://h/d/y/a.tar?sig=2"]
    assert names([DataFile(url) for url in urls]) == ["x/a.tar", "y/a.tar"]
    assert names([DataFile(f"https://h/get?file={i}") for i in range(2)]) == ["get?file=0", "get?file=1"]
    assert names([DataFile.local("/d/a.tar"), DataFile("s3://b/a.tar")]) == ["/d/a.tar", "s3://b/a.tar"]
    folder, url = web
    write(folder / "a.csv", "a\nx\n")
    assert build("table", files=f"{url}/a.csv?token=secret")[0].id == "a.csv:0"


def test_each_file_once_in_the_order_of_the_patterns(memory):
    folder, publish = memory
    for name in "bac":
        write(folder / f"{name}.csv", "x\n1\n")
    url = publish()
    found = expand([f"{url}/c.csv", f"{url}/*.csv", str(folder / "{b,a}.csv")], "files")
    assert [(Path(file.url).name, file.path is None) for file in found] == [
        ("c.csv", True), ("a.csv", True), ("b.csv", True), ("b.csv", False), ("a.csv", False),
    ]  # fmt: skip


def test_a_file_inside_a_remote_archive(memory, tmp_path):
    import zipfile

    folder, publish = memory
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("t.csv", "a\nx\n")
    source = build("table", files=f"zip://t.csv::{publish()}/a.zip")
    assert source[0].fields == {"a": "x"}
    assert DataFile("simplecache::https://h/t.CSV").suffix == ".csv"
