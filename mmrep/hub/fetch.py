"""A repository of the Hugging Face hub as a local folder, by huggingface_hub's own client: cache, pinning, resuming.

Nothing here opens a file of weights; pickles are not even downloaded.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack")
_UNUSED = (*PICKLES, "*.onnx", "*.onnx_data", "*.tflite", "*.gguf", "*.ot", "*.mlmodel", "onnx/*", "openvino/*", "*.py")
_PAUSES = (1.0, 3.0)
"""Seconds before a server in trouble is asked again."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ModelFolderError(ValueError):
    """A folder or repository that cannot be loaded as a model; the message says why and what to do."""


@dataclass(frozen=True)
class Fetched:
    """A local copy of a repository.

    Attributes:
        folder: where it is.
        commit: which commit, None if unknown.
        pickles: names of the files of the repository that were left out because they are pickles, as far as known.
    """

    folder: Path
    commit: str | None = None
    pickles: tuple[str, ...] = ()


def fetch(repo: str, *, code: bool = False, **hub: Any) -> Fetched:
    """Download a repository, or find it in the cache.

    Args:
        repo: ``organisation/name``.
        code: its Python files, too; nothing here runs them.
        **hub: huggingface_hub's own: ``revision, token, cache_dir, force_download, local_files_only``.

    Raises:
        ModelFolderError: no such repository or revision, no access, no network, or a file that is not what the hub
            says it is.
    """
    from huggingface_hub import errors

    before = _known_blobs(repo, hub.get("cache_dir"))
    try:
        folder = _snapshot(repo, code, hub)
    except errors.GatedRepoError as error:
        raise ModelFolderError(
            f"{repo!r} is gated: accept its conditions on its page, then give token=… or log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelFolderError(
            f"there is no folder {repo!r}, and the hub shows no such repository: check the name; if it is private, "
            "give token=… or log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        revision = hub.get("revision")
        raise ModelFolderError(f"{repo!r} has no revision {revision!r}: give a branch, tag or commit") from error
    except errors.HFValidationError as error:
        raise ModelFolderError(f"{repo!r} is no folder and no hub id organisation/name: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelFolderError(
            f"{repo!r} is not in the local cache, and the hub cannot be asked (offline, or local_files_only=True): "
            f"load it once with a network, or give a folder ({error})"
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise ModelFolderError(
            f"{repo!r} could not be downloaded: {error}. What has arrived is kept: the same call goes on from there"
        ) from error
    _verify(folder, before)
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return Fetched(folder, commit, _pickles(repo, folder, hub))


def _snapshot(repo: str, code: bool, hub: dict[str, Any]) -> Path:
    """huggingface_hub's download; a server in trouble is asked again, which the client does for pieces alone."""
    from huggingface_hub import errors, snapshot_download

    unused = [pattern for pattern in _UNUSED if not (code and pattern == "*.py")]
    for pause in (*_PAUSES, None):
        try:
            return Path(snapshot_download(repo, ignore_patterns=unused, library_name="mmrep", **hub))
        except errors.HfHubHTTPError as error:
            if pause is None or error.response is None or error.response.status_code < 500:
                raise
            logger.info("%s: %s; asked again in %s s", repo, error, pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _known_blobs(repo: str, cache_dir: Any) -> set[str]:
    """The files of the repository that were in the cache before; they were verified when they came."""
    from huggingface_hub import constants

    root = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs"
    return {path.name for path in root.glob("*")} if root.is_dir() else set()


def _verify(folder: Path, before: set[str]) -> None:
    """Compare new weights with the hash that the hub gave; the client itself compares the size alone.

    The cache names a large file by its SHA-256.
    """
    for path in sorted(folder.rglob("*.safetensors")):
        blob = path.resolve()
        if blob.name in before or not _SHA256.fullmatch(blob.name):
            continue
        with open(blob, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != blob.name:
            blob.unlink()
            path.unlink(missing_ok=True)
            raise ModelFolderError(
                f"{path.name} was damaged on its way: its SHA-256 is {found[:12]}…, the hub says {blob.name[:12]}…. It "
                "was removed from the cache; load it again"
            )


def _pickles(repo: str, folder: Path, hub: dict[str, Any]) -> tuple[str, ...]:
    """Names of the pickles of a repository without safetensors, to say what is wrong with it."""
    if any(folder.rglob("*.safetensors")) or hub.get("local_files_only"):
        return ()
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        names = HfApi(token=hub.get("token")).list_repo_files(repo, revision=hub.get("revision"))
    except (HTTPError, OfflineModeIsEnabled):
        return ()
    return tuple(name for name in names if any(Path(name).match(pattern) for pattern in PICKLES))
