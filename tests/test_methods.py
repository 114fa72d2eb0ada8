"""The catalogue of methods: it says what recipes say, and no more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmrep import methods as module
from mmrep.methods import methods, methods_table
from mmrep.recipe import read_recipe

ROOT = Path(__file__).parents[1]
CLAIMS = [(recipe, row.id, claim) for row in methods() for recipe, claim in row.claims.items()]


def test_the_catalogue_is_whole():
    rows = methods()
    assert len(rows) == len({row.id for row in rows}) == 340
    assert sum(row.id.startswith("B") for row in rows) == 25
    assert {row.tier for row in rows} == {1, 2, 3, 4}


@pytest.mark.parametrize(("recipe", "method", "claim"), CLAIMS, ids=[f"{r}-{m}" for r, m, _ in CLAIMS])
def test_what_a_recipe_says_was_checked_exists(recipe, method, claim):
    assert claim.source
    for test in claim.checked:
        path, _, name = test.partition("::")
        assert re.search(rf"^def {re.escape(name)}\(", (ROOT / path).read_text(), re.MULTILINE), test


def test_the_table_counts_and_names(monkeypatch):
    monkeypatch.setattr(module, "recipe_names", lambda: ["mine"])
    claim = "methods:\n- {id: B09, source: 'paper, eq. 1', checked: [tests/x.py::test_y], differs: smaller}\n"
    monkeypatch.setattr(module, "recipe_text", lambda name: claim)
    table = methods_table(methods())
    assert "| B09 | MAE / SimMIM | 1 | mine | paper, eq. 1 | tests/x.py::test_y | smaller |" in table
    assert "| S053 | I-JEPA | 1 | *not done yet* | | | |" in table
    assert "tier 1: 1 of " in table
    monkeypatch.setattr(module, "recipe_text", lambda name: claim.replace("B09", "S999"))
    with pytest.raises(ValueError, match="'mine' claims method 'S999'"):
        methods()


def test_a_recipe_that_extends_a_method_is_not_that_method(tmp_path):
    (tmp_path / "base.yaml").write_text((ROOT / "recipes" / "mae.yaml").read_text())
    (tmp_path / "mine.yaml").write_text("extends: ./base.yaml\n")
    assert [claim.id for claim in read_recipe(str(tmp_path / "base.yaml")).methods] == ["B09"]
    assert read_recipe(str(tmp_path / "mine.yaml")).methods == []
