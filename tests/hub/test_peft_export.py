"""An adapter written as peft's folder: its own library loads it beside the base, and computes what the tower does."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

import mmrep
from mmrep.cli import app
from mmrep.config import parse
from mmrep.hub.exports.export import ExportError
from mmrep.hub.start import Start
from mmrep.model import Model, ModelConfig
from tests.hub.peft_folders import adapter, base, theirs
from tests.hub.test_bridges_joint import PICTURES, TEXTS

LORA = {"type": "lora", "rank": 3, "alpha": 5.0}
QUERY = {"target_modules": ["query", "value"]}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return base("bert", tmp_path_factory.mktemp("bert"))


def tower(where, chosen, kind="hf-text", pool="cls", projector="identity", **encoder):
    """The ``model`` part of a recipe, of one tower."""
    name = {"hf-text": "text", "hf-image": "image"}[kind]
    made = {"encoder": {"type": kind, "path": str(where), **encoder}, "pool": pool, "projector": projector}
    return {"dim": 16, "towers": {name: {**made, "adapter": chosen}}, "normalize": False, "temperatures": {}}


def moved(model):
    """With other values in all that trains."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def build(config):
    return moved(Model(parse(ModelConfig, config)))


def hidden(where, folder, model):
    encoder = model.tower("text").encoder
    inputs = encoder.collate([encoder.prepare(text) for text in TEXTS])
    out = theirs(where, folder, {"input_ids": inputs["ids"], "attention_mask": inputs["valid"].long()})
    return out.last_hidden_state[:, 0]


@pytest.mark.parametrize(
    "chosen",
    [LORA, {**LORA, "dora": True, "also": ["*LayerNorm*"]}, {**LORA, "targets": ["*.query", "*word_embeddings"]},
     {"type": "ia3", "also": ["*embeddings.LayerNorm*"]}],
    ids=["lora", "dora", "embeddings", "ia3"],
)  # fmt: skip
def test_peft_reads_a_text_tower(chosen, bert, tmp_path):
    model = build(tower(bert, chosen))
    found = model.encode(TEXTS)
    model.save_pretrained(tmp_path / "model")
    folder = mmrep.load(tmp_path / "model").export("peft", tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(bert)
    assert (said["task_type"], said["inference_mode"]) == ("FEATURE_EXTRACTION", True)
    np.testing.assert_allclose(hidden(bert, folder, model), found, atol=2e-6)
    np.testing.assert_allclose(mmrep.load(folder, pool="cls").encode(TEXTS), found, atol=2e-6)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_peft_reads_an_image_tower(kind, tmp_path):
    where = base(kind, tmp_path / "base")
    pool = "cls" if kind == "vit" else "native"
    config = tower(where, {**LORA, "targets": ["*q_proj"]}, "hf-image", pool)
    model = build(config if kind == "vit" else {**config, "dim": 12})
    folder = model.export("peft", tmp_path / "out")
    inputs = dict(transformers.AutoImageProcessor.from_pretrained(where)(PICTURES, return_tensors="pt"))
    if kind == "clip":
        out = theirs(where, folder, {**inputs, "input_ids": torch.tensor([[1, 59]])}).image_embeds
        wanted = torch.nn.functional.normalize(torch.from_numpy(model.encode(PICTURES)), dim=1)
    else:
        out, wanted = theirs(where, folder, inputs).last_hidden_state[:, 0], torch.from_numpy(model.encode(PICTURES))
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-5)


def test_what_was_pefts_goes_out_as_it_came_in(bert, tmp_path):
    fields = {**QUERY, "modules_to_save": ["embeddings.LayerNorm"], "bias": "lora_only", "use_rslora": True}
    first = adapter(bert, tmp_path / "first", **fields, rank_pattern={"query": 2})
    model = mmrep.load(first)
    before = model.export("peft", tmp_path / "same")
    name = "adapter_model.safetensors"
    from safetensors.torch import load_file

    a, b = load_file(first / name), load_file(before / name)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    moved(model.train())
    folder = model.export("peft", tmp_path / "out")
    found = mmrep.load(folder).encode(TEXTS)
    np.testing.assert_array_equal(found, model.encode(TEXTS))
    assert np.abs(found - mmrep.load(first).encode(TEXTS)).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"chosen": None}, "it has no adapter kept apart"),
        ({"projector": "mlp"}, "no place for the projector 'mlp'"),
        ({"chosen": {"type": "representation-tokens", "begin": 1}}, "its adapter 'representation-tokens' is none of"),
    ],
)
def test_what_has_no_place_is_refused_and_nothing_is_left(fields, words, bert, tmp_path):
    model = build(tower(bert, **{"chosen": LORA, **fields}))
    with pytest.raises(ExportError, match=words):
        model.export("peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"chosen": {**LORA, "also": ["*position_embeddings*", "*.0.attention.self.key.bias"], "targets": ["*.query"]}},
        {"chosen": {**LORA, "also": ["*word_embeddings*"]}, "pool": "attention"},
    ],
    ids=["a bias alone", "another pool"],
)
def test_parts_of_modules_and_any_pool_have_a_place(fields, bert, tmp_path):
    model = build(tower(bert, **fields))
    model.export("peft", tmp_path / "out")
    adapted = mmrep.load(tmp_path / "out").tower("text").encoder
    inputs = adapted.collate([adapted.prepare(text) for text in TEXTS])
    wanted, found = (encoder(inputs).tokens.values for encoder in (model.tower("text").encoder.eval(), adapted))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_an_encoder_of_another_library_and_several_towers_are_refused(bert, tmp_path):
    vit = {"type": "image-vit", "size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2}
    config = tower(bert, LORA)
    config["towers"]["image"] = {"encoder": vit, "adapter": LORA}
    model = build(config)
    with pytest.raises(ExportError, match="is one tower; choose one with tower=: text, image"):
        model.export("peft", tmp_path / "out")
    with pytest.raises(ExportError, match="its network is not one of transformers"):
        model.export("peft", tmp_path / "out", tower="image")
    with pytest.raises(ExportError, match="base='x': what hf writes is a whole"):
        model.export("hf", tmp_path / "out", tower="text", base="x")
    assert model.export("peft", tmp_path / "out", tower="text").is_dir()


def test_weights_that_are_not_the_bases_are_refused_and_another_copy_is_named(bert, tmp_path):
    copied = shutil.copytree(bert, tmp_path / "copy")
    model = build(tower(copied, LORA))
    shutil.rmtree(copied)
    with pytest.raises(ExportError, match=r"which cannot be read to see that it is: .*base=…"):
        model.export("peft", tmp_path / "out")
    folder = model.export("peft", tmp_path / "out", base=str(bert))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bert)
    with torch.no_grad():
        dict(model.named_parameters())["towers.text.encoder.model.embeddings.word_embeddings.weight"][3, 3] += 1e-3
    with pytest.raises(ExportError, match=r"stands on other weights than those of .*word_embeddings\.weight differ"):
        model.export("peft", tmp_path / "other", base=str(bert))


def test_the_command_writes_it(bert, tmp_path):
    build(tower(bert, LORA)).save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "peft", str(tmp_path / "out"), "--base", str(bert)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert mmrep.load(tmp_path / "out").config.towers["text"].adapter is not None


@pytest.mark.parametrize("chosen", ["the same", None, LORA], ids=["same", "ended", "another"])
def test_a_run_begins_from_it(chosen, bert, tmp_path):
    """With the adapter kept apart; where it ends, or another follows, it is added to the weights first."""
    folder = adapter(bert, tmp_path / "first", **QUERY, modules_to_save=["embeddings.LayerNorm"], use_dora=True)
    before = mmrep.load(folder)
    from mmrep.config import dump
    from mmrep.hub.start import saved_config

    config = saved_config(str(folder))
    if chosen != "the same":
        config["towers"]["text"]["adapter"] = chosen
    parsed = parse(ModelConfig, config)
    model = Model(parsed, files=Start(str(folder), parsed).files())
    Start(str(folder), parsed).fill(model)
    np.testing.assert_allclose(model.eval().encode(TEXTS), before.encode(TEXTS), atol=3e-6)
    assert dump(model.config)["towers"]["text"]["encoder"]["path"] == str(bert)


def test_a_new_one_over_a_saved_model_begins_as_nothing(bert, tmp_path):
    """Copies that train, chosen tokens and norms are again those of the weights that it begins with."""
    saved = moved(mmrep.load(bert))
    saved.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["model"]
    options = {"peft_type": "LORA", **QUERY, "use_dora": True, "modules_to_save": ["embeddings.LayerNorm"],
               "trainable_token_indices": {"word_embeddings": [5, 9]}}  # fmt: skip
    config["towers"]["text"]["adapter"] = {"type": "peft", "options": options}
    parsed = parse(ModelConfig, config)
    start = Start(str(tmp_path / "saved"), parsed)
    model = Model(parsed, files=start.files())
    start.fill(model)
    np.testing.assert_allclose(model.eval().encode(TEXTS), saved.encode(TEXTS), atol=2e-6)
