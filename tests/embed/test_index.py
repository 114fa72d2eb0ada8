"""The index: exact search, a folder that reopens elsewhere, and every way it can be broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mmrep.embed import Hit, Index


def vectors(n=20, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def records(n=20):
    return [{"id": f"r{i}", "caption": f"item {i}"} for i in range(n)]


@pytest.fixture
def saved(tmp_path):
    return Index.build(vectors(), records(), meta={"model": "m", "fingerprint": "abc"}).save(tmp_path / "index")


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_search_is_exact(metric):
    x, queries = vectors() * np.arange(1, 21, dtype=np.float32)[:, None], vectors(7, seed=1) * 5
    index = Index.build(x, records(), metric=metric)
    found = index.search(queries, k=4)
    for query, hits in zip(queries, found, strict=True):
        scores = [float(query @ row) for row in x]
        if metric == "cosine":
            scores = [s / np.linalg.norm(query) / np.linalg.norm(row) for s, row in zip(scores, x, strict=True)]
        want = sorted(range(20), key=lambda i: -scores[i])[:4]
        assert [hit.id for hit in hits] == [f"r{i}" for i in want]
        assert [hit.score for hit in hits] == pytest.approx([scores[i] for i in want], rel=1e-5)
        assert all(hit.record == {"id": hit.id, "caption": f"item {hit.id[1:]}"} for hit in hits)


def test_arguments_of_every_kind():
    x = vectors()
    index = Index.build(torch.from_numpy(x).to(torch.float64), records())
    one = index.search(torch.from_numpy(x[3]).requires_grad_(), k=1)
    assert one == index.search(x[3].tolist(), k=1) == index.search([x[3].tolist()], k=1)
    assert one == [[Hit("r3", one[0][0].score, records()[3])]]
    assert one[0][0].score == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_fewer_than_k_rows_give_fewer_hits(factory):
    index = Index.build(vectors(3), records(3), factory=factory)
    assert sorted(hit.id for hit in index.search(vectors(1), k=50)[0]) == ["r0", "r1", "r2"]


def test_rows_that_an_approximate_structure_does_not_find_are_left_out():
    index = Index.build(vectors(200), records(200), factory="IVF50,Flat")
    hits = index.search(vectors(5, seed=1), k=200)
    assert all(0 < len(row) < 200 for row in hits)
    assert all(len({hit.id for hit in row}) == len(row) for row in hits)


def test_an_empty_index_finds_nothing_and_grows(tmp_path):
    index = Index.open(Index.build(np.zeros((0, 6)), []).save(tmp_path / "i"))
    assert index.search(vectors(2), k=3) == [[], []]
    index.add(vectors(), records())
    assert len(index) == 20
    assert "r7" in index
    assert index.search(np.zeros((0, 6)), k=3) == []


def test_it_reopens_in_another_process(saved):
    here = Index.open(saved)
    code = (
        "import sys, json, numpy as np; from mmrep.embed import Index\n"
        "index = Index.open(sys.argv[1])\n"
        "q = np.random.default_rng(5).normal(size=(3, 6)).astype(np.float32)\n"
        "print(json.dumps([[(h.id, h.score, h.record) for h in row] for row in index.search(q, k=5)]))\n"
    )
    out = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, check=True).stdout
    want = here.search(vectors(3, seed=5), k=5)
    assert json.loads(out) == [[[h.id, h.score, h.record] for h in row] for row in want]
    assert here.search(vectors(3, seed=5), 5) == Index.build(vectors(), records()).search(vectors(3, seed=5), 5)


def test_metadata_of_every_script_survives(tmp_path):
    odd = [
        {
            "id": "naïve 日本語 🦜",
            "caption": "العربية\u2028line\u2029\nnew\x00nul",
            "nested": {"a": [1, None, 2.5, True]},
        },
        {"id": 7, "path": os.fsdecode(b"caf\xe9.png")},  # a file name that is not UTF-8
        {"id": "", "x": "\r\n\x85"},
    ]
    index = Index.build(vectors(3), odd, meta={"model": "modèle"})
    again = Index.open(index.save(tmp_path / "índice 日本"))
    assert again.ids == ["naïve 日本語 🦜", 7, ""]
    found = {hit.id: hit.record for hit in again.search(vectors(1), k=3)[0]}
    assert found == {record["id"]: record for record in odd}
    assert again.meta == {"model": "modèle"}


def test_records_are_kept_as_they_were():
    record = {"id": "a", "tags": ["x"]}
    index = Index.build(vectors(1), [record])
    record["tags"].append("later")
    index.search(vectors(1))[0][0].record["tags"].append("also later")
    assert index.search(vectors(1))[0][0].record == {"id": "a", "tags": ["x"]}


def test_repeated_ids_are_named_and_nothing_is_added():
    index = Index.build(vectors(3), records(3))
    with pytest.raises(ValueError, match=r"'r1', 'new'$"):
        index.add(vectors(4), [{"id": "fresh"}, {"id": "r1"}, {"id": "new"}, {"id": "new"}])
    assert index.ids == ["r0", "r1", "r2"]
    assert "fresh" not in index
    assert len(index.search(vectors(1), k=9)[0]) == 3
    with pytest.raises(ValueError, match="'1'"):
        Index.build(vectors(2), [{"id": 1}, {"id": "1"}])
    with pytest.raises(ValueError, match="and 3 more"):
        Index.build(vectors(9), [{"id": "same"}] * 9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_numbers_are_named(bad):
    x = vectors()
    x[[4, 9], 2] = bad
    for metric in ("cosine", "dot"):
        with pytest.raises(ValueError, match=r"'r4', 'r9'$"):
            Index.build(x, records(), metric=metric)
    with pytest.raises(ValueError, match="query 4"):
        Index.build(vectors(), records()).search(x)


def test_a_zero_row_has_no_cosine_but_a_dot_product():
    x = vectors()
    x[5] = 0
    with pytest.raises(ValueError, match=r"'r5'$"):
        Index.build(x, records())
    assert len(Index.build(x, records(), metric="dot")) == 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Index.build(vectors(), records(19)), "20 embeddings but 19 records"),
        (lambda: Index.build(vectors()[0], records()), r"shape \[rows, dim\]"),
        (lambda: Index.build(vectors(1), [{"caption": "x"}]), "record 0: every record is a dict with an 'id'"),
        (lambda: Index.build(vectors(1), [{"id": True}]), "string or an integer"),
        (lambda: Index.build(vectors(1), [{"id": "a", "x": float("nan")}]), "record of 'a' cannot be written as JSON"),
        (lambda: Index.build(vectors(1), [{"id": "a", "x": object()}]), "record of 'a' cannot be written as JSON"),
        (lambda: Index.build(vectors(1), records(1), metric="cosin"), "did you mean 'cosine'"),
        (lambda: Index.build(vectors(1), records(1), factory="Flta"), "FAISS knows no index 'Flta'"),
        (lambda: Index.build(np.zeros((0, 0)), []), "at least one dimension"),
        (lambda: Index.build(vectors(), records()).search(vectors(1, 5)), "6 dimensions, these vectors have 5"),
        (lambda: Index.build(vectors(), records()).add(vectors(1, 5), [{"id": "z"}]), "these vectors have 5"),
        (lambda: Index.build(vectors(), records()).search(vectors(1), k=0), "k must be at least 1"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_with_another_fingerprint_is_refused(saved):
    index = Index.open(saved)
    index.check_model("abc")
    with pytest.raises(ValueError, match=r'another model \(m\): its fingerprint is "abc", this model\'s is "abd"'):
        index.check_model("abd")
    with pytest.raises(ValueError, match="without a model fingerprint"):
        Index.build(vectors(), records()).check_model("abc")


def test_a_numeric_fingerprint_may_differ_by_rounding():
    print_ = [0.5, -0.25, 0.125]
    index = Index.build(vectors(), records(), meta={"fingerprint": print_})
    index.check_model([0.5002, -0.25, 0.125])
    for other in ([0.501, -0.25, 0.125], [0.5, -0.25], "abc", [], None):
        with pytest.raises(ValueError, match="another model"):
            index.check_model(other)


def edit_meta(folder, change):
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def rewrite_records(folder, change):
    (path,) = folder.glob("records-*.jsonl")
    text = change(path.read_text())
    path.write_text(text)
    edit_meta(folder, lambda meta: meta["files"]["records"].update(bytes=len(text)))


def truncate(folder, pattern):
    (path,) = folder.glob(pattern)
    path.write_bytes(path.read_bytes()[:-10])


def truncate_quietly(folder):
    truncate(folder, "index-*")
    edit_meta(folder, lambda m: m["files"]["index"].update(bytes=m["files"]["index"]["bytes"] - 10))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "meta.json").unlink(), FileNotFoundError, "is not an index folder: it has no meta.json"),
        (lambda f: next(f.glob("index-*")).unlink(), FileNotFoundError, "lacks its file index-"),
        (lambda f: next(f.glob("records-*")).unlink(), FileNotFoundError, "lacks its file records-"),
        (lambda f: truncate(f, "index-*"), ValueError, "bytes, but meta.json says .*: truncated"),
        (lambda f: truncate(f, "records-*"), ValueError, "bytes, but meta.json says .*: truncated"),
        (truncate_quietly, ValueError, "cannot be read by FAISS"),
        (lambda f: (f / "meta.json").write_text("{"), ValueError, "is not JSON"),
        (lambda f: (f / "meta.json").write_text("[]"), ValueError, "is not an index folder"),
        (lambda f: edit_meta(f, lambda m: m.update(format="x")), ValueError, "does not say format 'mmrep-index'"),
        (lambda f: edit_meta(f, lambda m: m.update(version=9)), ValueError, "version 9; this mmrep reads version 1"),
        (lambda f: edit_meta(f, lambda m: m.pop("metric")), ValueError, "lacks metric"),
        (lambda f: edit_meta(f, lambda m: m["files"].pop("index")), ValueError, "lacks files.index"),
        (lambda f: edit_meta(f, lambda m: m.update(dim=7)), ValueError, "6 dimensions, but meta.json says 7"),
        (lambda f: edit_meta(f, lambda m: m.update(count=19)), ValueError, "20 rows, but meta.json says 19"),
        (lambda f: rewrite_records(f, lambda t: t.split("\n", 1)[1]), ValueError, "19 records with 19 ids"),
        (lambda f: rewrite_records(f, lambda t: t.replace("r3", "r4")), ValueError, "20 records with 19 ids"),
        (lambda f: rewrite_records(f, lambda t: t.replace("{", "x", 1)), ValueError, "line 1, is not JSON"),
        (lambda f: rewrite_records(f, lambda t: t.replace('"id"', '"ID"', 1)), ValueError, "line 1: every record"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_reason(saved, damage, error, message):
    damage(saved)
    with pytest.raises(error, match=message):
        Index.open(saved)


def test_a_folder_that_is_not_an_index_is_neither_read_nor_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no index folder"):
        Index.open(tmp_path / "nowhere")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("dear")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "meta.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    index = Index.build(vectors(), records())
    for name in ("letters", "run", "file"):
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        with pytest.raises(FileExistsError, match="is not an index folder: nothing was written"):
            index.save(tmp_path / name)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_saving_again_replaces_and_leaves_no_litter(saved):
    Index.build(vectors(5, 3), records(5)).save(saved)
    assert len(Index.open(saved)) == 5
    assert len(list(saved.iterdir())) == 3


def test_a_save_that_fails_leaves_the_old_index(saved, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Index.build(vectors(5, 3), records(5)).save(saved)
    monkeypatch.undo()
    assert len(Index.open(saved)) == 20
    Index.build(vectors(5, 3), records(5)).save(saved)
    assert len(list(saved.iterdir())) == 3


def test_kill_at_any_moment_leaves_a_whole_index(saved):
    code = (
        "import sys, numpy as np; from mmrep.embed import Index\n"
        "many = [Index.build(np.ones((n, 6)), [{'id': i} for i in range(n)]) for n in (500, 900)]\n"
        "while True:\n"
        "    for index in many:\n"
        "        index.save(sys.argv[1]); print('.', flush=True)\n"
    )
    sizes = set()
    for pause in (0.0, 0.001, 0.003):
        with subprocess.Popen([sys.executable, "-c", code, saved], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
        sizes.add(len(Index.open(saved)))
    assert sizes <= {500, 900}


def test_there_is_no_pickle_in_the_folder(saved):
    kinds = sorted(path.suffix for path in saved.iterdir())
    assert kinds == [".faiss", ".json", ".jsonl"]
    (numbers,) = saved.glob("*.faiss")
    assert numbers.read_bytes()[:4] == b"IxFI"  # FAISS's own header of a flat inner product index
