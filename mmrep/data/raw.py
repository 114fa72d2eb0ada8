"""Where the bytes of a raw value are: the one door through which files of every modality come in.

A decoder asks `raw_stream` and gets an open binary stream, whatever form the user's value had, or a `BadSampleError`
that a run can count and survive. Nothing remote is fetched.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from mmrep.encoder import BadSampleError


def unwrap(raw: Any) -> Any:
    """The bytes, or else the path, of a dict as Hugging Face datasets store undecoded media; anything else as it is."""
    if isinstance(raw, Mapping) and ("bytes" in raw or "path" in raw):
        value = cast("Mapping[str, Any]", raw)
        return value["bytes"] if value.get("bytes") is not None else value.get("path")
    return raw


def is_location(raw: Any) -> bool:
    """Whether a raw value says where a file is: a path or a URL."""
    return isinstance(raw, (str, os.PathLike))


def raw_stream(raw: Any, noun: str) -> BinaryIO:
    """Open the file that a raw value is or names; the caller closes it.

    Args:
        raw: a path, ``file://`` or ``data:`` URL, bytes, binary file object, or a dict with ``bytes`` and/or ``path``.
        noun: what it should be, for the message: ``"an image"``.

    Raises:
        BadSampleError: the cause is ``missing file``, ``unreadable file``, ``url``, or ``not <noun>`` for a value of
            another kind.
    """
    raw = unwrap(raw)
    if is_location(raw):
        return _open(os.fsdecode(raw))
    if isinstance(raw, (bytes, bytearray, memoryview)):
        return io.BytesIO(raw)
    if hasattr(raw, "read"):
        return cast(BinaryIO, raw)
    raise BadSampleError(f"not {noun}", f"a value of type {type(raw).__name__}")


def _open(text: str) -> BinaryIO:
    scheme = urlsplit(text).scheme if "://" in text or text.startswith("data:") else ""
    if scheme == "data":
        return io.BytesIO(_data_url(text))
    if scheme == "file":
        text = url2pathname(urlsplit(text).path)
    elif scheme:
        raise BadSampleError("url", f"{text[:200]!r} is remote; download it first and give the path")
    try:
        return Path(text).open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSampleError("missing file", text[:200]) from error
    except (OSError, ValueError) as error:  # a folder, no permission, a name with a null byte, a name too long
        raise BadSampleError("unreadable file", f"{text[:200]!r}: {error}") from error


def _data_url(text: str) -> bytes:
    head, _, body = text.partition(",")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise BadSampleError("url", f"a data: URL whose base64 is broken ({error})") from error
