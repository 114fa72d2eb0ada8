"""Beginning from a saved model: its towers to the bit, new ones beside them, and no run without it where it must be."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import yaml

import mmrep
from mmrep.config import ConfigError, merge
from mmrep.hub.start import Start
from mmrep.model import Model
from mmrep.recipe import read_recipe
from mmrep.run import Run
from tests.modalities.image import image_tiny_hf
from tests.modalities.text import tiny_hf
from tests.world import draw, make_world, write_recipe

SAMPLES = {"image": [draw("red", "disc"), draw("blue", "frame", 1)], "text": ["a red disc", "blue"]}
NEW = {"encoder": {"type": "image-cnn", "size": 16, "widths": [8], "depths": [1], "norm": "group"}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A world, and a run in it with a fusion and a learned sentencepiece tokenizer."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    text = {
        "type": "text-transformer",
        "tokenizer": "sentencepiece",
        "vocab_size": 300,
        "width": 32,
        "depth": 1,
        "heads": 2,
    }
    data = yaml.safe_load(write_recipe(folder).read_text())
    data["model"]["towers"]["text"]["encoder"] = text
    data["model"]["fusions"] = {"both": {"of": {"image": "image", "caption": "text"}, "by": {"type": "gated"}}}
    data["objectives"][0]["pairs"].append({"between": ["both", "caption"]})
    data["train"]["steps"] = 8
    (folder / "first.yaml").write_text(yaml.safe_dump(data))
    Run(read_recipe(str(folder / "first.yaml")), folder / "first").train()
    return folder


def second(folder, **changes):
    """A recipe that adds a tower `sketch` to the first run's model and says nothing of the old towers but `frozen`."""
    data = yaml.safe_load((folder / "first.yaml").read_text())
    old = {"image": {"frozen": "tower"}, "text": {"frozen": "tower"}}
    data |= {
        "start": str(folder / "first"), "model": {"towers": {"sketch": NEW, **old}},
        "objectives": [{"type": "contrastive", "pairs": [{"between": ["image", "caption"]}]}],
    } | changes  # fmt: skip
    data["data"]["fields"] = {"image": "sketch", "caption": "text"}
    path = folder / "second.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_old_towers_stay_what_they_are_to_the_bit_and_the_new_one_learns(trained, tmp_path):
    before = mmrep.load(trained / "first/model")
    recipe = read_recipe(str(second(trained)))
    fresh = Run(recipe).untrained()
    Run(recipe, tmp_path / "run").train()
    after = mmrep.load(tmp_path / "run/model")
    for name, values in SAMPLES.items():
        np.testing.assert_array_equal(after.encode(values, name), before.encode(values, name))
    np.testing.assert_array_equal(
        after.encode({"image": SAMPLES["image"], "caption": [None, "blue"]}, fusion="both"),
        before.encode({"image": SAMPLES["image"], "caption": [None, "blue"]}, fusion="both"),
    )
    assert (after.encode(SAMPLES["image"], "sketch") != fresh.encode(SAMPLES["image"], "sketch")).any()
    assert torch.equal(fresh.temperature("default").log_scale, before.temperature("default").log_scale)


def test_a_tower_that_is_not_frozen_begins_with_the_saved_weights_and_trains(trained, tmp_path):
    model = {"towers": {"sketch": NEW, "image": {"frozen": "tower"}}}
    recipe = read_recipe(str(second(trained, model=model)))
    before, fresh = mmrep.load(trained / "first/model"), Run(recipe).untrained()
    np.testing.assert_array_equal(fresh.encode(SAMPLES["text"], "text"), before.encode(SAMPLES["text"], "text"))
    Run(recipe, tmp_path / "run").train()
    after = mmrep.load(tmp_path / "run/model")
    np.testing.assert_array_equal(after.encode(SAMPLES["image"], "image"), before.encode(SAMPLES["image"], "image"))
    assert (after.encode(SAMPLES["text"], "text") != before.encode(SAMPLES["text"], "text")).any()


def test_the_run_is_opened_without_the_model_that_it_started_from(trained, tmp_path):
    copied = shutil.copytree(trained, tmp_path / "copy")
    path = second(copied, data=yaml.safe_load(second(trained).read_text())["data"])
    Run(read_recipe(str(path)), tmp_path / "run").train()
    shutil.rmtree(copied / "first")
    again = mmrep.open_run(tmp_path / "run")
    assert again.evaluate(["knn"])["knn"]["rows"]
    with pytest.raises(ConfigError, match=r"start: there is no folder"):  # only who asks for the untrained one needs it
        again.evaluate(["retrieval"])
    with pytest.raises(ConfigError, match=r"start: there is no folder"):
        read_recipe(str(path))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"dim": 8}, r"model\.dim: 8, but .* has 16"),
        (
            {"towers": {"image": {"encoder": {"type": "image-vit"}}}},
            r"model\.towers\.image\.encoder: differs from that of",
        ),
        ({"towers": {"image": {"pool": "attention"}}}, r"model\.towers\.image\.pool: differs"),
    ],
)
def test_another_architecture_is_refused_before_anything_is_written(trained, tmp_path, model, words):
    run = Run(read_recipe(str(second(trained, model=merge({"towers": {"sketch": NEW}}, model)))), tmp_path / "run")
    with pytest.raises(ConfigError, match=words):
        run.train()
    assert not (tmp_path / "run").exists()


def test_what_is_no_saved_model_is_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"start: .*no config\.json"):
        read_recipe(str(second(trained, start=str(tmp_path))))


def test_a_run_begins_from_another_librarys_checkpoint(trained, tmp_path):
    """A CLIP of transformers: both towers, their projections and the scale; then it trains and saves like any model."""
    model, _ = image_tiny_hf.save("clip", tmp_path / "clip")
    _, tokenizer = tiny_hf.make("clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    model.save_pretrained(tmp_path / "clip")
    path = second(trained, start=str(tmp_path / "clip"), model={"towers": {"text": {"frozen": True}}})
    data = yaml.safe_load(path.read_text())
    data["data"]["fields"] = {"image": "image", "caption": "text"}
    path.write_text(yaml.safe_dump(data))
    recipe = read_recipe(str(path), ["train.steps=2"])
    before, untrained = mmrep.load(tmp_path / "clip"), Run(recipe).untrained()
    assert untrained.temperature("default").log_scale.item() == 1.5
    texts = ["w1 w2", "w3"]
    for name, values in {"image": SAMPLES["image"], "text": texts}.items():
        np.testing.assert_array_equal(untrained.encode(values, name), before.encode(values, name))
    Run(recipe, tmp_path / "run").train()
    shutil.rmtree(tmp_path / "clip")
    after = mmrep.load(tmp_path / "run/model")
    np.testing.assert_array_equal(after.encode(texts, "text"), before.encode(texts, "text"))
    assert (after.encode(SAMPLES["image"], "image") != before.encode(SAMPLES["image"], "image")).any()


def test_a_start_that_is_no_checkpoint_says_why(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"start: .*holds no model weights"):
        read_recipe(str(second(trained, start=str(tmp_path / "empty"))))


def test_an_adapter_is_added_in_one_run_and_ends_in_the_next(trained, tmp_path):
    data = yaml.safe_load((trained / "first.yaml").read_text())
    short = {**data["train"], "steps": 2}
    added = {**data, "start": str(trained / "first"), "train": short, "evaluations": {}, "model": {
        "towers": {"text": {"adapter": {"type": "lora", "rank": 2}}, "image": {"frozen": "tower"}}}}  # fmt: skip
    Run(read_recipe(added), tmp_path / "added").train()
    model = mmrep.load(tmp_path / "added/model")
    assert model.config.towers["text"].adapter is not None
    before = mmrep.load(trained / "first/model")
    np.testing.assert_array_equal(model.encode(SAMPLES["image"], "image"), before.encode(SAMPLES["image"], "image"))
    assert (model.encode(SAMPLES["text"], "text") != before.encode(SAMPLES["text"], "text")).any()
    ended = {**added, "start": str(tmp_path / "added"), "model": {"towers": {"text": {"adapter": None}}}}
    fresh = Run(read_recipe(ended)).untrained()
    assert fresh.state_dict().keys() == before.state_dict().keys()
    np.testing.assert_allclose(fresh.encode(SAMPLES["text"], "text"), model.encode(SAMPLES["text"], "text"), atol=2e-6)


def test_a_run_begins_from_the_encoder_that_a_new_one_stands_around(trained, tmp_path):
    """CoOp on a saved joint model: the encoder within to the bit, the context as its words are in the saved table."""
    data = yaml.safe_load((trained / "first.yaml").read_text())
    old = mmrep.load(trained / "first" / "model")
    data |= {
        "start": str(trained / "first"),
        "objectives": [{"type": "contrastive", "pairs": [{"between": ["image", "caption"]}]}],
    }  # fmt: skip
    inner = data["model"]["towers"]["text"]["encoder"]
    data["model"] = {"fusions": {}, "towers": {"text": {
        "encoder": {"type": "prompt-tuned-text", "encoder": inner, "context": "a"},
        "frozen": ["encoder.inner.*", "projector.*"],
    }}}  # fmt: skip
    path = trained / "third.yaml"
    path.write_text(yaml.safe_dump(data))
    theirs = old.tower("text")
    wanted = theirs.encoder.embedding.weight[theirs.encoder.pieces("a")]
    recipe = read_recipe(str(path))
    start = Start(recipe.start, recipe.model)
    fresh = Model(recipe.model, files=start.files())
    start.fill(fresh)
    assert torch.equal(fresh.tower("text").encoder.learned, wanted)
    Run(recipe, tmp_path / "run").train()
    mine = mmrep.load(tmp_path / "run" / "model").tower("text")
    state = mine.encoder.inner.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.encoder.state_dict().items())
    assert torch.equal(mine.projector.map.weight, theirs.projector.map.weight)
    assert not torch.equal(mine.encoder.learned, wanted)
