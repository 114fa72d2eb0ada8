"""The page as a file: it parses, holds its pictures, escapes what it is given, and says what is missing."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from report_world import make_encoded, make_evaluations, make_metrics, make_pairs

from mmrep.report import PairSet, ReportData, write_report
from mmrep.report.page import SECTIONS, render

VOID = {"meta", "img", "link", "br", "hr", "input"}
EVIL = """</title></style></svg></script><script>alert(1)</script>"'><img src=x onerror=alert(2)>&{{ 7*7 }}--><b>"""


class Page(HTMLParser):
    """Elements, ids and pictures of a page; tags must balance."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.words = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is out of place"

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def ids(self):
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]

    @property
    def pictures(self):
        return [a.get("src") or a.get("href") for tag, a in self.elements if tag in ("img", "image")]


def read(report, tmp_path):
    path = write_report(report, tmp_path / "deep" / "report.html")
    return Page(path.read_bytes().decode("utf-8"))


def test_the_page_is_whole_and_refers_to_nothing_outside(report, tmp_path):
    page = read(report, tmp_path)
    assert len(page.ids) == len(set(page.ids)) > 20
    for tag, attrs in page.elements:
        assert tag not in ("script", "link", "iframe", "object")
        assert not [name for name in attrs if name.startswith("on")]
        for name, value in attrs.items():
            if name in ("href", "src", "xlink:href"):
                assert value.startswith(("#", "data:image/png;base64,")), value
                assert not value.startswith("#") or value[1:] in page.ids
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target[1:] in page.ids, target
            for target in (value or "").split() if name == "aria-labelledby" else ():
                assert target in page.ids
    assert "@import" not in render(report)
    csp = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in csp
    assert "script" not in csp


def test_every_picture_decodes_and_is_small(report, tmp_path):
    pictures = read(report, tmp_path).pictures
    # two sets: heatmap columns, map points, and examples in two directions
    assert len(pictures) > 24 + 12 + 30 + 12
    for uri in set(pictures):
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2], validate=True)))
        image.load()
        assert image.format == "PNG"
        assert 1 <= min(image.size) <= max(image.size) <= 64


def test_every_picture_has_a_text_and_every_table_has_heads(report, tmp_path):
    page = read(report, tmp_path)
    alts = [a["alt"] for t, a in page.elements if t == "img"]
    assert len(alts) > 20
    assert all(re.fullmatch(r"square number \d+", alt) for alt in alts)
    tables = [t for t, _ in page.elements if t == "table"]
    assert len(tables) == sum(t == "caption" for t, _ in page.elements) >= 5
    assert all(a.get("scope") in ("row", "col") for t, a in page.elements if t == "th")
    figures = sum(t == "figure" for t, _ in page.elements)
    assert figures == sum(t == "figcaption" for t, _ in page.elements) >= 8


def test_all_sections_are_there_in_order_and_reachable(report, tmp_path):
    page = read(report, tmp_path)
    assert [a["id"] for t, a in page.elements if t == "section"] == list(SECTIONS)
    links = [a["href"] for t, a in page.elements if t == "a"]
    assert links == [f"#{id}" for id in SECTIONS]
    for words in (
        "42.0 %",
        "21\N{MULTIPLICATION SIGN} chance (2.0 %)",
        "R@5 on new",
        "truncated image",
        "steps: 60",
        "true one at rank",
        "effective rank",
        "modality gap",
        "logit bias",
        "PCA to",
    ):
        assert words in page.text, words


def test_whatever_is_given_is_text(tmp_path):
    encoded = make_encoded(12, captions=[EVIL, f"plain {EVIL}"])
    encoded = dataclasses.replace(
        encoded,
        samples=[
            dataclasses.replace(s, id=EVIL + s.id, fields={EVIL: s.fields["caption"], "image": s.fields["image"]})
            for s in encoded.samples
        ],
        embeddings={EVIL: encoded.embeddings["caption"], "image": encoded.embeddings["image"]},
        present={EVIL: encoded.present["caption"], "image": encoded.present["image"]},
    )
    row = {"who": EVIL, "direction": EVIL, EVIL: 0.5}
    metrics = [
        {"step": s, "loss": 1.0 / s, EVIL + "/loss": 2.0, EVIL: float(s), f"eval/{EVIL}/d/R@5": 0.1} for s in (1, 2)
    ]
    report = ReportData(
        title=EVIL,
        about=EVIL,
        config=EVIL,
        versions={EVIL: EVIL},
        metrics=metrics,
        quarantined={EVIL: 2},
        evaluations={EVIL: {"type": EVIL, "data": EVIL, "rows": [row, {**row, "who": "model", "R@5": 0.5}]}},
        temperatures={EVIL: {"scale": 1.0}},
        sets=[make_pairs(fields=(EVIL, "image"), name=EVIL, encoded=encoded)],
    )
    page = read(report, tmp_path)
    tags = {tag for tag, _ in page.elements}
    assert "script" not in tags
    assert "b" in tags  # the verdicts' own
    assert not [attrs for _, attrs in page.elements if "onerror" in attrs]
    assert all(uri.startswith("data:") for uri in page.pictures)
    assert page.text.count("alert(1)") > 30
    assert "{{ 7*7 }}" in page.text
    assert "49" not in re.findall(r"&(\d+)--", page.text)
    assert any(attrs.get("alt", "").endswith(EVIL) for _, attrs in page.elements)


def test_characters_that_no_page_can_hold(tmp_path):
    captions = ["nul \x00 and bell \x07", "lone \ud83d surrogate", "two\nlines\tand tab", "\ufeff\uffff", ""]
    report = ReportData(title="odd \ud800 \x00", config="a:\n  b: \x1b\ud800", sets=[make_pairs(10, captions=captions)])
    text = write_report(report, tmp_path / "r.html").read_bytes().decode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    assert "two lines and tab" in Page(text).text
    assert "a:\n  b: \ufffd\ufffd" in Page(text).text


def test_the_same_data_gives_the_same_bytes(report, tmp_path):
    again = dataclasses.replace(
        report,
        metrics=make_metrics(),
        evaluations=make_evaluations(),
        sets=[make_pairs(), make_pairs(12, fields=("image", "caption"), name="other", seed=5)],
    )
    first = write_report(report, tmp_path / "a.html").read_bytes()
    assert first == write_report(again, tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]
    assert len(first) < 3e6


def test_an_older_page_is_replaced(report, tmp_path):
    path = tmp_path / "r.html"
    path.write_text("old " * 10**6)
    assert write_report(ReportData(title="new"), path) == path
    assert "old" not in Page(path.read_text(encoding="utf-8")).text


def test_nothing_at_all(tmp_path):
    page = read(ReportData(title="empty"), tmp_path)
    assert [a["id"] for t, a in page.elements if t == "section"] == list(SECTIONS)
    assert not page.pictures
    for reason in (
        "no evaluation results",
        "no metrics.jsonl",
        "No held-out set with two fields",
        "not recorded",
        "No config was given",
        "No versions were recorded",
    ):
        assert reason in page.text, reason


def test_text_only(tmp_path):
    page = read(ReportData(title="texts", sets=[make_pairs(fields=("caption", "note"))]), tmp_path)
    assert not page.pictures
    assert "a note on 3" in page.text
    assert page.text.count("true one at rank") >= 8


def test_pictures_only(tmp_path):
    encoded = make_encoded(10)
    for sample in encoded.samples:
        sample.fields["note"] = sample.fields["image"].rotate(90)
    page = read(ReportData(title="pictures", sets=[make_pairs(fields=("image", "note"), encoded=encoded)]), tmp_path)
    assert len(page.pictures) > 2 * 10 + 2 * 10
    assert all(re.fullmatch(r"(image|note) of s\d", a["alt"]) for t, a in page.elements if t == "img")


def broken(kind):
    encoded = make_encoded(6)
    if kind == "not finite":
        encoded.embeddings["image"][3, 2] = np.nan
    elif kind == "no sample has both":
        encoded.present["caption"][:3] = False
        encoded.present["image"][3:] = False
    elif kind == "collapsed to a point":
        for x in encoded.embeddings.values():
            x[:] = 0.25
    elif kind == "two samples or more":
        encoded = make_encoded(1)
    return make_pairs(encoded=encoded)


@pytest.mark.parametrize("kind", ["not finite", "no sample has both", "collapsed to a point", "two samples or more"])
def test_a_set_that_cannot_be_drawn_says_why(kind, tmp_path):
    page = read(ReportData(title="broken", sets=[broken(kind), make_pairs(8)]), tmp_path)
    assert kind in page.text
    assert page.pictures  # the other set is drawn all the same
    assert "nan" not in page.text.split()


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_tiny_sets(n, tmp_path):
    page = read(ReportData(title="tiny", sets=[make_pairs(n)]), tmp_path)
    assert f"{n} of {n} pairs" in page.text
    assert ("laid out by PCA;" in page.text) == (n < 4)


def test_missing_fields_are_left_out(tmp_path):
    encoded = make_encoded(12)
    encoded.present["image"][[0, 5]] = False
    encoded.embeddings["image"][[0, 5]] = 0
    for i in (0, 5):
        encoded.samples[i].fields["image"] = None
    page = read(ReportData(title="some missing", sets=[make_pairs(encoded=encoded)]), tmp_path)
    assert "of 10 queries have a right item first, among 10 items" in page.text
    assert "10 of 10 pairs" in page.text


def test_a_preview_that_fails_says_so_in_its_place(tmp_path):
    def preview(field, raw):
        if field == "image":
            raise FileNotFoundError(2, "No such file", "gone.png")
        return raw

    pairs = PairSet(name="moved", encoded=make_encoded(6), fields=("caption", "image"), preview=preview)
    page = read(ReportData(title="moved", sets=[pairs]), tmp_path)
    assert not page.pictures
    assert "gone.png" in page.text


def test_fields_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"two different ones of caption, image, note; got caption, picture"):
        make_pairs(fields=("caption", "picture"))
    with pytest.raises(ValueError, match="two different ones"):
        make_pairs(fields=("caption", "caption"))
