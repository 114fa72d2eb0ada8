"""An eighth modality from another package: installed, checked, trained in a tuple with holes, saved and loaded again.

The package in tests/third_party is built and installed as a user would install it; nothing in mmrep knows of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PACKAGE = Path(__file__).parent / "third_party"
CNN = {"type": "image-cnn", "size": 16, "widths": [8, 16], "depths": [1, 1], "norm": "group"}
TEXT = {"type": "text-transformer", "tokenizer": "bytes", "width": 32, "depth": 1, "heads": 2, "max_length": 16}
RECIPE = {
    "data": {
        "train": {"type": "tactile-world"},
        "fields": {"touch": "tactile", "image": "image", "name": "text"},
        "views": {"touch": [{"type": "tactile-press"}]},
        "evaluation": {"test": {"type": "tactile-world", "seed": 1, "n": 60, "holes": 0.0}},
        "drop": {"image": 0.1},
    },
    "model": {
        "dim": 16,
        "towers": {"tactile": {"encoder": "tactile"}, "image": {"encoder": CNN}, "text": {"encoder": TEXT}},
        "temperatures": {"default": {}, "tuple": {"scale": 10.0}},
        "fusions": {
            "all": {"of": {"touch": "tactile", "image": "image", "name": "text"}, "by": "gated"},
            "without_touch": {"of": {"image": "image", "name": "text"}},
        },
    },
    "objectives": [
        {"type": "tuples", "tuples": [{"of": ["touch", "image", "name"], "anchor": "name", "temperature": "tuple"}],
         "loss": "gram"},
        {"type": "contrastive", "edges": {"of": ["touch", "image", "name"]}},
        {"type": "contrastive", "pairs": [{"between": ["all", "name"]}], "weight": 0.2, "name": "fused"},
        {"type": "predict", "source": "without_touch", "target": "touch"},
    ],
    "train": {"steps": 60, "batch_size": 48, "precision": "fp32", "workers": 0, "save_every": 30},
    "optim": {"lr": 5e-3},
    "evaluations": {
        f"touch {other}": {"type": "retrieval", "data": "test", "between": ["touch", other]}
        for other in ("image", "name", "without_touch")
    },
}  # fmt: skip

TABLE = {
    "data": {
        "train": {"type": "tumours"},
        "fields": {"cells": "tabular"},
        "evaluation": {"test": {"type": "tumours", "test": True}},
        "cache": True,
    },
    "model": {"dim": 32, "towers": {"tabular": {"encoder": "tabular", "projector": "identity"}}},
    "objectives": [
        # T-JEPA (arXiv:2410.05016): from some columns, what a teacher makes of others, several masks at once.
        {"type": "masked", "field": "cells", "mask": {"type": "random", "ratio": 0.5, "masks": 2},
         "predictor": {"type": "transformer", "width": 32, "depth": 1, "heads": 2, "positions": "encoder"},
         "target": "teacher"},
    ],
    "teacher": {"momentum": 0.99},
    "collapse": {"every": 10, "after": 40, "patience": 1, "stop": True},
    "train": {"steps": 80, "batch_size": 64, "precision": "fp32", "workers": 0, "save_every": 80},
    "optim": {"lr": 2e-3},
    "evaluations": {"probe": {"type": "linear-probe", "data": "test", "field": "cells", "baselines": ["untrained"]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The environment in which the package is installed, and a folder to work in."""
    folder = tmp_path_factory.mktemp("third_party")
    command = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    done = subprocess.run(
        [sys.executable, *command, str(folder / "site"), str(PACKAGE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
    return folder, {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def mmrep(place, *arguments, code=0):
    folder, env = place
    command = [sys.executable, "-m", "mmrep", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(place):
    (place[0] / "touch.yaml").write_text(yaml.safe_dump(RECIPE))
    mmrep(place, "train", "touch.yaml", "--out", "run")
    return place[0] / "run"


def test_it_is_listed_and_passes_the_contract_checks(place):
    assert "tactile" in mmrep(place, "list", "encoders").split()
    assert "tactile-press" in mmrep(place, "list", "views", "tactile*").split()
    assert "tactile: keeps the contract" in mmrep(place, "check", "tactile")


@pytest.mark.parametrize("other", ["image", "name", "without_touch"])
def test_it_learns_in_a_tuple_with_holes(run, other):
    rows = json.loads((run / "evaluation.json").read_text())[f"touch {other}"]["rows"]
    found = {row["who"]: row["R@1"] for row in rows if row["direction"] == f"touch→{other}"}
    assert found["model"] > 5 * found["chance"]
    assert found["model"] > found["untrained"]


@pytest.mark.slow
def test_columns_of_a_table_are_predicted_in_the_teachers_space(place):
    assert "tabular: keeps the contract" in mmrep(place, "check", "tabular")
    (place[0] / "table.yaml").write_text(yaml.safe_dump(TABLE))
    mmrep(place, "train", "table.yaml", "--out", "table")
    steps = [json.loads(line) for line in (place[0] / "table/metrics.jsonl").read_text().splitlines()]
    losses = [step["masked/loss"] for step in steps if "masked/loss" in step]
    assert losses[-1] < 0.8 * losses[0]
    rows = json.loads((place[0] / "table/evaluation.json").read_text())["probe"]["rows"]
    found = {row["who"]: row["accuracy"] for row in rows}
    assert found["model"] > 0.8 > found["majority class"]  # tokens of one point for all would be at the majority


def test_it_is_saved_and_loaded_again_only_where_its_package_is(place, run):
    code = """
        import numpy as np, mmrep
        model = mmrep.load("run/model")
        touch = np.ones((3, 8, 8))
        assert model.encode([touch], "tactile").shape == (1, 16)
        assert model.encode({"touch": [touch, None], "name": [None, "small ring"]}, fusion="all").shape == (2, 16)
    """
    import textwrap

    folder, env = place
    run_python = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run_python, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    without = {**env, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(run_python, cwd=folder, env=without, capture_output=True, text=True)
    assert done.returncode != 0
    assert "unknown encoder 'tactile'" in done.stderr


def test_it_is_bound_to_a_space_that_does_not_know_it(place, run):
    """Without touch first; then touch is bound to that space through pictures alone."""
    folder, _ = place
    recipe = json.loads(json.dumps(RECIPE))
    recipe["data"]["fields"].pop("touch")
    recipe["data"]["views"] = {}
    recipe["model"]["towers"].pop("tactile")
    recipe["model"]["fusions"] = {}
    recipe["objectives"] = [{"type": "contrastive", "pairs": [{"between": ["image", "name"]}]}]
    recipe["evaluations"] = {}
    (folder / "old.yaml").write_text(yaml.safe_dump(recipe))
    mmrep(place, "train", "old.yaml", "--out", "old")
    (folder / "data.yaml").write_text(yaml.safe_dump({**RECIPE["data"], "drop": {}}))
    out = mmrep(place, "bind", "old", "--add", "tactile", "--data", "data.yaml", "--through", "image", "--out", "bound",
                "train.epochs=20", "optim.lr=0.005")  # fmt: skip
    assert "test image" in out
    rows = json.loads((folder / "bound/evaluation.json").read_text())["test image"]["rows"]
    found = {row["who"]: row["R@1"] for row in rows if row["direction"] == "image→touch"}
    assert found["model"] > 5 * found["chance"]
