"""The page `docs/many.md`. A file for each page, so that processes of a test run share them."""

from __future__ import annotations

import pytest

from tests.docs.pages import run_page


@pytest.mark.slow  # it trains twice, with several towers
def test_every_block_runs(tmp_path):
    run_page("many", tmp_path)
