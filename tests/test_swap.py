"""A folder in the place of another, killed at every file operation; the run folder's model and config after kills."""

from __future__ import annotations

import errno
import os
import shutil
import sys

import pytest

from mmrep import _swap
from mmrep._run_files import claim, save_model
from mmrep._swap import heal_folder, replace_folder
from mmrep.recipe import read_recipe
from mmrep.run import open_run
from mmrep.training.errors import CheckpointError
from tests.training.test_checkpoint import _dies
from tests.world import make_world, write_recipe


def make(folder, word):
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / name).write_text(word)
    return folder


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD, NEW = ({"a": word, "b": word} for word in ("old", "new"))


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_between_any_two_file_operations(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(_swap, "_exchange", lambda a, b: False)
    elif sys.platform != "linux":
        pytest.skip("only Linux exchanges")
    seen, gone = [], 0
    for n in range(1, 200):
        run = tmp_path / "run"
        final, fresh = make(run / "model", "old"), make(run / ".model-new", "new")
        died = _dies(lambda fresh=fresh, final=final: replace_folder(fresh, final), n)
        gone += not final.exists()
        heal_folder(final)
        seen.append(content(final))
        assert seen[-1] in (OLD, NEW)
        if not died:
            break
        shutil.rmtree(run / ".model-new", ignore_errors=True)  # as who writes a new one does
        replace_folder(make(run / ".model-new", "third"), final)
        assert content(final) == {"a": "third", "b": "third"}
        assert [entry.name for entry in run.iterdir()] == ["model"]
        shutil.rmtree(run)
    assert seen[-1] == NEW
    assert OLD in seen
    assert seen[:-1].count(NEW) > 0
    assert (gone == 0) is exchange  # the exchange never leaves a moment without a model
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["model"]


def test_the_first_one(tmp_path):
    replace_folder(make(tmp_path / "fresh", "new"), tmp_path / "model")
    assert content(tmp_path / "model") == NEW
    heal_folder(tmp_path / "model")
    heal_folder(tmp_path / "nothing")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_run_that_lost_its_model_to_a_kill_finds_it_again(tmp_path):
    recipe = write_recipe(make_world(tmp_path))
    run = tmp_path / "run"
    (make(run / ".model-old", "old") / "config.json").write_text("{}")
    shutil.copy(recipe, run / "config.yaml")
    open_run(run)
    assert content(run / "model") == {**OLD, "config.json": "{}"}
    assert not (run / ".model-old").exists()


class _Unsaved:
    """A model whose disk is full."""

    def save_pretrained(self, folder, model_card_kwargs):
        make(folder, "half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_model(tmp_path):
    make(tmp_path / "model", "old")
    with pytest.raises(CheckpointError, match=r"could not save the model in .*No space left.*--resume"):
        save_model(_Unsaved(), tmp_path, {})
    assert content(tmp_path / "model") == OLD
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_kill_while_the_config_is_written_does_not_end_the_run(tmp_path):
    recipe = read_recipe(str(write_recipe(make_world(tmp_path))))
    for n in range(1, 100):
        folder = tmp_path / "run"
        died = _dies(lambda folder=folder: claim(folder, recipe, resume=True), n)
        claim(folder, recipe, resume=True)
        assert read_recipe(str(folder)) == recipe
        if not died:
            break
        shutil.rmtree(folder)
    assert n > 3
    config = folder / "config.yaml"
    before = config.stat().st_mtime_ns
    claim(folder, recipe, resume=True)  # nor is what stands there ever written again
    assert config.stat().st_mtime_ns == before
