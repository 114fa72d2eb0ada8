"""Folders of peft: what is loaded computes what peft's own model does, and what cannot be is refused with the fix."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

import mmrep
from mmrep.hub.exports.export import ExportError
from mmrep.hub.fetch import ModelFolderError
from tests.hub.peft_folders import adapter, base, theirs
from tests.hub.test_bridges_joint import PICTURES, TEXTS

QUERY = {"target_modules": ["query", "value"]}
TEXT = {
    "lora": ("bert", QUERY),
    "dora": ("bert", {**QUERY, "use_dora": True}),
    "rslora": ("bert", {**QUERY, "use_rslora": True}),
    "all linear layers, those of a pooling that is not read among them": ("bert", {"target_modules": "all-linear"}),
    "modules that train whole": ("bert", {**QUERY, "modules_to_save": ["embeddings.LayerNorm"]}),
    "ranks": ("bert", {"target_modules": ["query", "intermediate.dense"], "rank_pattern": {"query": 2},
                       "alpha_pattern": {"layer.1.attention.self.query": 31}}),
    "biases": ("bert", {**QUERY, "bias": "all"}),
    "biases of its layers": ("bert", {**QUERY, "bias": "lora_only"}),
    "one layer": ("bert", {**QUERY, "layers_to_transform": [1], "layers_pattern": "layer"}),
    "the first layer": ("bert", {**QUERY, "layers_to_transform": 0, "layers_pattern": "layer"}),
    "an expression": ("bert", {"target_modules": r"encoder\.layer\.0\..*dense"}),
    "some tokens": ("bert", {**QUERY, "trainable_token_indices": {"word_embeddings": [5, 9]}}),
    "embeddings": ("bert", {"target_modules": ["word_embeddings", "value"]}),
    "pissa": ("bert", {**QUERY, "init_lora_weights": "pissa"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "decoder": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "half a model": ("t5", {"target_modules": ["q", "wo"]}),
    "ia3": ("bert", {"peft_type": "IA3", "target_modules": ["key", "output.dense"],
                     "feedforward_modules": ["output.dense"]}),
    "loha": ("bert", {"peft_type": "LOHA", **QUERY}),
    "lokr": ("bert", {"peft_type": "LOKR", **QUERY}),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """``bases("bert")``: its folder."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = base(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


@pytest.mark.parametrize("case", TEXT)
def test_a_text_model_is_pefts_own(case, bases, tmp_path):
    kind, fields = TEXT[case]
    where = bases(kind)
    folder = adapter(where, tmp_path / "adapter", **fields)
    model = mmrep.load(folder)
    encoder = model.tower("text").encoder
    inputs = encoder.collate([encoder.prepare(text) for text in TEXTS])
    mask = inputs["valid"]
    said = {"input_ids": inputs["ids"], "attention_mask": mask.long()}
    if kind == "t5":
        said["decoder_input_ids"] = inputs["ids"][:, :1]
    out = theirs(where, folder, said)
    hidden = out.encoder_last_hidden_state if kind == "t5" else out.last_hidden_state
    with torch.no_grad():
        found = model.tower("text").encoder(inputs).tokens.values
    torch.testing.assert_close(found[mask], hidden[mask], rtol=1e-5, atol=2e-6)
    plain = mmrep.load(where)
    ours = model.encode(TEXTS)
    assert np.abs(ours - plain.encode(TEXTS)).max() > 1e-3, "the adapter does something"
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(folder)
    np.testing.assert_array_equal(mmrep.load(tmp_path / "saved").encode(TEXTS), ours)
    merged = model.merged()
    assert merged.state_dict().keys() == plain.state_dict().keys(), "nothing of peft is left in it"
    np.testing.assert_allclose(merged.encode(TEXTS), ours, atol=5e-6)


@torch.no_grad()
def pictures(where, folder, cls="AutoModel"):
    processor = transformers.AutoImageProcessor.from_pretrained(where)
    return theirs(where, folder, dict(processor(PICTURES, return_tensors="pt")), cls)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("vit", {"target_modules": "all-linear"}),
        ("vit", {"target_modules": ["q_proj", "fc2"], "use_dora": True, "modules_to_save": ["layernorm"]}),
        ("dinov2", {"target_modules": ["query", "projection"], "bias": "all"}),
    ],
    ids=["vit", "dora", "convolution"],
)
def test_an_image_model_is_pefts_own(kind, fields, bases, tmp_path):
    where = bases(kind)
    folder = adapter(where, tmp_path / "adapter", **{**fields, "task_type": None})
    model = mmrep.load(folder, pool="cls")
    found, wanted = model.encode(PICTURES), pictures(where, folder).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.abs(found - mmrep.load(where, pool="cls").encode(PICTURES)).max() > 1e-2
    np.testing.assert_allclose(model.merged().encode(PICTURES), found, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "targets"), [("clip", "both"), ("clip", "text"), ("siglip", "image"), ("siglip", "both")]
)
def test_an_adapter_of_a_joint_model_is_put_into_its_towers(kind, targets, bases, tmp_path):
    where = bases(kind)
    chosen = {"both": "all-linear", "text": r"text_model\..*(q_proj|fc1)", "image": r"vision_model\..*(v_proj|fc2)"}
    folder = adapter(where, tmp_path / "adapter", target_modules=chosen[targets], task_type=None)
    model, plain = mmrep.load(folder), mmrep.load(where)
    encoder = model.tower("text").encoder
    inputs = encoder.collate([encoder.prepare(text) for text in TEXTS])
    said = {"input_ids": inputs["ids"]} | ({} if kind == "siglip" else {"attention_mask": inputs["valid"].long()})
    processor = transformers.AutoImageProcessor.from_pretrained(where)
    out = theirs(where, folder, {**said, **processor(PICTURES, return_tensors="pt")})
    for name, raws, wanted in (("text", TEXTS, out.text_embeds), ("image", PICTURES, out.image_embeds)):
        found = model.encode(raws, name)
        np.testing.assert_allclose(found, F.normalize(wanted, dim=1), atol=2e-5)
        assert (np.abs(found - plain.encode(raws, name)).max() > 1e-3) == (targets in ("both", name))
        assert (model.config.towers[name].adapter is not None) == (targets in ("both", name))


@pytest.fixture
def simple(bases, tmp_path):
    return adapter(bases("bert"), tmp_path / "adapter", **QUERY)


def said(folder, **fields):
    """The folder's config with other fields."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def test_an_adapter_of_a_model_with_a_head_is_read_without_it(bases, tmp_path):
    where = bases("bert")
    head = transformers.AutoModelForSequenceClassification.from_pretrained(where, num_labels=3)
    folder = adapter(where, tmp_path / "adapter", head, **QUERY, task_type="SEQ_CLS")
    model = mmrep.load(folder, pool="cls")
    network = transformers.AutoModelForSequenceClassification.from_pretrained(where, num_labels=3)
    import peft

    whole = peft.PeftModel.from_pretrained(network, str(folder)).eval()
    encoder = model.tower("text").encoder
    inputs = encoder.collate([encoder.prepare(text) for text in TEXTS])
    with torch.no_grad():
        wanted = whole.base_model.model.bert(inputs["ids"], inputs["valid"].long()).last_hidden_state[:, 0]
    np.testing.assert_allclose(model.encode(TEXTS), wanted, atol=2e-6)
    with pytest.raises(ExportError, match="made for a model with a head"):
        model.export("peft", tmp_path / "out")


def test_what_sentence_transformers_says_beside_the_adapter_is_kept(bases, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    made = SentenceTransformer(modules=[Transformer(str(bases("bert"))), Pooling(16, "cls"), Normalize()], device="cpu")
    import peft

    made.add_adapter(peft.LoraConfig(**QUERY, init_lora_weights=False))
    made.save_pretrained(str(tmp_path / "st"))
    assert not list((tmp_path / "st").rglob("model*.safetensors"))
    found = mmrep.load(tmp_path / "st").encode(TEXTS)
    np.testing.assert_allclose(found, made.eval().encode(TEXTS), atol=2e-6)
    theirs = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    np.testing.assert_allclose(found, theirs.encode(TEXTS), atol=2e-6)


def test_another_copy_of_the_base_is_named(simple, bases, tmp_path):
    wanted = mmrep.load(simple).encode(TEXTS)
    copied = shutil.copytree(bases("bert"), tmp_path / "copy")
    folder = said(simple, base_model_name_or_path="/there/is/none", revision="v1")
    with pytest.raises(ModelFolderError, match=r"adapter for '/there/is/none' at revision 'v1', which cannot .*base=…"):
        mmrep.load(folder)
    np.testing.assert_array_equal(mmrep.load(folder, base=str(copied)).encode(TEXTS), wanted)
    said(simple, base_model_name_or_path=None)
    with pytest.raises(ModelFolderError, match=r"does not say what it is an adapter for .* base=…"):
        mmrep.load(folder)
    with pytest.raises(ModelFolderError, match=r"base='x': .* is no adapter of peft"):
        mmrep.load(bases("bert"), base="x")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "of type PREFIX_TUNING: learned vectors .* prompt-tuned-text"),
        ({"peft_type": "PROMPT_TUNING"}, "of type PROMPT_TUNING: learned vectors"),
        ({"peft_type": "VERA"}, "of type 'VERA'; read are LORA, IA3.*merge_and_unload"),
        ({"init_lora_weights": "corda"}, "init_lora_weights: 'corda', which begins from other weights"),
        ({"megatron_config": {"a": 1}}, "it says megatron_config: {'a': 1}, which is not read"),
        ({"r": 3}, "do not fit"),
        ({"target_modules": ["query"]}, r"do not fit its options: too many encoder\.layer\.0\.attention\.self\.value"),
        ({"target_modules": ["query", "value", "key"]}, r"missing encoder\.layer\.0\.attention\.self\.key\.lora_A"),
        ({"target_modules": ["quary"]}, r"peft cannot put it into HFText: .*quary"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_read_is_refused_with_the_reason(fields, words, simple):
    with pytest.raises(ModelFolderError, match=words):
        mmrep.load(said(simple, **fields))


def test_no_code_that_a_folder_names_is_imported(simple, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    assert len(mmrep.load(said(simple, auto_mapping=mapping, megatron_core="evil")).encode(TEXTS)) == len(TEXTS)


def test_pickles_and_damaged_files_and_another_model_are_refused(simple, bases, tmp_path):
    said(simple, base_model_name_or_path=str(bases("llama")))
    with pytest.raises(ModelFolderError, match=r"LlamaModel of '.*' does not have .* base=…"):
        mmrep.load(simple)
    said(simple, base_model_name_or_path=str(bases("bert")))
    weights = simple / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ModelFolderError, match="is damaged or was cut short"):
        mmrep.load(simple)
    weights.rename(simple / "adapter_model.bin")
    with pytest.raises(ModelFolderError, match=r"no adapter_model\.safetensors, only adapter_model\.bin: .* pickle"):
        mmrep.load(simple)


def test_a_model_that_is_none_of_transformers_is_no_base(simple, bases, tmp_path):
    mmrep.load(bases("bert")).save_pretrained(tmp_path / "ours")
    with pytest.raises(ModelFolderError, match=r"no model that transformers' AutoModel builds.*a model of ours"):
        mmrep.load(simple, base=str(tmp_path / "ours"))


def test_a_base_of_a_name_without_an_organisation_is_asked_of_the_hub(simple, monkeypatch):
    def fetch(name, **hub):
        raise ModelFolderError(f"asked for {name}: {hub}")

    monkeypatch.setattr("mmrep.hub.load.fetch", fetch)
    with pytest.raises(ModelFolderError, match=r"asked for bert-base-uncased: .*'token': 'hf_a'"):
        mmrep.load(said(simple, base_model_name_or_path="bert-base-uncased"), token="hf_a")
