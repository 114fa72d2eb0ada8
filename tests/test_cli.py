"""The command line: every command on a tiny world, errors for people, exit codes, speed of --help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch import nn

from mmrep import cli, load
from mmrep.recipe import read_recipe
from mmrep.registry import UnknownNameError
from mmrep.run import Run
from tests.world import draw, make_world, write_recipe


@pytest.fixture
def mmrep(monkeypatch, capsys):
    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["mmrep", *map(str, arguments)])
        exit_code = 0
        try:
            cli.main()
        except SystemExit as stop:
            exit_code = stop.code or 0
        out = capsys.readouterr()
        assert exit_code == code, out.out + out.err
        return out.out if code == 0 else out.err

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def run_folder(world):
    out = world / "run"
    done = subprocess.run(
        [sys.executable, "-m", "mmrep", "train", world / "recipe.yaml", "--out", out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "retrieval: 16 queries" in done.stdout
    assert done.stderr.strip() == "", "nothing but results is printed where nobody watches"
    return out


def test_help_is_quick_and_names_every_command(mmrep):
    text = mmrep("--help")
    for command in (
        "train",
        "finetune",
        "merge",
        "sweep",
        "encode",
        "evaluate",
        "index",
        "search",
        "report",
        "list",
        "cp",
        "check",
        "env",
    ):
        assert f"\n  {command} " in text


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['mmrep', '--help']; from mmrep import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'transformers', 'PIL'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_takes_under_half_a_second_of_processor_time():
    def once():
        before = os.times()
        subprocess.run([sys.executable, "-m", "mmrep", "--help"], check=True, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(once() for _ in range(3)) < 0.5


def test_dry_run_shows_config_shapes_and_counts_and_writes_nothing(mmrep, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = mmrep("train", world / "recipe.yaml", "--dry-run", "model.dim=24")
    assert "dim: 24" in text
    assert "pixels [2, 3, 16, 16] → tokens [2, 16, 16] → embedding [2, 24]" in text
    assert "all towers:" in text
    assert list(tmp_path.iterdir()) == []


def test_smoke_runs_a_recipe_quickly(mmrep, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    assert "retrieval" in mmrep("train", world / "recipe.yaml", "--smoke")
    assert time.process_time() - start < 20
    assert (tmp_path / "runs" / "recipe-smoke" / "model" / "config.json").is_file()
    mmrep("train", world / "recipe.yaml", "--smoke")  # a look can be taken again


def test_evaluate_again(mmrep, run_folder):
    assert "retrieval" in mmrep("evaluate", run_folder, "retrieval")
    assert "did you mean 'retrieval'" in mmrep("evaluate", run_folder, "retreival", code=2)


def test_evaluate_another_model_by_a_recipe(mmrep, world, run_folder, tmp_path):
    """As a merged model, or a checkpoint of the hub, which no run of this recipe has trained."""
    own, by_recipe = (mmrep("evaluate", name, *rest) for name, rest in (
        (run_folder, []), (world / "recipe.yaml", ["--model", run_folder]),
    ))  # fmt: skip
    assert by_recipe == own
    untrained = Run(read_recipe(str(world / "recipe.yaml"))).untrained()
    untrained.temperatures, untrained.config = nn.ModuleDict(), replace(untrained.config, temperatures={})
    untrained.save_pretrained(tmp_path / "untrained")
    said = mmrep("evaluate", run_folder, "--model", tmp_path / "untrained")
    assert "zero-shot" in said
    assert "true_class_probability" in own
    assert "true_class_probability" not in said, "without a temperature there are no probabilities"
    with pytest.raises(UnknownNameError, match="no temperature 'defautl'"):
        untrained.temperature("defautl")
    other = yaml.safe_load((world / "recipe.yaml").read_text())
    other["model"]["towers"]["words"] = other["model"]["towers"].pop("text")
    other["data"]["fields"]["caption"], other["evaluations"] = "words", {}
    (world / "words.yaml").write_text(yaml.safe_dump(other))
    said = mmrep("evaluate", world / "words.yaml", "--model", run_folder, code=2)
    assert "data.fields.caption: this model has no tower or modality 'words'" in said


def test_finetune_is_train(mmrep, world, run_folder, tmp_path):
    changes = [f"start={run_folder}", "model.towers.text.frozen=tower", "train.steps=2"]
    mmrep("finetune", world / "recipe.yaml", *changes, "--out", tmp_path / "tuned")
    start, tuned = (load(folder / "model") for folder in (run_folder, tmp_path / "tuned"))
    assert (start.encode("a red disc", "text") == tuned.encode("a red disc", "text")).all()
    picture = str(world / "red-disc-0.png")
    assert (start.encode(picture, "image") != tuned.encode(picture, "image")).any()


def test_encode_writes_an_array(mmrep, run_folder, tmp_path):
    out = tmp_path / "v.npy"
    mmrep("encode", "a red disc", "a blue bar", "--model", run_folder, "--modality", "text", "--out", out)
    assert np.load(out, allow_pickle=False).shape == (2, 16)


def test_index_a_folder_of_files_and_search_it_by_text_and_by_picture(mmrep, run_folder, tmp_path):
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    for colour, shape in (("red", "disc"), ("blue", "bar"), ("green", "square")):
        draw(colour, shape).save(photos / "deep" / f"{colour} {shape}.png")
    (photos / "notes.txt").write_text("no picture")
    said = mmrep("index", photos, "--model", run_folder)
    assert "3 files" in said
    assert "1 x not an image" in said
    assert "deep/red disc.png" in mmrep("search", photos, "a red disc", "-k", 1)
    assert "deep/blue bar.png" in mmrep("search", photos, photos / "deep" / "blue bar.png", "-k", 1)
    assert "3 files" in mmrep("index", photos, "--model", run_folder), "the index itself is not indexed"


def test_index_a_runs_data_and_search_it(mmrep, run_folder):
    assert "16 x image from test" in mmrep("index", run_folder)
    assert "a red disc" in mmrep("search", run_folder, "a red disc", "-k", 1)


def test_search_in_three_lines_of_python(mmrep, run_folder, tmp_path):
    mmrep("index", run_folder, "--out", tmp_path / "index")
    import mmrep as library

    hits = library.open_search(tmp_path / "index").search("a blue bar", "text", k=2)
    assert hits[0].record["text"] == "a blue bar"
    assert hits[0].score >= hits[1].score


def test_search_refuses_an_index_whose_model_has_changed(mmrep, world, run_folder, tmp_path):
    mmrep("index", run_folder, "--out", tmp_path / "index")
    meta = tmp_path / "index" / "meta.json"
    document = json.loads(meta.read_text())
    document["meta"]["fingerprint"]["image"][0][0] += 0.5
    meta.write_text(json.dumps(document))
    assert "another model" in mmrep("search", tmp_path / "index", "a red disc", code=2)


def test_search_without_an_index_says_how_to_make_one(mmrep, tmp_path):
    assert "mmrep index" in mmrep("search", tmp_path, "x", code=2)


def test_list_and_cp(mmrep, tmp_path):
    assert mmrep("list", "encoders", "*vit").split() == ["image-scale-vit", "image-vit"]
    assert "quickstart" in mmrep("list").split()
    assert "did you mean 'encoders'" in mmrep("list", "encodres", code=2)
    mmrep("cp", "quickstart", tmp_path)
    assert (tmp_path / "quickstart.yaml").read_text().startswith("# ")
    assert "exists already" in mmrep("cp", "quickstart", tmp_path, code=2)


def test_check_an_encoder_a_model_and_a_recipe(mmrep, world, run_folder):
    assert "keeps the contract" in mmrep("check", "image-vit")
    assert "fingerprint belong together" in mmrep("check", run_folder / "model")
    assert "valid" in mmrep("check", world / "recipe.yaml")
    assert "did you mean 'image-vit'" in mmrep("check", "image-vitt", code=2)


def test_check_an_encoder_with_fields_of_its_config(mmrep, world):
    assert "keeps the contract" in mmrep("check", "image-vit", "size=8", "patch=4", "width=16", "depth=1", "heads=2")
    assert "path" in mmrep("check", "hf-image", code=2)
    assert "did you mean 'patch'" in mmrep("check", "image-vit", "pach=4", code=2)
    assert "takes nothing more" in mmrep("check", world / "recipe.yaml", "a=1", code=2)


def test_env_names_versions(mmrep):
    text = mmrep("env")
    assert "torch" in text
    assert "python" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quikstart"], "unknown recipe 'quikstart'; did you mean 'quickstart'"),
        (["train", "quickstart", "train.stesp=3"], "train.stesp: unknown; did you mean 'steps'"),
        (["train", "quickstart", "train.steps"], "path.to.key=value"),
        (["evaluate", "nowhere"], "is no run folder"),
        (["encode", "x", "--model", "./nowhere", "--out", "x.npy"], "there is no folder './nowhere'"),
    ],
)
def test_a_mistake_is_one_readable_message_and_exit_code_2(mmrep, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    said = mmrep(*arguments, code=2)
    assert message in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == [], "a broken config stops before anything is written"


def test_torchrun_starts_the_same_run_on_two_processes(world, tmp_path):
    out = tmp_path / "two"
    # SGD: Adam divides by the gradient's own size, which blows rounding up to the size of a step.
    short = ["train.steps=8", "evaluations={}", "optim.optimizer=sgd", "optim.lr=0.05"]
    command = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "--standalone", "-m", "mmrep",
               "train", world / "recipe.yaml", *short, "--out"]  # fmt: skip
    done = subprocess.run(
        [*map(str, command), str(out)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    alone = tmp_path / "one"
    command = [sys.executable, "-m", "mmrep", "train", world / "recipe.yaml", *short, "--out", alone]
    one = subprocess.run(command, capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    import mmrep as library

    a, b = (library.load(f / "model", check_fingerprint=False).state_dict() for f in (alone, out))
    state = (out / "checkpoints").glob("*/rank-00001*")
    assert list(state), "there was no second process"
    for name in a:
        np.testing.assert_allclose(b[name].numpy(), a[name].numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
