"""Stamps: names, pictures, clips, and what is missing of them."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from PIL import Image
from set_fakes import SVG, files, png

from mmrep.config import ConfigError, component
from mmrep.data.sets.tuxpaint import Tuxpaint, TuxpaintConfig


@pytest.fixture
def stamps(tmp_path):
    return files(tmp_path / "share/stamps", {
        "animals/birds/duck.txt": "A duck.\nfr.utf8=Un canard.\r\nde.utf8= Eine Ente. \nro.utf8=\nnot a name\n",
        "animals/birds/duck.png": png(),
        "animals/birds/duck_mirror.png": png(),
        "animals/birds/duck.ogg": "quack",
        "animals/birds/duck_desc.ogg": "a duck",
        "animals/birds/duck_desc_fr.ogg": "un canard",
        "animals/birds/duck_desc_pt_BR.wav": "um pato (wav)",
        "animals/birds/duck_desc_pt_BR.ogg": "um pato",
        "animals/birds/orphan_desc_fr.ogg": "no stamp",
        "animals/goose.txt": "Goose\nfr.utf8=Une oie.\n",
        "animals/goose.svg": SVG,
        "animals/goose_desc_fr.ogg": "une oie",
        "plants/rose.txt": "The rose!\n",
        "plants/rose_desc_de.ogg": "die Rose",
        "plants/rose[1].txt": "a ROSE",
        "plants/rose[1].svg": "<svg",
        "plants/nameless.txt": "\nfr.utf8=Sans nom\n",
        "plants/nameless.png": png(),
        "symbols/a.txt": "The letter a.\n",
        "symbols/a.png": png(),
    })  # fmt: skip


def build(stamps, **fields):
    given = {"split": "all", "exclude": [], "speech_languages": ["fr", "de"], **fields}
    return component("sources", "tuxpaint", root=str(stamps), **given).build()


def test_a_row_is_a_stamp_in_a_language(stamps):
    source = build(stamps, languages=["en", "de"], speech_languages=["fr", "en", "pt_BR"])
    rows = {source.record_id(i): source[i].fields for i in range(len(source)) if "[" not in source.record_id(i)}
    birds = stamps / "animals/birds"
    assert rows["animals/birds/duck/fr"] == {
        "image": birds / "duck.png",
        "caption": ["A duck.", "Eine Ente."],
        "speech": birds / "duck_desc_fr.ogg",
        "transcript": "Un canard.",
        "sound": birds / "duck.ogg",
        "language": "fr",
        "category": "animals",
        "folder": "animals/birds",
        "item": "animals/birds/duck",
        "concept": "duck",
    }
    assert rows["animals/birds/duck/en"]["speech"] == birds / "duck_desc.ogg"
    assert rows["animals/birds/duck/pt_BR"]["speech"] == birds / "duck_desc_pt_BR.ogg"  # not the .wav of the same
    assert "transcript" not in rows["animals/birds/duck/pt_BR"]
    assert not any(key.startswith(("animals/birds/orphan", "animals/birds/duck_")) for key in rows)
    assert len(rows) == 5 * 3
    assert len(source) == 6 * 3
    assert build(stamps)[0].label == "animals"


def test_holes_come_naturally(stamps):
    source = build(stamps)
    holes = {i: set(source.columns) - set(source[k].fields) for k, i in enumerate(source._ids) if "[" not in i}
    assert holes["animals/goose/de"] == {"speech", "transcript", "sound"}
    assert holes["plants/rose/de"] == {"image", "transcript", "sound"}
    assert holes["plants/nameless/fr"] == {"caption", "speech", "sound"}
    assert source.column("speech").count(None) == len(source) - 3
    assert source.column("caption")[:2] == [["Goose"], ["Goose"]]


def test_a_drawing_is_rendered(stamps):
    pytest.importorskip("resvg_py")
    source = build(stamps, size=64)
    picture = Image.open(io.BytesIO(source[source._ids.index("animals/goose/fr")].fields["image"]))
    assert picture.size == (64, 32)  # its size is given in points
    bad = source.record(source._ids.index("plants/rose[1]/fr"))
    assert (bad.cause, bad.id) == ("unreadable image", "plants/rose[1]/fr")


def test_namesakes_are_one_concept_and_in_one_part(stamps):
    source = build(stamps)
    concepts = dict(zip(source.column("item"), source.column("concept"), strict=True))
    assert concepts["plants/rose"] == concepts["plants/rose[1]"] == "rose"
    assert concepts["plants/nameless"] == "plants/nameless"
    assert source.groups() == source.column("concept")
    parts = {}
    for split in ("train", "validation", "test"):
        for seed in (0, 1, 2):
            try:
                held = build(stamps, split=split, seed=seed, validation=0.3, test=0.3)
            except ConfigError as error:
                assert f"no stamp falls in '{split}'" in str(error)  # noqa: PT017
                continue
            parts.setdefault(seed, []).append(set(zip(held.column("concept"), held.column("item"), strict=True)))
    for sets in parts.values():
        assert sum(map(len, sets)) == 6  # every item once, whatever its languages
        concepts = [{concept for concept, _ in held} for held in sets]
        assert sum(map(len, concepts)) == len(set().union(*concepts)) == 5


def test_one_clip_a_stamp(stamps):
    source = build(stamps, clips="one")
    chosen = dict(zip(source.column("item"), source.column("language"), strict=True))
    assert len(source) == 6
    assert chosen["animals/birds/duck"] == "fr"
    assert chosen["plants/rose"] == "de"  # the language that it is spoken in
    choices = [build(stamps, clips="one", seed=seed) for seed in range(12)]
    found = {
        item: {dict(zip(c.column("item"), c.column("language"), strict=True))[item] for c in choices} for item in chosen
    }
    assert found["animals/goose"] == {"fr"}
    assert found["plants/rose"] == {"de"}
    assert found["symbols/a"] == {"fr", "de"}  # it is spoken in neither
    order = build(stamps, clips="one", exclude=["animals"])
    assert {i: chosen[i] for i in order.column("item")} == dict(
        zip(order.column("item"), order.column("language"), strict=True)
    )


def test_folders_are_left_out_whole(stamps):
    assert set(build(stamps, exclude=["animals/birds", "symbols"]).column("item")) == {
        "animals/goose", "plants/rose", "plants/rose[1]", "plants/nameless",
    }  # fmt: skip


def test_a_folder_is_not_left_out_for_how_its_name_begins(stamps):
    files(stamps, {"animals2/cow.txt": "A cow."})
    items = build(stamps, exclude=["animals"]).column("item")
    assert "animals2/cow" in items
    assert not any(item.startswith("animals/") for item in items)


def test_wrong_options_are_explained(stamps, tmp_path):
    with pytest.raises(ConfigError) as error:
        build(stamps, languages=["dee"], speech_languages=["fr", "fr"], exclude=["animal"])
    text = str(error.value)
    assert "languages: no name in 'dee'; did you mean 'de'? There are: de, en, fr" in text
    assert "speech_languages: 'fr' is named twice" in text
    assert "exclude: no folder 'animal'; did you mean 'animals' or 'animals/birds'?" in text
    with pytest.raises(ConfigError, match="`apt-get install tuxpaint-stamps-default`"):
        build(tmp_path / "nothing")


def test_the_fingerprint_follows_the_files(stamps):
    before = build(stamps).fingerprint()
    assert build(stamps).fingerprint() == before
    assert build(stamps, size=64).fingerprint() != before
    files(stamps, {"plants/rose.png": png()})
    assert build(stamps).fingerprint() != before


@pytest.mark.slow
def test_the_real_stamps():
    try:
        everything = Tuxpaint(TuxpaintConfig(split="all", exclude=[], speech_languages=["fr", "en"]))
    except ConfigError:
        pytest.skip("tuxpaint-stamps-default is not installed")
    assert len(set(everything.column("item"))) == 952
    assert sum(picture is not None for picture in everything._pictures) == 2 * 950
    clips = Counter(
        language
        for language, clip in zip(everything.column("language"), everything.column("speech"), strict=True)
        if clip is not None
    )
    assert clips == {"fr": 927, "en": 65}
    assert len({row["concept"] for row in everything._rows}) < 805
    default = Tuxpaint(TuxpaintConfig(split="all"))
    assert len(set(default.column("item"))) == 703
    assert sum(clip is not None for clip in default.column("speech")) == 3390
    assert all(hasattr(default.record(i), "fields") for i in range(0, len(default), 5))  # all drawings can be read
    assert "2022.06.04" in default.fingerprint()
    parts = [set(Tuxpaint(TuxpaintConfig(split=p)).column("concept")) for p in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(set(default.column("concept")))
    assert [len(part) for part in parts] == [447, 59, 121]
