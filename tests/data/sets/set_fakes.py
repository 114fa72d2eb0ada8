"""Tiny folders that are laid out as the packages of the data sets are."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from PIL import Image

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="48pt" height="24pt"><rect width="20" height="20" fill="red"/></svg>'
)


def png(colour: str = "blue") -> bytes:
    data = io.BytesIO()
    Image.new("RGBA", (4, 4), colour).save(data, "PNG")
    return data.getvalue()


def files(root: Path, contents: dict[str, str | bytes]) -> Path:
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def archive(path: Path, contents: dict[str, str | bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in contents.items():
            out.writestr(name, content)
    return path
