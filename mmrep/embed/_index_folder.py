"""How an index lies on disk.

    meta.json               format, metric, dim, count, the data files and their sizes, the caller's own meta
    index-<token>.faiss     written by FAISS
    records-<token>.jsonl   one record a line, in row order

`meta.json` is replaced last and in one step, so a kill at any moment leaves the old index or the new one, whole.
There is no pickle.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

FORMAT, VERSION = "mmrep-index", 1


def write_folder(
    target: Path, meta: Mapping[str, Any], write_index: Callable[[Path], None], lines: Iterable[str]
) -> Path:
    """Write data files under fresh names, then point `meta.json` at them, then remove those it no longer names."""
    if target.exists() and (not target.is_dir() or not _is_ours(target)):
        raise FileExistsError(f"{target} exists and is not an index folder: nothing was written; choose another place")
    target.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:12]
    numbers, records = target / f"index-{token}.faiss", target / f"records-{token}.jsonl"
    write_index(numbers)
    with records.open("w", encoding="ascii", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
    files = {"index": numbers, "records": records}
    whole = {
        "format": FORMAT,
        "version": VERSION,
        **meta,
        "files": {kind: {"name": path.name, "bytes": path.stat().st_size} for kind, path in files.items()},
    }
    draft = target / f"meta-{token}.json.tmp"
    draft.write_text(json.dumps(whole, indent=2) + "\n", encoding="ascii")
    for path in (numbers, records, draft, target):
        _sync(path)
    os.replace(draft, target / "meta.json")
    _sync(target)
    for path in target.iterdir():  # what earlier saves, whole or killed, left behind
        if _is_data(path) and path not in (numbers, records):
            path.unlink(missing_ok=True)
    return target


def read_meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no index folder {folder}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is not an index folder: it has no meta.json") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'meta.json'} is not JSON: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{folder} is not an index folder: its meta.json does not say format {FORMAT!r}")
    if meta.get("version") != VERSION:
        raise ValueError(f"{folder} has index version {meta.get('version')!r}; this mmrep reads version {VERSION}")
    kinds = {"metric": str, "dim": int, "count": int, "factory": str, "files": dict, "meta": dict}
    bad = [key for key, kind in kinds.items() if not isinstance(meta.get(key), kind)]
    files = meta["files"] if "files" not in bad else {}
    for kind in ("index", "records"):
        stated = files.get(kind)
        if not isinstance(stated, dict) or not isinstance(stated.get("name"), str) or "bytes" not in stated:
            bad.append(f"files.{kind}")
    if bad:
        raise ValueError(f"{folder / 'meta.json'} lacks {', '.join(bad)} or has them wrong: the index is damaged")
    return meta


def checked_file(folder: Path, stated: Mapping[str, Any]) -> Path:
    path = folder / Path(stated["name"]).name
    if not path.is_file():
        raise FileNotFoundError(f"the index {folder} lacks its file {path.name}")
    if path.stat().st_size != stated["bytes"]:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, but meta.json says {stated['bytes']}: truncated or changed"
        )
    return path


def _is_data(path: Path) -> bool:
    return any(path.match(pattern) for pattern in ("index-*.faiss", "records-*.jsonl", "meta-*.json.tmp"))


def _is_ours(folder: Path) -> bool:
    """An index, or what a killed first save left: nothing but our data files."""
    if (folder / "meta.json").exists():
        try:
            read_meta(folder)
        except ValueError:
            return False
        return True
    return all(_is_data(path) for path in folder.iterdir())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
