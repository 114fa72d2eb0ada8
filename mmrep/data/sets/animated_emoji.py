"""Microsoft's animated Fluent emoji, with their names in many languages and the concepts of the emoji world.

The drawings are two npm packages (MIT by their own statement, 340 MB, 1,766 WebP files of 256 x 256 pixels, of which
about a thousand move; most of those that move do so for three seconds, 24 frames a second)::

    npm install --ignore-scripts --no-audit --no-fund @lobehub/fluent-emoji-anim-1 @lobehub/fluent-emoji-anim-2

run in any folder, which ``root`` then names. Names, families and their split are those of the source ``emoji``: with
the same seed and numbers, what is held out there is held out here, so that a model of both never sees a test concept.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from mmrep.config import ConfigError, config
from mmrep.data.emoji import Concept, category, load_concepts, split_families
from mmrep.data.sets._options import wrong_names
from mmrep.data.sets._packages import find, npm_version, python_version, sizes
from mmrep.data.sets._rows import RowSource
from mmrep.data.source import SourceConfig
from mmrep.encoder import BadSampleError

COMMAND = "npm install --ignore-scripts --no-audit --no-fund @lobehub/fluent-emoji-anim-1 @lobehub/fluent-emoji-anim-2"
_PACKAGES = "node_modules/@lobehub/fluent-emoji-anim-*"


@config
class AnimatedEmojiConfig(SourceConfig):
    """root: the folder that ``npm install`` ran in.

    split: part of the concept families; seed, validation, test: as of the source ``emoji``, and to the same effect.
    languages: codes; ``caption`` lists the names in all of them. skin_tones: also the skin-tone variants. still: also
    drawings of one frame. categories: only emoji of these groups of the Unicode charts; empty = of all. frames: hand
    out so many frames, evenly spread, as an array rather than the file; 0 = the file. A frame of a WebP can only be
    reached through all before it, which takes 60 ms a file and reading; the array is decoded once and kept in memory.
    size: height and width of those frames, pixels.
    """

    root: str = "."
    split: Literal["train", "validation", "test", "all"] = "train"
    languages: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["en"])
    seed: int = 0
    validation: Annotated[int, Field(ge=0)] = 150
    test: Annotated[int, Field(ge=0)] = 300
    skin_tones: bool = False
    still: bool = False
    categories: tuple[str, ...] = ()
    frames: Annotated[int, Field(ge=0)] = 0
    size: Annotated[int, Field(ge=8, le=256)] = 64
    label: str | None = "family"
    group: str | None = "concept"


class AnimatedEmoji(RowSource):
    """One row per moving drawing whose concept has a name; the id is that of the concept.

    Columns: ``video`` (path of an animated WebP, or ``{"array": uint8 [frames, size, size, 4], "fps": …}``), ``frame``
    (the same path, of which a picture is the first frame, or the middle one of the array), ``caption`` (list of names),
    ``name`` (the English one), ``family``, ``concept``, ``category`` and ``subcategory`` (group and sub-group of the
    Unicode emoji charts), ``frames`` (how many the file has) and ``seconds`` (how long they last).
    """

    Config = AnimatedEmojiConfig
    columns = (
        "video", "frame", "caption", "name", "family", "concept", "category", "subcategory", "frames", "seconds",
    )  # fmt: skip
    config: AnimatedEmojiConfig

    def __init__(self, config: AnimatedEmojiConfig) -> None:
        self.media_columns = ("video", "frame") if config.frames else ()
        super().__init__(config)
        root = find(config.root, "", f"{_PACKAGES}/assets/*.webp", f"cd {config.root} && {COMMAND}")
        self._packages = sorted(root.glob(_PACKAGES))
        self._root = root
        self._decoded: dict[int, dict[str, Any]] = {}
        files = {_key(file.stem): file for package in self._packages for file in sorted(package.glob("assets/*.webp"))}
        concepts = load_concepts(skin_tones=config.skin_tones)
        known = {code for concept in concepts for code in concept.names}
        if problems := wrong_names("languages", config.languages, known, "name in"):
            raise ConfigError(problems)
        groups = {concept.id: (category(concept) or (None,))[0] for concept in concepts}
        if problems := wrong_names("categories", config.categories, {g for g in groups.values() if g}, "group"):
            raise ConfigError(problems)
        if config.split != "all":
            parts = split_families(concepts, config.seed, validation=config.validation, test=config.test)
            concepts = parts[config.split]
        rows: list[tuple[str, Mapping[str, Any]]] = []
        for concept in concepts:
            file = files.get(_key(concept.id))
            if file is None or (config.categories and groups[concept.id] not in config.categories):
                continue
            frames, seconds = _animation(file, file.stat().st_mtime_ns)
            if frames > 1 or config.still:
                rows.append((concept.id, _row(concept, file, frames, seconds, config.languages)))
        self.set_rows(rows, f"split: no moving drawing falls in {config.split!r}; raise `{config.split}`")

    def media(self, index: int) -> Mapping[str, Any]:
        """The frames, where they are asked for as an array."""
        if not self.config.frames:
            return {}
        if index not in self._decoded:
            row = self._rows[index]
            array = _decode(row["video"], self.config.frames, self.config.size)
            self._decoded[index] = {"array": array, "fps": self.config.frames / (row["seconds"] or 1.0)}
        decoded = self._decoded[index]
        return {"video": decoded, "frame": decoded["array"][self.config.frames // 2]}

    def fingerprint(self) -> str:
        """The config, the versions of the packages, and names and sizes of the files."""
        files = (file for package in self._packages for file in package.glob("assets/*.webp"))
        versions = [npm_version(package) for package in self._packages]
        return f"animated-emoji:{self.config}:{versions}:emoji {python_version('emoji')}:{sizes(files, self._root)}"


def _row(concept: Concept, file: Path, frames: int, seconds: float, languages: list[str]) -> dict[str, Any]:
    group, subgroup = category(concept) or (None, None)
    return {
        "video": file,
        "frame": file,
        "caption": [name for code in languages for name in concept.names.get(code, ())] or None,
        "name": concept.name,
        "family": concept.family,
        "concept": concept.id,
        "category": group,
        "subcategory": subgroup,
        "frames": frames,
        "seconds": seconds,
    }


def _key(sequence: str) -> str:
    """Code points in hexadecimal without the variation selector and leading zeros, which artists write or leave out."""
    return "-".join(f"{code:x}" for part in sequence.split("-") if (code := _hexadecimal(part)) != 0xFE0F)


def _hexadecimal(part: str) -> int:
    try:
        return int(part, 16)
    except ValueError:  # a file that is named after no emoji
        return -1


@functools.lru_cache(maxsize=10_000)  # the parts of a split are sources of their own and ask again
def _animation(file: Path, changed: int) -> tuple[int, float]:
    """Frames of a WebP and the seconds that they last, from its chunks (RFC 9649, section 2.7); no pixel is decoded.

    A still picture has one frame and lasts no time; neither has what is no WebP, which fails when it is read.
    """
    frames, milliseconds = 0, 0
    with file.open("rb") as data:
        if data.read(4) != b"RIFF" or data.read(8)[4:] != b"WEBP":
            return 1, 0.0
        while len(head := data.read(8)) == 8:
            (size,) = struct.unpack("<I", head[4:])
            start = data.tell()
            if head[:4] == b"ANMF":
                # A frame begins with x, y, width, height and duration, three bytes each.
                frames, milliseconds = frames + 1, milliseconds + int.from_bytes(data.read(15)[12:], "little")
            data.seek(start + size + size % 2)
    return max(frames, 1), milliseconds / 1000


def _decode(file: Path, count: int, size: int) -> np.ndarray:
    """uint8 [count, size, size, 4]: the frames in the middles of ``count`` equal parts; of fewer, some come twice."""
    try:
        with Image.open(file) as video:
            total = getattr(video, "n_frames", 1)
            wanted = ((np.arange(count) + 0.5) * total / count).astype(int)
            found: dict[int, np.ndarray] = {}
            for number in sorted(set(wanted.tolist())):
                video.seek(number)
                found[number] = np.asarray(video.convert("RGBA").resize((size, size), Image.Resampling.BOX))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadSampleError("unreadable video", f"{file}: {error}") from error
    return np.stack([found[number] for number in wanted.tolist()])
