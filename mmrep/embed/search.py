"""Index a folder of files or a run's data, and search it with a text or a file.

In Python::

    searcher = mmrep.open_search("photos")
    hits = searcher.search("a red car", "text", k=5)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrep.config import ConfigError
from mmrep.data.sample import Quarantined, Sample
from mmrep.data.source import Source
from mmrep.embed.index import Hit, Index
from mmrep.evaluate.encoded import encode_source
from mmrep.hub.folder import fingerprint
from mmrep.hub.load import load
from mmrep.model import Model

INDEX = "index"


@dataclass
class Searcher:
    """An opened index with the model that made it."""

    index: Index
    model: Model

    def search(self, query: Any, modality: str, k: int = 5) -> list[Hit]:
        """The ``k`` nearest records to one raw value (a text, a path, a picture), best first."""
        return self.index.search(np.atleast_2d(np.asarray(self.model.encode(query, modality))), k)[0]


class Files(Source):
    """Every file below a folder as one field; its path below the folder is its id."""

    columns = ("file",)

    def __init__(self, folder: Path) -> None:
        super().__init__(None)
        self.folder = folder
        hidden = (INDEX, "__pycache__")
        self.paths = sorted(
            p
            for p in folder.rglob("*")
            if p.is_file() and not any(x.startswith(".") or x in hidden for x in p.relative_to(folder).parts)
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        return Sample(id=path.relative_to(self.folder).as_posix(), fields={"file": path})


def index_folder(folder: Path, out: Path, *, model: str, modality: str) -> str:
    """Embed every file of ``folder`` that the modality can read; others are counted and reported.

    Returns:
        What was done, in words.
    """
    if not folder.is_dir():
        raise ConfigError([f"there is no folder {str(folder)!r}"])
    loaded = load(model)
    encoded = encode_source(loaded, Files(folder), {"file": modality})
    if not encoded.samples:
        raise ConfigError([f"{folder} holds no file that can be read as {modality}. {_bad(encoded.quarantined)}"])
    records = [{"id": s.id, "path": str(s.fields["file"].resolve())} for s in encoded.samples]
    _build(encoded.embeddings["file"], records, loaded, model, out)
    return f"{len(records)} files of {folder} → {out}. {_bad(encoded.quarantined)}".rstrip()


def index_run(
    run_folder: Path, out: Path, *, modality: str, source: str | None = None, model: str | None = None
) -> str:
    """Embed one field of a run's held-out data.

    Returns:
        What was done, in words.
    """
    from mmrep.run import open_run

    run = open_run(run_folder)
    names = [source] if source else list(run.recipe.data.evaluation)
    own = str(run_folder / "model")
    loaded = load(model or own)
    fields = {f: t for f, t in run.recipe.data.fields.items() if modality in (t, loaded.tower(t).modality)}
    if not fields:
        raise ConfigError([f"the run has no field of modality {modality!r}; its fields: {run.recipe.data.fields}"])
    name = next(iter(fields))
    vectors: list[np.ndarray] = []
    records: list[dict[str, Any]] = []
    taken: set[str] = set()
    for held_out in names:
        encoded = encode_source(loaded, run.source(held_out), run.recipe.data.fields)
        for i, sample in enumerate(encoded.samples):
            if encoded.present[name][i] and sample.id not in taken:
                taken.add(sample.id)
                vectors.append(encoded.embeddings[name][i])
                records.append({"id": sample.id, "source": held_out, "text": _text(sample, name)})
    _build(np.stack(vectors), records, loaded, str(Path(model or own).resolve()), out)
    return f"{len(records)} x {name} from {', '.join(names)} → {out}"


def open_search(where: Path | str) -> Searcher:
    """Open an index folder (or a folder that holds one as ``index``) with the model that made it.

    Raises:
        ConfigError: there is no index, it is damaged, or its model has gone or changed since.
    """
    where = Path(where)
    folder = next((f for f in (where, where / INDEX) if (f / "meta.json").is_file()), None)
    if folder is None:
        raise ConfigError([f"{str(where)!r} holds no index; make one: mmrep index {where} --model …"])
    try:
        index = Index.open(folder)
        model = load(index.meta["model"])
        index.check_model(fingerprint(model))
    except ValueError as error:  # damaged files, or another model than the one that made it
        raise ConfigError([f"{folder}: {error}"]) from error
    return Searcher(index, model)


def _build(vectors: np.ndarray, records: list[dict[str, Any]], model: Model, name: str, out: Path) -> None:
    path = Path(name)
    meta = {"model": str(path.resolve()) if path.is_dir() else name, "fingerprint": fingerprint(model)}
    Index.build(vectors, records, meta=meta).save(out)


def _bad(quarantined: list[Quarantined]) -> str:
    causes: dict[str, int] = {}
    for q in quarantined:
        causes[q.cause] = causes.get(q.cause, 0) + 1
    return f"Left out: {', '.join(f'{n} x {cause}' for cause, n in causes.items())}." if causes else ""


def _text(sample: Sample, but: str) -> str:
    """A line of words for a hit: the sample's first textual field."""
    for name, value in sample.fields.items():
        first = value[0] if isinstance(value, list) and value else value
        if name != but and isinstance(first, str):
            return first
    return ""
