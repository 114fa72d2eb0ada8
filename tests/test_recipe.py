"""Recipes: names, paths, extends, overrides, and every kind of wrong recipe."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from mmrep.config import ConfigError
from mmrep.recipe import read_recipe, recipe_names, recipe_text, write_recipe

BASE = {
    "data": {"train": {"type": "list", "records": [{"x": 1, "y": 2}]}, "fields": {"x": "a", "y": "b"}},
    "model": {"dim": 4, "towers": {"a": {"encoder": "image-vit"}, "b": {"encoder": "image-cnn"}}},
    "objectives": [{"type": "contrastive", "pairs": [{"between": ["x", "y"]}]}],
    "train": {"steps": 3},
}


@pytest.fixture
def write(tmp_path):
    def make(name="base", **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**BASE, **changes} if name == "base" else changes))
        return str(path)

    return make


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_library_is_valid_and_opens_with_what_it_is_and_its_command(name):
    recipe = read_recipe(name)
    assert recipe.about
    head = recipe_text(name).split("\n\n")[0]
    assert head.startswith("# ")
    assert f"mmrep train {name}" in recipe_text(name)


@pytest.mark.parametrize("name", recipe_names())
def test_what_a_recipe_watches_while_it_trains_is_never_a_test_split(name):
    recipe = read_recipe(name)
    for watched in recipe.monitor:
        source = recipe.data.evaluation[recipe.evaluations[watched].config.data]
        assert getattr(source.config, "split", "validation") == "validation", watched


def test_a_resolved_recipe_reads_back_equal(write, tmp_path):
    recipe = read_recipe(write())
    write_recipe(recipe, tmp_path / "resolved.yaml")
    assert read_recipe(str(tmp_path / "resolved.yaml")) == recipe


def test_a_run_folder_is_a_recipe(write, tmp_path):
    write_recipe(read_recipe(write()), tmp_path / "config.yaml")
    assert read_recipe(str(tmp_path)) == read_recipe(write())


def test_extends_states_only_what_differs(write):
    write()
    child = read_recipe(write("child", extends="./base.yaml", train={"steps": 9}))
    assert child.train.steps == 9
    assert child.model.dim == 4


def test_a_library_recipe_can_be_extended_by_name(write):
    child = read_recipe(write("child", extends="quickstart", train={"steps": 9}))
    assert child.train.steps == 9
    assert child.data.train.type == "emoji"


def test_recipes_that_extend_each_other_are_refused(write):
    write("one", extends="./two.yaml")
    write("two", extends="./one.yaml")
    with pytest.raises(ConfigError, match="in a circle"):
        read_recipe(write("one", extends="./two.yaml"))


def test_overrides_and_smoke_lie_over_the_file(write):
    recipe = read_recipe(write(), ["model.dim=8", "model.towers.a.encoder.width=48"], smoke=True)
    assert recipe.model.dim == 8
    assert recipe.model.towers["a"].encoder.config.width == 48
    assert recipe.train.steps == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": []}, "objectives: at least one"),
        ({"data": {**BASE["data"], "fields": {"x": "a", "y": "c"}}}, r"data\.fields\.y: no tower 'c'"),
        ({"data": {**BASE["data"], "fields": {"x": "image", "y": "b"}}}, r"data\.fields\.x: no tower 'image'"),
        ({"data": {**BASE["data"], "views": {"xx": ["image-augment"]}}}, r"views\.xx: unknown field; did you mean 'x'"),
        ({"evaluations": {"e": {"type": "retrieval", "data": "tset", "between": ["x", "y"]}}}, "unknown 'tset'"),
        ({"evaluations": {"e": {"type": "knn", "data": "test", "field": "x", "train": "known"}}},
         r"evaluations\.e\.train: unknown 'known'"),
        ({"monitor": ["e"]}, "monitor: unknown 'e'"),
        ({"train": {"steps": 3, "epochs": 1}}, "exactly one of steps and epochs"),
        ({"trian": {}}, "trian: unknown; did you mean 'train'"),
        ({"objectives": [{"type": "contrastive", "pairs": [{"between": ["x", "y"], "wieght": 2}]}]},
         r"objectives\[0\]\.pairs\[0\]\.wieght: unknown; did you mean 'weight'"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_names_path_value_and_near_match(write, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(write(**changes))


def test_unknown_recipes_and_files_are_named():
    with pytest.raises(ConfigError, match="unknown recipe 'quikstart'; did you mean 'quickstart'"):
        read_recipe("quikstart")
    with pytest.raises(ConfigError, match=r"there is no recipe file '\./nowhere\.yaml'"):
        read_recipe("./nowhere.yaml")


def test_a_file_that_is_no_yaml_or_no_mapping_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_recipe(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="expected a mapping"):
        read_recipe(str(tmp_path / "list.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_runs_as_a_smoke_test(name, tmp_path):
    """Where its data is installed; of npm packages, in the folder that MMREP_NPM names."""
    before = os.times()
    command = [sys.executable, "-m", "mmrep", "train", name, "--smoke", "--out", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=os.environ.get("MMREP_NPM"))
    after = os.times()
    if "install the data with" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    if name.startswith("quickstart"):  # the others read hundreds of clips, meshes or videos first
        assert after.children_user + after.children_system - before.children_user - before.children_system < 20
