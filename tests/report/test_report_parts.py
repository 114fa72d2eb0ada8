"""What the page says: ratios, curves, rankings, the map and the thumbnails, each against a plain computation."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from report_world import make_encoded, make_evaluations, make_metrics, make_pairs

from mmrep.report import read_run
from mmrep.report.charts import _binned, _line, _moving_average, training_charts
from mmrep.report.examples import examples
from mmrep.report.health import between, per_field
from mmrep.report.heatmap import similarity_heatmap
from mmrep.report.map import HEIGHT, MARGIN, PICTURE, WIDTH, space_map
from mmrep.report.tables import headline_cards, result_tables
from mmrep.report.thumbnails import Viewer, clean, shorten, thumbnail

TIMES = "\N{MULTIPLICATION SIGN}"


# results


def test_ratios_to_chance_and_their_direction():
    rows = [
        {
            "who": "model",
            "direction": "a→b",
            "R@5": 0.5,
            "median_rank": 5.0,
            "mean_reciprocal_rank": 0.3,
            "loss": 1.0,
            "items": 9.0,
        },
        {
            "who": "chance",
            "direction": "a→b",
            "R@5": 0.02,
            "median_rank": 50.0,
            "mean_reciprocal_rank": 0.1,
            "loss": 2.0,
        },
        {"who": "model", "direction": "b→a", "R@5": 0.25},
        {"who": "chance", "direction": "b→a", "R@5": 0.1},
    ]
    (table,) = result_tables({"new": {"type": "retrieval", "data": "test", "rows": rows}})
    shown = [[(f.text, f.ratio) for f in row.figures] for row in table.rows]
    assert table.heads == ["R@5", "median rank", "mean reciprocal rank", "loss"]
    # a smaller rank is better; whether a smaller loss is, the page does not presume
    assert shown[0] == [("50.0 %", f"25{TIMES}"), ("5", f"10{TIMES}"), ("0.3", f"3.0{TIMES}"), ("1", "")]
    assert shown[1] == [("2.0 %", ""), ("50", ""), ("0.1", ""), ("2", "")]
    assert shown[2] == [("25.0 %", f"2.5{TIMES}"), ("", ""), ("", ""), ("", "")]
    assert [row.kind for row in table.rows] == ["model", "chance", "model", "chance"]
    assert table.note == "9 items"


def test_cards_take_the_models_figures():
    cards = headline_cards(make_evaluations())
    assert [(c.value, c.what, c.versus) for c in cards] == [
        ("42.0 %", "caption→image R@5", f"21{TIMES} chance (2.0 %)"),
        ("42.0 %", "image→caption R@5", f"21{TIMES} chance (2.0 %)"),
    ]


@pytest.mark.parametrize("chance", [0.0, float("nan"), None])
def test_no_ratio_to_nothing(chance):
    rows = [{"who": "model", "accuracy": 0.5}, {"who": "chance", "accuracy": chance}]
    (table,) = result_tables({"x": {"rows": rows}})
    assert table.rows[0].figures[0].ratio == ""


# charts


def test_charts_follow_the_theme_and_share_no_id():
    charts = training_charts(make_metrics(), make_evaluations())
    assert [c.title for c in charts] == ["Loss", "Learning rate", "R@5 on new", "grad norm", "samples per second"]
    every = "".join(c.svg for c in charts)
    assert "#0a0b" not in every
    ids = re.findall(r'\bid="([^"]*)"', every)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", every) + re.findall(r'href="#([^"]*)"', every)) <= set(ids)
    assert "var(--series-2)" in charts[2].svg
    assert "chance" in charts[2].svg
    assert "var(--series-2)" not in charts[0].svg  # the one objective's loss is the loss: one line
    assert charts[2].summary == (
        "caption→image from 0.2 at step 20 to 0.6 at step 60; "
        "image→caption from 0.1 at step 20 to 0.1 at step 60; chance 0.02."
    )


def test_two_objectives_are_three_lines():
    metrics = [{"step": s, "loss": 3.0 - s, "a/loss": 1.0, "b/loss": 2.0 - s} for s in range(5)]
    (chart,) = training_charts(metrics, {})
    assert [word in chart.summary for word in ("loss from 3 ", "a/loss from 1 ", "b/loss from 2 ")] == [True] * 3
    assert "var(--series-3)" in chart.svg


def test_what_is_not_finite_is_left_out_and_counted():
    metrics = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": math.nan},
        {"step": 3, "loss": None},
        {"step": 4, "loss": 1.0},
        {"step": 4, "other": math.inf},
    ]
    (chart,) = training_charts(metrics, {})
    assert chart.summary == "loss from 2 at step 1 to 1 at step 4; 2 values are not finite and are left out."


def test_the_moving_average_and_the_bins():
    values = np.random.default_rng(0).normal(size=1300)
    half = 1300 // 40
    slow = [np.mean(values[max(i - half, 0) : i + half + 1]) for i in range(1300)]
    np.testing.assert_allclose(_moving_average(values), slow, atol=1e-12)
    line = _line("loss", [{"step": i, "loss": v} for i, v in enumerate(values)])
    assert line is not None
    steps, binned = _binned(line)
    np.testing.assert_allclose(binned, [np.mean(values[i : i + 3]) for i in range(0, 1300, 3)], atol=1e-12)
    np.testing.assert_allclose(steps[:3], [1, 4, 7])


# examples


def slow_ranks(queries, items, query_groups, item_groups):
    """Expected rank of the first relevant item, by sorting: mid-rank among the equal for one relevant item."""
    ranks = []
    for query, group in zip(queries, query_groups, strict=True):
        scores = items @ query
        best = max(score for score, other in zip(scores, item_groups, strict=True) if other == group)
        ranks.append(1 + sum(score > best for score in scores))
    return ranks


@pytest.mark.parametrize("groups", [None, [i // 8 for i in range(40)]])
def test_examples_say_what_retrieval_measures(groups):
    pairs = make_pairs(40, noise=1.5, groups=groups)
    there, back = examples(pairs, Viewer(pairs))
    assert (there.query_field, there.item_field, back.query_field) == ("caption", "image", "image")
    left, right = pairs.encoded.embeddings["caption"], pairs.encoded.embeddings["image"]
    own = groups or list(range(40))
    ranks = slow_ranks(left, right, own, own)
    assert there.first == ranks.count(1)
    assert 0 < there.first < 40
    assert len(there.right) == len(there.wrong) == 4
    for example in there.right + there.wrong:
        query = int(example.query.text.split()[-1])
        scores = right @ left[query]
        order = np.argsort(-scores)
        assert [h.shown.text for h in example.hits] == [f"square number {i}" for i in order[:5]]
        assert [h.right for h in example.hits] == [own[i] == own[query] for i in order[:5]]
        assert [h.score for h in example.hits] == pytest.approx(list(scores[order[:5]]), abs=1e-5)
        assert example.rank == ranks[query]
        assert own[int(example.answer.text.split()[-1])] == own[query]
        assert example.score == pytest.approx(
            max(s for s, o in zip(scores, own, strict=True) if o == own[query]), abs=1e-5
        )
        assert example.right == example.hits[0].right == (example in there.right)
        shown = [own[int(e.query.text.split()[-1])] for e in (there.right if example.right else there.wrong)]
        assert len(set(shown)) == len(shown)


def test_a_collapsed_model_has_no_right_example():
    encoded = make_encoded(20)
    for x in encoded.embeddings.values():
        x[:] = 0.25
    for direction in examples(pairs := make_pairs(encoded=encoded), Viewer(pairs)):
        assert direction.first == 0
        assert not direction.right
        assert {e.rank for e in direction.wrong} == {10.5}


# heatmap and map


@pytest.mark.parametrize("fields", [("caption", "image"), ("image", "caption")])
def test_the_heatmap_has_text_down_and_pictures_across(fields):
    pairs = make_pairs(60, noise=1.2, fields=fields, groups=[i // 2 for i in range(60)])
    heat = similarity_heatmap(pairs, Viewer(pairs))
    assert (heat.row_field, heat.column_field) == ("caption", "image")
    chosen = [int(t.shown.text.split()[-1]) for t in heat.rows]
    assert len({i // 2 for i in chosen}) == len(chosen) == 24
    scores = pairs.encoded.embeddings["caption"][chosen] @ pairs.encoded.embeddings["image"][chosen].T
    assert (heat.low, heat.high) == pytest.approx((scores.min(), scores.max()), abs=1e-5)
    assert heat.hits == sum(scores[i].argmax() == i for i in range(24))
    assert [bool(c.mark) for c in heat.cells] == [j == scores[i].argmax() for i in range(24) for j in range(24)]
    assert float(heat.cells[24 * 3 + 5].title.rpartition(" ")[2]) == pytest.approx(scores[3, 5], abs=0.006)
    darkest, brightest = np.argmin(scores), np.argmax(scores)
    assert (heat.cells[darkest].color, heat.cells[brightest].color) == (heat.legend[0], heat.legend[-1])


def test_alike_pairs_are_neighbours_in_the_heatmap():
    encoded = make_encoded(24, noise=0.01)
    for x in encoded.embeddings.values():
        x[1::2] = x[::2] + 0.01  # 2k + 1 is nearly 2k
    pairs = make_pairs(encoded=encoded)
    order = [int(t.shown.text.split()[-1]) // 2 for t in similarity_heatmap(pairs, Viewer(pairs)).rows]
    assert sum(a == b for a, b in itertools.pairwise(order)) == 12


def length(link):
    return math.dist(link[:2], link[2:])


def test_true_pairs_lie_together_on_the_map():
    pairs = make_pairs(60, noise=0.1)
    space = space_map(pairs, Viewer(pairs))
    assert not isinstance(space, str)
    captions, images = space.points["caption"], space.points["image"]
    assert [a.shown.text for a in captions] == [b.shown.text for b in images]
    assert space.links == [(a.x, a.y, b.x, b.y) for a, b in zip(captions, images, strict=True)]
    strangers = [length((a.x, a.y, b.x, b.y)) for a, b in zip(captions, images[1:] + images[:1], strict=True)]
    assert np.mean([length(link) for link in space.links]) < 0.2 * np.mean(strangers)
    xs, ys = ([getattr(p, axis) for p in captions + images] for axis in "xy")
    assert (min(xs), max(xs), min(ys), max(ys)) == (MARGIN, WIDTH - MARGIN, MARGIN, HEIGHT - MARGIN)


def test_labels_cover_neither_pictures_nor_each_other():
    pairs = make_pairs(200, noise=1.0)
    space = space_map(pairs, Viewer(pairs))
    assert not isinstance(space, str)
    assert len(space.links) == 150  # of 200, always the same ones
    assert space == space_map(pairs, Viewer(pairs))
    labels = [(p.x + 7, p.x + 7 + 6 * len(p.label), p.y) for p in space.points["caption"] if p.label]
    assert 3 < len(labels) < 150
    for n, (left, right, y) in enumerate(labels):
        assert right <= WIDTH
        assert not any(left < r and x < right and abs(y - v) < 12 for x, r, v in labels[:n])
        for picture in space.points["image"]:
            assert not (left < picture.x + PICTURE / 2 and picture.x - PICTURE / 2 < right and abs(picture.y - y) < 12)
    assert not any(p.label for p in space.points["image"])


@pytest.mark.parametrize("kind", ["one direction", "two points", "all but one alike", "one dimension"])
def test_degenerate_spaces_have_a_map(kind):
    encoded = make_encoded(20, dim=1 if kind == "one dimension" else 16)
    for x in encoded.embeddings.values():
        if kind == "one direction":
            x[:, 1:] = 0
        elif kind == "two points":
            x[:], x[::2] = x[1], x[0]
        elif kind == "all but one alike":
            x[1:] = x[1]
    space = space_map(pairs := make_pairs(encoded=encoded), Viewer(pairs))
    assert not isinstance(space, str)
    places = np.array([(p.x, p.y) for points in space.points.values() for p in points])
    assert np.isfinite(places).all()
    assert (places >= MARGIN).all()
    assert (places <= [WIDTH - MARGIN, HEIGHT - MARGIN]).all()


# health


def test_health_tells_a_collapse_from_a_healthy_space():
    healthy = make_pairs(200, noise=0.2)
    encoded = make_encoded(200)
    encoded.embeddings["image"][:] = encoded.embeddings["image"][0]
    ill = make_pairs(encoded=encoded)
    rank = {
        name: {m.name: m.values for m in per_field(p)}["effective rank"]
        for name, p in (("healthy", healthy), ("ill", ill))
    }
    assert float(rank["healthy"]["image"].split()[0]) > 14
    assert rank["ill"]["image"] == "0.0 of 16"
    close = {m.name: m.values[""] for m in between(healthy)}
    left, right = healthy.encoded.embeddings["caption"], healthy.encoded.embeddings["image"]
    assert close["cosine of true pairs"].split()[0] == f"{np.mean(np.sum(left * right, axis=1)):.2f}"
    others = [left[i] @ right[j] for i in range(200) for j in range(200) if i != j]
    assert close["cosine of strangers"] == f"{np.mean(others):.2f} ± {np.std(others):.2f}"
    assert close["modality gap"] == f"{np.linalg.norm(left.mean(0) - right.mean(0)):.2f}"


def test_strangers_are_of_different_groups():
    pairs = make_pairs(40, noise=0.0, groups=[0] * 40)
    assert "cosine of strangers" not in {m.name for m in between(pairs)}


# thumbnails and text


def decode(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16", "I;16B"])
def test_pictures_of_every_mode_keep_their_contrast(mode):
    ramp = np.tile(np.linspace(0, 255, 120, dtype=np.uint8), (60, 1))
    if mode in ("I", "F", "I;16", "I;16B"):
        kind = {"I": np.int32, "F": np.float32, "I;16": "<u2", "I;16B": ">u2"}[mode]
        picture = Image.frombytes(mode, (120, 60), (ramp.astype(np.float64) * 200).astype(kind).tobytes())
    else:
        picture = Image.fromarray(ramp).convert(mode)
    before = picture.tobytes()
    small = decode(thumbnail(picture)).convert("L")
    assert small.size == (64, 32)
    values = np.asarray(small, dtype=float)
    assert values[:, :8].mean() < 40
    assert values[:, -8:].mean() > 215
    assert picture.size == (120, 60)
    assert picture.tobytes() == before


def test_transparency_is_kept():
    picture = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    picture.paste((200, 30, 30, 255), (10, 10, 30, 30))
    for given in (picture, picture.quantize(8, method=Image.Quantize.FASTOCTREE)):
        small = decode(thumbnail(given)).convert("RGBA")
        assert small.getpixel((2, 2))[3] == 0
        assert small.getpixel((20, 20))[3] == 255


@pytest.mark.parametrize("size", [(1, 1), (1000, 1), (1, 1000), (64, 64)])
def test_odd_sizes(size):
    assert max(decode(thumbnail(Image.new("RGB", size))).size) == min(max(size), 64)


def test_text_is_cleaned_and_cut():
    assert clean(" a\x00b \n\t c\ud800 ") == "a\ufffdb c\ufffd"
    assert clean("naïve 東京 👩‍🚀") == "naïve 東京 👩‍🚀"
    assert (shorten("abcdef", 6), shorten("abcdefg", 6), shorten("abcd efg", 6)) == ("abcdef", "abcde…", "abcd…")


# a run folder


def make_run(folder, evaluations=None, fields=("caption", "image")):
    encoder = SimpleNamespace(preview=lambda raw: f"shown: {raw}")
    model = SimpleNamespace(
        tower=lambda name: SimpleNamespace(encoder=encoder),
        temperatures={
            "default": SimpleNamespace(scale=torch.tensor([20.0]), bias=None),
            "sig": SimpleNamespace(scale=torch.tensor([10.0]), bias=torch.tensor([-9.0])),
        },
    )
    data = SimpleNamespace(fields={name: name for name in fields}, evaluation={"test": None, "hand": None})
    recipe = SimpleNamespace(about="about it", data=data, evaluations=evaluations or {})
    (folder / "config.yaml").write_text("data: {}\n")
    return SimpleNamespace(folder=folder, recipe=recipe, model=model, encoded=lambda name: make_encoded(5))


def evaluation(**fields):
    return SimpleNamespace(config=SimpleNamespace(**fields))


def test_a_run_folder_is_read(tmp_path):
    lines = [{"step": 1, "loss": 2.0, "note": "line\u2028separator"}, {"step": 2, "loss": None}]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines) + '{"step": 3, "lo'
    )
    bad = [
        ("a", "image", "truncated image"),
        ("b", "image", "truncated image"),
        ("a", "image", "truncated image"),
        ("c", "caption", "empty text"),
    ]
    (tmp_path / "quarantine.jsonl").write_text(
        "".join(json.dumps({"id": i, "field": f, "cause": c, "detail": ""}) + "\n" for i, f, c in bad)
    )
    (tmp_path / "evaluation.json").write_text(json.dumps(make_evaluations()))
    evaluations = {
        "new": evaluation(data="test", between=("caption", "image")),
        "again": evaluation(data="test", between=("image", "caption")),
        "classes": evaluation(data="hand", field="image"),
    }
    report = read_run(make_run(tmp_path, evaluations))
    assert report.metrics == lines
    assert report.quarantined == {"truncated image": 2, "empty text": 1}
    assert report.evaluations == make_evaluations()
    assert report.temperatures == {"default": {"scale": 20.0}, "sig": {"scale": 10.0, "bias": -9.0}}
    assert (report.title, report.about, report.config) == (tmp_path.name, "about it", "data: {}\n")
    assert [(s.name, s.fields) for s in report.sets] == [("test", ("caption", "image"))]
    assert report.sets[0].preview("caption", "x") == "shown: x"
    assert {"python", "torch", "numpy"} <= report.versions.keys()


def test_a_run_that_has_only_begun(tmp_path):
    report = read_run(make_run(tmp_path))
    assert (list(report.metrics), dict(report.evaluations), dict(report.quarantined or {})) == ([], {}, {})
    assert [s.name for s in report.sets] == ["test", "hand"]
    assert read_run(make_run(tmp_path, fields=("image",))).sets == []


def test_a_spoiled_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_run(make_run(tmp_path))
