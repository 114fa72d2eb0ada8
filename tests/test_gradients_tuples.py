"""`mmrep check gradients` on a recipe of tuple objectives: real processes, installed components, all terms agree."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import parse
from mmrep.gradients import check_gradients
from mmrep.recipe import Recipe


def recipe():
    generator = torch.Generator().manual_seed(0)
    words = [f"{n:b}" for n in torch.randint(2**6, (3 * 18,), generator=generator).tolist()]
    rows = [dict(zip("xyz", words[3 * i : 3 * i + 3], strict=True)) for i in range(18)]
    for i, field in ((2, "x"), (5, "y"), (5, "z"), (11, "z"), (13, "z")):
        rows[i][field] = None
    transformer = {"type": "text-transformer", "tokenizer": "bytes", "width": 16, "depth": 1, "heads": 2}
    of = ["x", "y", "z"]
    hot = {"scale": 28.57, "min_scale": 2.0, "max_scale": 200.0}
    return parse(
        Recipe,
        {
            "data": {"train": {"type": "list", "records": rows}, "fields": {"x": "a", "y": "b", "z": "b"}},
            "model": {
                "dim": 4,
                "towers": {name: {"encoder": transformer} for name in "ab"},
                "temperatures": {"default": {"scale": 5.0}, "hot": hot},
            },
            "objectives": [
                {"type": "tuples", "name": "gram", "tuples": [{"of": of, "partial": "subsets"}], "loss": "gram"},
                {"type": "tuples", "name": "symile", "tuples": [{"of": of, "temperature": "hot"}], "loss": "symile"},
                {"type": "tuples", "name": "triangle", "tuples": [{"of": of, "anchor": "y"}], "loss": "triangle"},
                {"type": "decur", "between": ["x", "y"], "common": 0.5, "within": 0.0},
            ],
            "train": {"steps": 1, "batch_size": 18},
        },
    )


@pytest.mark.slow
def test_all_terms_of_tuple_objectives_agree():
    report = check_gradients(recipe(), processes=2, samples=18)
    assert report is not None
    assert report.agree, report.text()
    rows = {row.term: row for row in report.tables[0].rows}
    assert {"loss gram/x+y+z", "loss symile/x+y+z", "loss decur/x-y.unique", "temperature hot, scale"} <= set(rows)
    assert all(row.one for term, row in rows.items() if not term.startswith("tower a, pool"))
    assert report.shares[0] != report.shares[1]
