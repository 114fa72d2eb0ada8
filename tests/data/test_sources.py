from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fakes import TinyImage, TinyText, png, write

from mmrep.config import ConfigError, component
from mmrep.data.emoji import category, load_concepts, split_families
from mmrep.data.imagefolder import ImageFolder, ImageFolderConfig
from mmrep.data.loader import evaluation_items
from mmrep.data.reader import Reader
from mmrep.data.records import Records
from mmrep.data.sample import Quarantined, Sample
from mmrep.data.table import Table, TableConfig


def build(type, **fields):
    """Through the registry and the config, as a recipe does."""
    return component("sources", type, **fields).build()


def samples(source):
    return [source[i] for i in range(len(source))]


def causes(source):
    return [note.cause for note in source.stream() if isinstance(note, Quarantined)]


# Python lists -------------------------------------------------------------------------------------------------------


def test_lists_hold_any_value_and_keep_missing_ones_out():
    pixels = np.zeros((2, 2, 3))
    source = Records.from_lists(
        image=[pixels, None], caption=["schöne Katze 🐈", float("nan")], id=["a", "b"], label=[np.int64(3), "x"],
        group=[1.0, None],
    )  # fmt: skip
    first, second = samples(source)
    assert first.fields["image"] is pixels
    assert (first.id, first.label, first.group) == ("a", 3, 1)
    assert type(first.label) is int
    assert first.fields["caption"] == "schöne Katze 🐈"
    assert second == Sample("b", {"id": "b", "label": "x"}, "x", None)
    assert source.has_group
    assert not Records.from_lists(a=[1]).has_group


def test_lists_number_samples_without_ids():
    assert [s.id for s in samples(Records.from_lists(a=[5, 6]))] == ["0", "1"]


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ({"image": [1, 2], "caption": ["a"]}, "image has 2, caption has 1"),
        ({"caption": "abc"}, "caption: expected a list"),
        ({"caption": 4}, "caption: expected a list"),
        ({}, "there are none"),
        ({"caption": []}, "empty"),
        ({"caption": ["a", "b", "c"], "id": [1, "1", 2]}, r"'1' \(2 times\)"),
    ],
)
def test_wrong_lists_are_refused_with_their_names(lists, words):
    with pytest.raises(ConfigError, match=words):
        Records.from_lists(**lists)


def test_records_of_a_recipe():
    source = build("list", records=[{"caption": "a", "n": 1}, {"caption": None}], id="n")
    assert source.columns == ("caption", "n")
    assert source[0].id == "1"
    assert isinstance(source.record(1), Quarantined)
    assert source.record(1).cause == "missing id"
    with pytest.raises(ConfigError, match="label: the data has no column 'captoin'; did you mean 'caption'"):
        build("list", records=[{"caption": "a"}], label="captoin")


@pytest.mark.parametrize("label", [2.5, [1], {"a": 1}])
def test_a_label_is_text_or_a_whole_number(label):
    assert Records.from_lists(a=[1], label=[label]).record(0).cause == "wrong label"


def test_the_fingerprint_of_lists_is_their_content():
    def fingerprint(value):
        return Records.from_lists(a=[value]).fingerprint()

    big = np.zeros(5000)
    other = big.copy()
    other[2500] = 1  # numpy's repr leaves it out
    values = ["a", b"a", "b", 1, "1", big, other, Path("/a")]
    assert len({fingerprint(v) for v in values}) == len(values)
    assert fingerprint(big) == fingerprint(big.copy())


# Tables -------------------------------------------------------------------------------------------------------------

ROWS = [
    {"image": "a.png", "caption": "eine Katze, „grau“\nund groß", "kind": "7"},
    {"image": "ü/b.png", "caption": "", "kind": "8"},
    {"image": "", "caption": "猫", "kind": "7"},
]


def table_file(folder: Path, kind: str) -> Path:
    file = folder / f"table.{kind}"
    if kind in ("csv", "tsv"):
        with file.open("w", newline="", encoding="utf-8-sig" if kind == "csv" else "utf-8") as lines:
            writer = csv.DictWriter(lines, ["image", "caption", "kind"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "jsonl":
        rows = [{k: v or None for k, v in row.items()} for row in ROWS]
        file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist([{k: v or None for k, v in row.items()} for row in ROWS]), file)
    return file


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_samples(tmp_path, kind):
    file = table_file(tmp_path, kind)
    source = build("table", files=str(file), paths=["image"], label="kind", group="kind")
    assert samples(source) == [
        Sample(f"{file.name}:0", {"image": tmp_path / "a.png", "caption": ROWS[0]["caption"], "kind": "7"}, "7", "7"),
        Sample(f"{file.name}:1", {"image": tmp_path / "ü/b.png", "kind": "8"}, "8", "8"),
        Sample(f"{file.name}:2", {"caption": "猫", "kind": "7"}, "7", "7"),
    ]
    assert list(source.columns) == ["image", "caption", "kind"]


def test_paths_start_at_root_and_other_columns_stay_text(tmp_path):
    file = table_file(tmp_path, "csv")
    assert build("table", files=str(file), paths=["image"], root="/data")[0].fields["image"] == Path("/data/a.png")
    assert build("table", files=str(file))[0].fields["image"] == "a.png"


def test_globs_and_lists_join_files_in_order(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}/part.csv", f"caption\n{name}1\n{name}2\n")
    write(tmp_path / "z.jsonl", '{"other": 1}')
    source = build("table", files=[f"{tmp_path}/*/part.csv", f"{tmp_path}/z.jsonl", f"{tmp_path}/a/part.csv"])
    assert [s.id for s in samples(source)] == [f"{n}/part.csv:{i}" for n in "abc" for i in range(2)] + ["z.jsonl:0"]
    assert source[2].fields == {"caption": "b1"}
    assert list(source.columns) == ["caption", "other"]


def test_parquet_bytes_and_hugging_face_pictures(tmp_path):
    rows = [
        {"raw": b"\x00\xff", "image": {"bytes": b"abc", "path": "x.png"}, "n": 1.0},
        {"raw": b"", "image": {"bytes": None, "path": "y.png"}, "n": float("nan")},
        {"raw": None, "image": {"bytes": None, "path": None}, "n": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = [s.fields for s in samples(build("table", files=f"{tmp_path}/t.parquet"))]
    assert found == [{"raw": b"\x00\xff", "image": b"abc", "n": 1.0}, {"image": tmp_path / "y.png"}, {}]


def test_malformed_rows_are_bad_samples_and_the_rest_is_read(tmp_path):
    table = build("table", files=str(write(tmp_path / "t.csv", b"a,b\n1,2\n3\n4,\xff\n5,6,7\n8,9\n")))
    assert len(table) == 5
    assert sorted(causes(table)) == ["invalid utf-8", "malformed row", "malformed row"]
    assert [s.fields for s in table.stream() if isinstance(s, Sample)] == [{"a": "1", "b": "2"}, {"a": "8", "b": "9"}]
    details = " ".join(note.detail for note in table.stream() if isinstance(note, Quarantined))
    assert "line 3: 1 cells for 2 columns" in details
    lines = build("table", files=str(write(tmp_path / "t.jsonl", b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}')))
    assert causes(lines) == ["malformed row", "malformed row", "invalid utf-8"]
    assert [note.id for note in lines.stream()] == [f"t.jsonl:{i}" for i in range(5)]


def test_wrong_tables_are_refused_with_what_exists(tmp_path):
    good = write(tmp_path / "train.csv", "image,caption\n1,2\n")
    for config, words in [
        ({"files": f"{tmp_path}/trian.csv"}, r"trian.csv' matches no file; did you mean 'train.csv'.* holds: ids.csv"),
        ({"files": f"{tmp_path}/nowhere/*.csv"}, "there is no folder"),
        ({"files": str(good), "paths": ["imgae"]}, "paths: the data has no column 'imgae'; did you mean 'image'"),
        ({"files": str(good), "group": "concept"}, "group: the data has no column 'concept'. It has: image, caption"),
        ({"files": str(write(tmp_path / "t.xyz", "a"))}, "set `format`"),
        ({"files": str(write(tmp_path / "t.parquet", "a"))}, "cannot be read as parquet"),
        ({"files": str(write(tmp_path / "twice.csv", "a,a\n1,2\n"))}, "name each column once"),
        ({"files": str(write(tmp_path / "none.csv", "a,b\n"))}, "holds no rows"),
        ({"files": str(write(tmp_path / "ids.csv", "a\nx\ny\nx\n")), "id": "a"}, r"'x' \(2 times\).*`group: a`"),
    ]:
        with pytest.raises(ConfigError, match=words):
            build("table", **config)


def test_an_id_column_names_the_samples(tmp_path):
    source = build("table", files=str(write(tmp_path / "t.csv", "a,b\nx,1\ny,2\n,3\n")), id="a")
    assert [getattr(r, "id") for r in source.stream()] == ["x", "y", "t.csv:2"]  # noqa: B009
    assert causes(source) == ["missing id"]


def test_the_fingerprint_follows_the_file(tmp_path):
    file = write(tmp_path / "t.csv", "a\n1\n")
    before = build("table", files=str(file)).fingerprint()
    assert before == build("table", files=str(file)).fingerprint()
    write(file, "a\n1\n2\n")
    assert before != build("table", files=str(file)).fingerprint()


def test_a_table_cannot_be_given_an_unknown_key():
    with pytest.raises(ConfigError, match=r"file: unknown; did you mean 'files'"):
        build("table", file="x.csv")


# Folders of pictures ------------------------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    for name in ("dog/2.PNG", "dog/sub/1.jpg", "cät/1.png", "loose.webp", "dog/.hidden.png", "dog/notes.md"):
        write(tmp_path / name, png())
    source = build("imagefolder", path=str(tmp_path), group="class_name")
    found = samples(source)
    assert [s.id for s in found] == ["cät/1.png", "dog/2.PNG", "dog/sub/1.jpg", "loose.webp"]
    assert [s.label for s in found] == [0, 1, 1, None]
    assert source.class_names == ["cät", "dog"]
    assert [s.fields.get("class_name") for s in found] == ["cät", "dog", "dog", None]
    assert found[0].fields["image"] == tmp_path / "cät/1.png"
    assert found[1].group == "dog"
    chosen = build("imagefolder", path=str(tmp_path), classes=["dog", "cät"])
    assert [s.label for s in samples(chosen)] == [1, 0, 0]
    assert [s.id for s in samples(build("imagefolder", path=str(tmp_path), classes=["cät"]))] == ["cät/1.png"]


def test_captions_beside_the_pictures(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.png", png(i))
    write(tmp_path / "0.txt", " Käse \n")
    write(tmp_path / "1.txt", "\n")
    write(tmp_path / "2.txt", b"\xff")
    source = build("imagefolder", path=str(tmp_path))
    assert source.columns == ("image", "caption")
    assert source[0].fields["caption"] == "Käse"
    assert "caption" not in source[1].fields
    assert (source.record(2).cause, source.record(2).id) == ("invalid utf-8", "2.png")
    assert source.class_names is None


def test_metadata(tmp_path):
    for name in ("train/a.png", "train/b.png", "train/deep/c.png"):
        write(tmp_path / name, png())
    rows = [
        {"file_name": "a.png", "caption": ["eins", "one"], "kind": 4},
        {"file_name": "deep/c.png", "caption": "drei", "kind": None},
        {"file_name": "gone.png", "caption": "weg"},
    ]
    write(tmp_path / "train/metadata.jsonl", "\n".join(json.dumps(r) for r in rows) + "\n{broken\n")
    source = build("imagefolder", path=f"{tmp_path}/train", label="kind")
    assert [s.id for s in source.stream()] == ["a.png", "b.png", "deep/c.png", "gone.png", "metadata.jsonl:3"]
    assert source[0].fields["caption"] == ["eins", "one"]
    assert [source[i].label for i in range(4)] == [4, None, None, None]
    assert causes(source) == ["malformed row"]
    read = list(evaluation_items(source, Reader({"image": TinyImage(), "caption": TinyText()})))
    assert [item.cause for _, item in read if isinstance(item, Quarantined)] == ["missing file", "malformed row"]


def test_metadata_as_csv(tmp_path):
    write(tmp_path / "a.png", png())
    write(tmp_path / "metadata.csv", "file_name,caption\na.png,Bär\n")
    assert build("imagefolder", path=str(tmp_path))[0].fields == {"image": tmp_path / "a.png", "caption": "Bär"}


def test_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path / "real/a.png", png())
    (tmp_path / "root/loop").mkdir(parents=True)
    (tmp_path / "root/linked").symlink_to(tmp_path / "real")
    (tmp_path / "root/loop/back").symlink_to(tmp_path / "root")
    assert [s.id for s in samples(build("imagefolder", path=f"{tmp_path}/root"))] == ["linked/a.png"]


def test_wrong_folders_are_refused_with_what_exists(tmp_path):
    write(tmp_path / "images/cat/a.png", png())
    (tmp_path / "empty").mkdir()
    write(tmp_path / "twice/metadata.csv", "file_name\na.png\na.png\n")
    write(tmp_path / "nameless/metadata.csv", "filename\na.png\n")
    for config, words in [
        ({"path": f"{tmp_path}/imgaes"}, "is no folder; did you mean 'images'"),
        ({"path": f"{tmp_path}/empty"}, "holds no picture"),
        ({"path": f"{tmp_path}/images", "classes": ["cta"]}, "'cta' is no folder .*; did you mean 'cat'"),
        ({"path": f"{tmp_path}/images", "classes": []}, "empty"),
        ({"path": f"{tmp_path}/images", "label": "kind"}, "no column 'kind'. It has: image, class_name"),
        ({"path": f"{tmp_path}/twice"}, "'a.png' has two rows"),
        ({"path": f"{tmp_path}/nameless"}, "needs a column 'file_name'; did you mean 'filename'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            build("imagefolder", **config)


# Emoji --------------------------------------------------------------------------------------------------------------


def test_emoji_splits_and_artists():
    train = build("emoji", artists=["twemoji", "openmoji"], languages=["en", "de"])
    parts = split_families(load_concepts(), 0)
    assert len(train) == 2 * len(parts["train"])
    first, twin = train[0], train[len(train) // 2]
    assert first.group == twin.group == parts["train"][0].id
    assert first.label == parts["train"][0].family
    assert first.id != twin.id
    assert first.fields["image"].startswith(b"\x89PNG")
    assert first.fields["image"] != twin.fields["image"]
    names = parts["train"][0].names
    assert first.fields["caption"] == [*names["en"], *names["de"]]
    assert train.has_group
    everything = {s for split in ("train", "validation", "test") for s in _concepts(build("emoji", split=split))}
    assert everything == _concepts(build("emoji", split="all"))
    assert _concepts(build("emoji", split="test", seed=1)) != _concepts(build("emoji", split="test"))


def test_emoji_categories_are_labels_where_the_charts_know_them():
    concepts = {concept.id: category(concept) for concept in load_concepts()}
    plain = build("emoji", split="all")
    column, ids = plain.column("category"), plain.column("concept")
    assert column == [found and found[0] for found in map(concepts.get, ids)]
    assert {"Food & Drink", "Animals & Nature", "Flags"} < set(column)
    labelled = build("emoji", split="all", label="category")
    assert [labelled[n].label for n in range(0, len(labelled), 300)] == labelled.column("category")[::300]
    unknown = {concept for concept, found in zip(ids, column, strict=True) if found is None}
    assert unknown, "else nothing is left out"
    assert _concepts(labelled) == _concepts(plain) - unknown
    assert len(set(labelled.column("category"))) == 9


def _concepts(source):
    return {concept.id for concept, _ in source._drawings}


def test_emoji_options_are_checked():
    for config, words in [
        ({"split": "tset"}, "split.*did you mean 'test'"),
        ({"languages": ["dee"]}, "languages: no names in 'dee'; did you mean 'de'"),
        ({"label": "concpet"}, "did you mean 'concept'"),
        ({"artists": []}, "artists"),
        ({"split": "test", "test": 0}, "holds no families"),
    ]:
        with pytest.raises(ConfigError, match=words):
            build("emoji", **config)


# All ----------------------------------------------------------------------------------------------------------------


def test_parts_of_a_map_style_source_hold_each_sample_once(tmp_path):
    for i in range(7):
        write(tmp_path / f"{i}.png", png(i))
    source = ImageFolder(ImageFolderConfig(path=str(tmp_path)))
    for parts in (1, 2, 3, 9):
        assert sorted(s.id for p in range(parts) for s in source.stream(p, parts)) == [f"{i}.png" for i in range(7)]


def test_a_table_keeps_csv_cells_as_they_are_written(tmp_path):
    file = write(tmp_path / "t.csv", "a,b\n007,NA\n1e5,null\n")
    assert [s.fields for s in samples(Table(TableConfig(files=str(file))))] == [
        {"a": "007", "b": "NA"}, {"a": "1e5", "b": "null"},
    ]  # fmt: skip


def test_cells_of_many_lines_in_a_large_table(tmp_path):
    text = "a line of the cell\n" * 50
    file = write(tmp_path / "t.csv", "a,b\n" + f'x,"{text}"\n' * 3000)  # more than one block of the parser
    source = Table(TableConfig(files=str(file)))
    assert len(source) == 3000
    assert all(source[i].fields == {"a": "x", "b": text} for i in range(0, 3000, 7))
