"""A Hugging Face hub on the loopback interface: folders served over real HTTP, with faults on demand.

It speaks as much of the hub's protocol as huggingface_hub's client asks for: revisions, listings, files with ranges.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    """What is served, and how.

    token: what an answer requires. gated: refuse even so. fail: by file, so many answers of status 500 first. cut: by
    file, the bytes after which the first answer breaks off. slow: seconds between pieces. forged: by file, bytes that
    are sent instead, under the name of the true ones.
    """

    folder: Path
    token: str | None = None
    gated: bool = False
    fail: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    slow: float = 0.0
    forged: dict[str, bytes] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", COMMIT)


class Hub:
    """A server of repositories by id; `log` counts answers by (method, path's last part, status)."""

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.log: Counter[tuple[str, str, int]] = Counter()
        self.ranges: list[str] = []
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repo = self.owner.repos.get("/".join(parts[:2]))
        if repo is None:
            return self.refuse(401, "RepoNotFound")
        if repo.token is not None and self.headers.get("authorization") != f"Bearer {repo.token}":
            return self.refuse(401, "RepoNotFound")
        if repo.gated:
            return self.refuse(403, "GatedRepo")
        verb, revision = (parts[2], parts[3]) if len(parts) > 3 else ("revision", "main")
        if revision not in repo.revisions:
            return self.refuse(404, "RevisionNotFound")
        if verb == "revision":
            names = [str(p.relative_to(repo.folder)) for p in _files(repo.folder)]
            return self.json({"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]})
        if verb == "tree":
            return self.json([_entry(repo.folder, p) for p in _files(repo.folder)])
        return self.file(repo, "/".join(parts[4:]), body)

    def file(self, repo: Repo, name: str, body: bool) -> None:
        path = repo.folder / name
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        if body and repo.fail.get(name, 0) > 0:
            repo.fail[name] -= 1
            return self.refuse(500)
        content = repo.forged.get(name, path.read_bytes())
        start, wanted = 0, self.headers.get("range")
        if wanted:
            self.owner.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        etag = _etag(path)
        self.count(206 if wanted else 200)
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if len(etag) == 64:
            self.send_header("X-Linked-ETag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not body:
            return
        limit = repo.cut.pop(name, None)
        sent = content[start:] if limit is None else content[start:][:limit]
        for place in range(0, len(sent), 4096):
            self.wfile.write(sent[place : place + 4096])
            time.sleep(repo.slow)
        if limit is not None:
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True

    def json(self, data: Any) -> None:
        body = json.dumps(data).encode()
        self.count(200)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str | None = None) -> None:
        self.count(status)
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def count(self, status: int) -> None:
        self.owner.log[self.command, self.path.rsplit("/", 1)[-1].split("?")[0], status] += 1


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _etag(path: Path) -> str:
    """As on the hub: large files by their SHA-256, others by git's hash."""
    content = path.read_bytes()
    if path.suffix in (".safetensors", ".bin"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    etag, size = _etag(path), path.stat().st_size
    lfs = {"lfs": {"oid": etag, "size": size, "pointerSize": 130}} if len(etag) == 64 else {}
    return {"type": "file", "path": str(path.relative_to(folder)), "size": size, "oid": etag[:40], **lfs}
