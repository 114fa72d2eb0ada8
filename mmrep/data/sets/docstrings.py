"""What the functions and classes of installed Python packages say of themselves: English text, there offline.

The source files are parsed and never imported. A documented thing is one row: its first paragraph is a sentence, all of
it a document of some hundred words. The subpackage that it stands in (``stats``, ``signal``) is what it is about.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mmrep.config import config
from mmrep.data.sets._packages import find_module, python_version
from mmrep.data.sets._rows import RowSource
from mmrep.data.sets._split import SplitConfig, part_of

_EXAMPLE = re.compile(r"^\s*(>>>|\.\.\. )")
_HIDDEN = ("test", "conftest")


@config
class DocstringsConfig(SplitConfig):
    """package: an installed Python package with subpackages. root: its folder; None = where it is installed.

    shortest: leave out what has fewer words.
    """

    package: str = "scipy"
    root: str | None = None
    shortest: Annotated[int, Field(ge=1)] = 60
    label: str | None = "subpackage"


class Docstrings(RowSource):
    """One row per documented public function or class of a public subpackage; the id is where it stands.

    Columns: ``text`` (the docstring without the lines of its examples), ``summary`` (its first paragraph, in one line),
    ``name`` and ``subpackage``. What has the same text as an earlier one is left out.
    """

    Config = DocstringsConfig
    columns = ("text", "summary", "name", "subpackage")
    config: DocstringsConfig

    def __init__(self, config: DocstringsConfig) -> None:
        super().__init__(config)
        folder = find_module(config.package, config.root, "", "*/*.py", f"pip install {config.package}")
        rows: dict[str, dict[str, str]] = {}
        seen: set[str] = set()
        for path in sorted(folder.rglob("*.py")):
            where = path.relative_to(folder).parts
            if len(where) < 2 or where[0].startswith("_") or any(part.startswith(_HIDDEN) for part in where):
                continue
            for name, text in _documented(path):
                words = text.split()
                if len(words) >= config.shortest and text not in seen:
                    seen.add(text)
                    summary = " ".join(text.split("\n\n")[0].split())
                    row = {"text": text, "summary": summary, "name": name, "subpackage": where[0]}
                    rows.setdefault(f"{'/'.join(where)}:{name}", row)
        self.set_rows(
            [row for row in rows.items() if config.split in ("all", part_of(row[0], config))],
            f"split: nothing of {config.package!r} that is documented falls in {config.split!r}",
        )

    def fingerprint(self) -> str:
        """The config and the version of the package."""
        return f"docstrings:{self.config}:{python_version(self.config.package)}"


def _documented(path: Path) -> Iterator[tuple[str, str]]:
    """Names and docstrings of the public functions and classes at the top of a source file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            text = ast.get_docstring(node) or ""
            yield node.name, "\n".join(line for line in text.split("\n") if not _EXAMPLE.match(line))
