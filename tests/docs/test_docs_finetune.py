"""The page `docs/finetune.md`. A file for each page, so that processes of a test run share them."""

from __future__ import annotations

import pytest

from tests.docs.pages import run_page


@pytest.mark.slow  # three minutes: it trains nine times
def test_every_block_runs(tmp_path):
    run_page("finetune", tmp_path)
