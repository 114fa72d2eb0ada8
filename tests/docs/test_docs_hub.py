"""The page `docs/hub.md`. A file for each page, so that processes of a test run share them."""

from __future__ import annotations

from tests.docs.pages import run_page


def test_every_block_runs(tmp_path):
    run_page("hub", tmp_path)
