"""What test_engine_guests runs on every process: objectives that hold frozen copies or read other models."""

from __future__ import annotations

import yaml

from mmrep.recipe import read_recipe
from mmrep.run import Run
from tests.training import engine_run

QUICK = {"steps": 3, "batch_size": 16, "precision": "fp32", "workers": 0, "log_every": 1, "save_every": 2}


def prepare(folder):
    """A saved model to begin from and to follow, and a recipe with all of them."""
    engine_run.make_recipe(folder)
    data = yaml.safe_load((folder / "recipe.yaml").read_text())
    for key in ("average", "monitor"):
        data.pop(key, None)
    data["evaluations"], data["train"] = {}, QUICK
    data["optim"] = {"optimizer": "sgd", "lr": 0.2, "weight_decay": 0.0}
    Run(read_recipe(data), folder / "first").train()
    distill = {"type": "distill", "student": "image", "dims": [4], "losses": {"cosine": 1, "rank": 1},
               "teachers": [{"model": str(folder / "first"), "column": "caption", "tower": "text"}]}  # fmt: skip
    more = [distill, {"type": "anchor", "fields": ["image", "caption"]}, {"type": "l2-sp", "alpha": 0.1}]
    data |= {"start": str(folder / "first"), "objectives": [*data["objectives"], *more]}
    data["model"] = {"reductions": [4]}
    (folder / "more.yaml").write_text(yaml.safe_dump(data))


def straight(folder):
    """A whole run."""
    Run(read_recipe(str(folder / "more.yaml")), folder / "straight").train()
    return {}


def resumed(folder):
    """Its last checkpoint gone, and gone on from the one before."""
    Run(read_recipe(str(folder / "more.yaml")), folder / "straight").train(resume=True)
    return {}
