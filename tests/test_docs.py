"""The pages of the documentation: every one with code is run, and no link leads nowhere."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT, blocks


def test_every_page_with_code_is_run():
    """`tests/docs` has a test for each page that has blocks to run."""
    pages = [page.stem for page in (ROOT / "docs").glob("*.md")]
    with_code = {p for p in pages if any(kind in ("python", "yaml") for kind, _, _ in blocks(_text(p)))}
    tested = {path.stem.removeprefix("test_docs_") for path in (ROOT / "tests" / "docs").glob("test_docs_*.py")}
    assert with_code == tested


def _text(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def test_no_page_names_a_file_that_does_not_exist():
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
