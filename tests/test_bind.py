"""Binding a modality to a saved space: what the recipe says, that it learns, and that nothing old changes by a bit."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import yaml

import mmrep
from mmrep import cli
from mmrep.bind import bind_recipe, default_encoder
from mmrep.config import ConfigError
from mmrep.embed import memo
from mmrep.recipe import read_recipe
from mmrep.run import Run, open_run
from tests import toys  # noqa: F401
from tests.world import COLOURS, SHAPES, draw, make_world, write_recipe

OLD = {"image": [draw("red", "disc", 1), draw("blue", "frame", 1)], "text": ["a red disc", "a blue frame"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A trained image-text run, and a table of pictures with a code of numbers for what they show."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    Run(read_recipe(str(write_recipe(folder))), folder / "run").train()
    rows = []
    for split in ("train", "test"):
        for line in (folder / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            colour, shape = row["group"].split("-")
            numbers = [list(COLOURS).index(colour) - 1.5, 3.0 * SHAPES.index(shape) - 4]
            rows.append({"image": row["image"], "numbers": numbers, "group": row["group"]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "table", "files": str(folder / "pairs.jsonl"), "paths": ["image"], "group": "group"}
    (folder / "pairs.yaml").write_text(yaml.safe_dump(source))
    return folder


def bound(world, **changes):
    options = {"add": "numbers", "data": str(world / "pairs.jsonl"), "through": ["image"], "encoder": "toy"} | changes
    return bind_recipe(str(world / "run"), **options)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bound")
    recipe = bound(world, features=str(folder / "features"))
    recipe["train"] |= {"epochs": None, "steps": 150, "precision": "fp32"}
    recipe["optim"]["lr"] = 1e-2
    recipe["model"]["towers"]["numbers"]["encoder"]["width"] = 32
    results = Run(read_recipe(recipe), folder / "run").train()
    return folder, results


def test_the_old_towers_keep_every_bit(world, trained):
    before, after = mmrep.load(world / "run/model"), mmrep.load(trained[0] / "run/model")
    for name, values in OLD.items():
        np.testing.assert_array_equal(after.encode(values, name), before.encode(values, name))
    for key, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[key], value), key
    assert after.modalities == [*before.modalities, "numbers"]


def test_the_new_modality_finds_its_pictures_and_the_captions_that_it_never_met(trained):
    after = mmrep.load(trained[0] / "run/model")
    names = [(c, s) for c in COLOURS for s in SHAPES]
    codes = [[list(COLOURS).index(c) - 1.5, 3.0 * SHAPES.index(s) - 4] for c, s in names]
    texts = after.encode([f"a {c} {s}" for c, s in names], "text")
    hits = (after.similarity(after.encode(codes, "numbers"), texts).argmax(1) == torch.arange(16)).float().mean().item()
    assert hits >= 0.5  # chance 1/16
    assert {row["who"] for row in trained[1]["held_out image"]["rows"]} == {"model", "untrained", "chance"}


def test_features_are_kept_by_content_and_serve_the_next_run(world, trained, monkeypatch, tmp_path):
    folder, _ = trained
    kept = list((folder / "features").glob("*/*.safetensors"))
    assert kept
    computed = []
    original = memo.Tower.features

    def spy(self, inputs):
        computed.append(self.modality)
        return original(self, inputs)

    recipe = bound(world, features=str(folder / "features"))
    recipe["train"] |= {"epochs": None, "steps": 2}
    recipe["evaluations"] = {}
    from mmrep.model import Tower

    monkeypatch.setattr(Tower, "features", spy)
    Run(read_recipe(recipe), tmp_path / "again").train()
    assert computed[:2] == ["numbers", "numbers"], "the frozen tower was computed again in one of the two steps"
    assert computed[2:] == ["image", "text", "numbers"]  # the fingerprint of the saved model


def test_the_recipe_is_what_it_says(world):
    recipe = read_recipe(bound(world))
    assert recipe.data.fields == {"numbers": "numbers", "image": "image"}
    assert {n: t.frozen for n, t in recipe.model.towers.items()} == {
        "image": "tower",
        "text": "tower",
        "numbers": False,
    }
    assert set(recipe.model.temperatures) == {"default", "numbers-image"}
    train, held_out = recipe.data.train.build(), recipe.data.evaluation["held_out"].build()
    ids = [{source[i].id for i in range(len(source))} for source in (train, held_out)]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == 48
    assert 0 < len(ids[1]) < 16
    assert train[0].fields["image"].is_file()  # a name beside the table became a path


def test_groups_of_a_source_stay_on_one_side(world):
    recipe = read_recipe(bound(world, data=str(world / "pairs.yaml")))
    groups = [set(s.groups()) for s in (recipe.data.train.build(), recipe.data.evaluation["held_out"].build())]
    assert not groups[0] & groups[1]


def test_a_data_section_says_columns_views_and_held_out_data(world, tmp_path):
    section = yaml.safe_load((world / "recipe.yaml").read_text())["data"]
    section["fields"] = {"image": "image", "caption": "numbers"}
    section["views"] = {"image": [{"type": "image-augment"}]}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(section))
    recipe = bound(world, data=str(tmp_path / "data.yaml"))
    assert recipe["data"]["fields"] == {"caption": "numbers", "image": "image"}
    assert list(recipe["evaluations"]) == ["test image"]
    assert list(recipe["data"]["views"]) == ["image"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"through": ["imag"]}, r"--through: no tower 'imag'; did you mean 'image'"),
        ({"add": "image"}, r"--add: .* has a tower 'image' already"),
        ({"add": "nubmers=numbers"}, r"--add: the data has no column 'nubmers'; did you mean 'numbers'"),
        ({"add": "smell", "encoder": None}, r"--add: which column is 'smell'"),
        ({"add": "numbers=smell", "encoder": None}, r"--add: no encoder reads 'smell'"),
        ({"data": "nowhere.csv"}, r"--data: there is no file 'nowhere\.csv'"),
        ({"data": "quickstrat"}, r"--data: .*did you mean 'quickstart'"),
    ],
)
def test_what_cannot_be_bound_is_refused(world, changes, words):
    with pytest.raises(ConfigError, match=words):
        bound(world, **changes)


def test_the_default_encoder_is_of_the_modality_and_builds():
    assert default_encoder("numbers") == "toy"
    assert default_encoder("image").startswith("image-")


def test_the_command(world, monkeypatch, capsys, tmp_path):
    what = ["bind", world / "run", "--add", "numbers", "--data", world / "pairs.jsonl", "--through", "image"]
    how = ["--smoke", "--encoder", "toy", "--out", tmp_path / "out", "--features", tmp_path / "features"]
    arguments = [*what, *how, "optim.lr=0.01"]
    monkeypatch.setattr(sys, "argv", ["mmrep", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr()
    assert stop.value.code == 0, out.err
    assert "held_out image" in out.out
    assert open_run(tmp_path / "out").recipe.optim.lr == 0.01
