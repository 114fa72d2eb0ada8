"""Tux Paint's stamps: pictures, their names in 70 languages, spoken names in ten, and sound effects.

The data is the Debian package ``tuxpaint-stamps-default`` (GPL-2, version 2022.06.04: 952 stamps, 950 of them with a
picture), read from where it lies. A stamp ``bird`` is made of ``bird.txt`` (English in the first line, then
``fr.utf8=Un oiseau.``), ``bird.png`` or ``bird.svg``, ``bird_desc_fr.ogg`` (its name spoken in French; without a code:
English) and ``bird.ogg`` (what a bird sounds like). Hardly any stamp has all of it: holes are part of the data.

Volunteers recorded the clips. Loudness differs between languages by a factor of 25, and who speaks is not documented:
nothing may be said about unseen speakers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mmrep.config import ConfigError, config
from mmrep.data.sample import stable_hash
from mmrep.data.sets._options import wrong_names
from mmrep.data.sets._packages import debian_version, find, python_version, sizes
from mmrep.data.sets._rows import RowSource
from mmrep.data.sets._split import SplitConfig, part_of
from mmrep.encoder import BadSampleError
from mmrep.registry import require

PACKAGE = "tuxpaint-stamps-default"
ROOT = "/usr/share/tuxpaint/stamps"

_CLIP = re.compile(r"(?P<stamp>.+)_desc(?:_(?P<language>[A-Za-z]{2,3}(?:_[A-Z]{2})?(?:@\w+)?))?\.(?:ogg|wav)")
_NO_WORD = re.compile(r"\W+")
_ARTICLE = re.compile(r"^(?:an?|the|some) (?=.)")
_NAME = re.compile(r"(?P<language>[\w@]+)\.utf8=(?P<name>.*)")


@config
class TuxpaintConfig(SplitConfig):
    """root: the folder of the stamps; None = where Debian installs it, or ``./usr/share/tuxpaint/stamps``.

    languages: of ``caption``, which lists the names in all of them. speech_languages: of the spoken names; the default
    are the five with most clips. clips: ``each`` = one row per stamp and speech language, ``one`` = one row per stamp,
    spoken in one of the languages, which a hash of the stamp chooses. exclude: categories or folders to leave out
    (letters, digits and the coins of all countries look and sound nearly alike). size: width of a rendered SVG, pixels.
    """

    root: str | None = None
    languages: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["en"])
    speech_languages: Annotated[list[str], Field(min_length=1)] = field(
        default_factory=lambda: ["fr", "ca", "ru", "bg", "ro"]
    )
    clips: Literal["each", "one"] = "each"
    exclude: list[str] = field(default_factory=lambda: ["symbols"])
    size: Annotated[int, Field(ge=8)] = 128
    label: str | None = "category"
    group: str | None = "concept"


class Tuxpaint(RowSource):
    """One row per stamp and language: picture, names, the name spoken in that language, sound effect.

    Columns: ``image`` (path of a PNG, or bytes of one that is rendered from SVG), ``caption`` (list of names),
    ``speech`` (path), ``transcript`` (the name in the language of the speech), ``sound`` (path), ``language`` (of
    speech and transcript), ``category`` (the top folder), ``folder``, ``item`` (path of the stamp below the root) and
    ``concept`` (its English name). Stamps of one name (there are six called "A flower.") are positives of each other.

    The split goes by concept: a stamp is in one part in all languages, together with its namesakes.
    """

    Config = TuxpaintConfig
    columns = (
        "image", "caption", "speech", "transcript", "sound", "language", "category", "folder", "item", "concept",
    )  # fmt: skip
    media_columns = ("image",)
    config: TuxpaintConfig

    def __init__(self, config: TuxpaintConfig) -> None:
        super().__init__(config)
        self._root = find(config.root, ROOT, "**/*.txt", f"apt-get install {PACKAGE}")
        stamps = list(_stamps(self._root))
        _check(config, stamps)
        self._rendered: dict[Path, bytes] = {}
        self._pictures: list[Path | None] = []
        rows: list[tuple[str, Mapping[str, Any]]] = []
        for stamp in stamps:
            if _excluded(stamp["folder"], config.exclude):
                continue
            if config.split not in ("all", part_of(stamp["concept"], config)):
                continue
            for language in _languages(stamp, config):
                rows.append((f"{stamp['item']}/{language}", _row(stamp, language, config.languages)))
                self._pictures.append(stamp["picture"])
        self.set_rows(rows, f"split: no stamp falls in {config.split!r}; hold out more, or exclude less")

    def media(self, index: int) -> Mapping[str, Any]:
        """The picture: a path, or the bytes of a PNG."""
        path = self._pictures[index]
        if path is None or path.suffix != ".svg":
            return {"image": path}
        if path not in self._rendered:  # a vector drawing takes 20 ms
            self._rendered[path] = _render(path, self.config.size)
        return {"image": self._rendered[path]}

    def fingerprint(self) -> str:
        """The config, the version of the package, and names and sizes of the files."""
        files = (path for path in self._root.rglob("*") if path.is_file())
        version = debian_version(PACKAGE, self._root)
        return f"tuxpaint:{self.config}:{version}:{sizes(files, self._root)}:resvg {python_version('resvg-py')}"


def _stamps(root: Path) -> Iterator[dict[str, Any]]:
    """The stamps below a folder, sorted by path; whatever has a text file is one."""
    for folder, _, files in sorted(os.walk(root)):
        here = Path(folder)
        parent = here.relative_to(root).as_posix() if here != root else None
        clips = _clips(here, files)
        for stem in sorted(name.removesuffix(".txt") for name in files if name.endswith(".txt")):
            names = _names(here / f"{stem}.txt")
            item = stem if parent is None else f"{parent}/{stem}"
            yield {
                "item": item,
                "folder": parent,
                "category": None if parent is None else parent.split("/")[0],
                "names": names,
                # A stamp without an English name is a concept of its own.
                "concept": _ARTICLE.sub("", _NO_WORD.sub(" ", names.get("en", "").casefold()).strip()) or item,
                "picture": next((here / f"{stem}{end}" for end in (".png", ".svg") if f"{stem}{end}" in files), None),
                "sound": next((here / f"{stem}{end}" for end in (".ogg", ".wav") if f"{stem}{end}" in files), None),
                "speech": clips.get(stem, {}),
            }


def _names(text: Path) -> dict[str, str]:
    """Language → name, in the order of the file; English is the first line."""
    first, *rest = text.read_text(encoding="utf-8-sig", errors="replace").splitlines() or [""]
    names = {"en": first.strip()}
    for line in rest:
        if match := _NAME.fullmatch(line.strip()):
            names[match["language"]] = match["name"].strip()
    return {language: name for language, name in names.items() if name}


def _clips(folder: Path, files: Iterable[str]) -> dict[str, dict[str, Path]]:
    """Stamp → language → clip; an .ogg is preferred to a .wav of the same."""
    found: dict[str, dict[str, Path]] = {}
    for name in sorted(files, reverse=True):
        if match := _CLIP.fullmatch(name):
            found.setdefault(match["stamp"], {})[match["language"] or "en"] = folder / name
    return found


def _languages(stamp: Mapping[str, Any], config: TuxpaintConfig) -> list[str]:
    """The languages that a stamp has rows in."""
    if config.clips == "each":
        return config.speech_languages
    spoken = [language for language in config.speech_languages if language in stamp["speech"]]
    choices = spoken or config.speech_languages
    return [choices[stable_hash("language", config.seed, stamp["item"]) % len(choices)]]


def _row(stamp: Mapping[str, Any], language: str, languages: list[str]) -> dict[str, Any]:
    names = stamp["names"]
    return {
        "caption": [names[code] for code in languages if code in names] or None,
        "speech": stamp["speech"].get(language),
        "transcript": names.get(language),
        "language": language,
        **{name: stamp[name] for name in ("sound", "category", "folder", "item", "concept")},
    }


def _render(path: Path, size: int) -> bytes:
    resvg = require("resvg_py", "quickstart")
    try:
        # At 0 dpi, its default, drawings measured in points have no size. Fonts would differ between machines.
        return resvg.svg_to_bytes(svg_path=str(path), width=size, dpi=96.0, skip_system_fonts=True)
    except (ValueError, OSError) as error:
        raise BadSampleError("unreadable image", f"{path}: {error}") from error


def _excluded(folder: str | None, exclude: list[str]) -> bool:
    return folder is not None and any(folder == name or folder.startswith(f"{name}/") for name in exclude)


def _check(config: TuxpaintConfig, stamps: list[dict[str, Any]]) -> None:
    """Refuse languages and folders that the stamps do not have."""
    known = {
        "languages": {code for stamp in stamps for code in stamp["names"]},
        "speech_languages": {code for stamp in stamps for code in stamp["speech"]},
        "exclude": {
            "/".join(parts[: depth + 1])
            for stamp in stamps if stamp["folder"]
            for parts in [stamp["folder"].split("/")]
            for depth in range(len(parts))
        },
    }  # fmt: skip
    nouns = {"languages": "name in", "speech_languages": "speech in", "exclude": "folder"}
    problems = [line for key in known for line in wrong_names(key, getattr(config, key), known[key], nouns[key])]
    if problems:
        raise ConfigError(problems)
