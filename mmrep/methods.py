"""The catalogue of published methods: which recipe is which method, where its equation stands, and what was checked.

``methods.tsv`` lists the methods. What is done of them is not written there but in the recipes, under ``methods:``, so
that the list cannot say more than there is.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, cast

import yaml

from mmrep._recipe_files import recipe_names, recipe_text
from mmrep.config import config


@config
class MethodClaim:
    """A recipe says which method it is. id: of the catalogue. source: paper and equation or section.

    checked: the tests, ``tests/path.py::test_name``, that compare it with its formula or an oracle. differs: what is
    not as in the paper.
    """

    id: str
    source: str
    checked: tuple[str, ...] = ()
    differs: str = ""


@dataclass(frozen=True)
class Method:
    """One row of the catalogue.

    Attributes:
        id, name: S for a published system, B for a base that many of them presuppose.
        tier: 1 must work and equal its formula, 2 works as a component or recipe, 3 can be expressed, 4 gives an idea.
        group: the capability that does most of the work for it.
        modalities, mechanism: in words.
        claims: by recipe, what it says of itself.
    """

    id: str
    name: str
    tier: int
    group: str
    modalities: str
    mechanism: str
    claims: dict[str, MethodClaim] = field(default_factory=dict[str, MethodClaim])


def methods() -> list[Method]:
    """All rows, in the order of the catalogue, with the claims of the library's recipes. Imports no component."""
    found: dict[str, Method] = {}
    with (resources.files("mmrep") / "methods.tsv").open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            found[row["id"]] = Method(
                row["id"], row["name"], int(row["tier"]), row["group"], row["modalities"], row["mechanism"]
            )
    for recipe, claim in _claims():
        if claim.id not in found:
            raise ValueError(f"recipe {recipe!r} claims method {claim.id!r}, which is not in the catalogue")
        found[claim.id].claims[recipe] = claim
    return list(found.values())


def methods_table(rows: list[Method]) -> str:
    """Markdown: a line for each method, and how many are done of each tier."""
    lines = ["| id | method | tier | recipe | source of the equation | checked by | not as in the paper |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        if not row.claims:
            lines.append(f"| {row.id} | {row.name} | {row.tier} | *not done yet* | | | |")
        for recipe, claim in row.claims.items():
            checked = ", ".join(claim.checked) or "*nothing*"
            lines.append(
                f"| {row.id} | {row.name} | {row.tier} | {recipe} | {claim.source} | {checked} | {claim.differs} |"
            )
    counts = [
        f"tier {tier}: {sum(bool(r.claims) for r in of)} of {len(of)}"
        for tier in (1, 2, 3) if (of := [r for r in rows if r.tier == tier])
    ]  # fmt: skip
    return "\n".join([*lines, "", "With a recipe: " + ", ".join(counts) + "."])


def _claims() -> Iterator[tuple[str, MethodClaim]]:
    for name in recipe_names():
        data = cast("dict[str, Any]", yaml.safe_load(recipe_text(name)))
        for claim in data.get("methods", []):
            yield name, MethodClaim(**{**claim, "checked": tuple(claim.get("checked", ()))})
