"""What is exported is loaded by the target's own library and gives the same embeddings; what cannot be is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import mmrep
from mmrep.config import component
from mmrep.hub.exports.export import ExportError
from mmrep.model import Model, ModelConfig, TowerConfig
from tests.hub.test_bridges_joint import PICTURES, TEXTS, value
from tests.modalities.image import image_tiny_hf
from tests.modalities.text import tiny_hf


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(0)
    model, tokenizer = tiny_hf.make("bert")
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def text_model(path, *, pool="mean", projector="identity", normalize=True, **encoder):
    torch.manual_seed(1)
    tower = TowerConfig(
        encoder=component("encoders", "hf-text", path=str(path), **encoder), pool=component("pools", pool),
        projector=component("projectors", **({"type": projector} if isinstance(projector, str) else projector)),
    )  # fmt: skip
    return Model(ModelConfig(dim=16 if projector == "identity" else 5, towers={"text": tower}, normalize=normalize))


@pytest.mark.parametrize("pool", ["mean", "cls", "last", "max", "weighted-mean"])
@pytest.mark.parametrize("projector", ["identity", {"type": "linear", "bias": True}, {"type": "dense"}])
def test_sentence_transformers_reads_it(bert, tmp_path, pool, projector):
    from sentence_transformers import SentenceTransformer

    prompts = {"prompts": {"query": "w7 "}, "prompt": "w8 "}
    ours = text_model(bert, pool=pool, projector=projector, normalize=pool != "max", max_length=9, **prompts)
    theirs = SentenceTransformer(str(ours.export("sentence-transformers", tmp_path / "out")), device="cpu")
    texts = [*TEXTS, "w3 " * 30]
    np.testing.assert_allclose(theirs.encode(texts), ours.encode(texts), atol=2e-6)
    np.testing.assert_allclose(theirs.encode(texts, prompt_name="query"), ours.encode_query(texts), atol=2e-6)
    np.testing.assert_allclose(mmrep.load(tmp_path / "out").encode(texts), ours.encode(texts), atol=2e-6)


def test_transformers_reads_a_tower(bert, tmp_path):
    import transformers

    ours = text_model(bert, normalize=False)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    folder = ours.export("hf", tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        hidden = model.eval()(**tokenizer(TEXTS[:1], return_tensors="pt")).last_hidden_state
    np.testing.assert_allclose(hidden.mean(1), ours.encode(TEXTS[:1]), atol=2e-6)


@pytest.mark.parametrize("kind", ["dinov2", "vit"])
def test_transformers_reads_an_image_tower(kind, tmp_path):
    import transformers

    image_tiny_hf.save(kind, tmp_path / "in")
    ours = mmrep.load(tmp_path / "in", pool="cls")
    folder = ours.export("hf", tmp_path / "out")
    model, processor = (c.from_pretrained(folder) for c in (transformers.AutoModel, transformers.AutoImageProcessor))
    with torch.no_grad():
        hidden = model.eval()(**processor(PICTURES, return_tensors="pt")).last_hidden_state[:, 0]
    np.testing.assert_allclose(hidden, ours.encode(PICTURES), atol=2e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_reads_a_joint_model(kind, tmp_path):
    import transformers

    image_tiny_hf.save(kind, tmp_path / "in")
    tiny_hf.make(kind)[1].save_pretrained(tmp_path / "in")
    ours = mmrep.load(tmp_path / "in")
    with torch.no_grad():  # as after training
        for parameter in ours.parameters():
            parameter.mul_(1.05)
    folder = ours.export("hf", tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        found = value(model.get_image_features(**processor(PICTURES, return_tensors="pt")))
    np.testing.assert_allclose(F.normalize(found, dim=1), ours.encode(PICTURES, "image"), atol=2e-5)
    again = mmrep.load(folder)
    np.testing.assert_allclose(again.encode(TEXTS, "text"), ours.encode(TEXTS, "text"), atol=2e-6)
    for mine, his in zip(
        again.temperature("default").parameters(), ours.temperature("default").parameters(), strict=True
    ):
        assert torch.equal(mine, his)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_open_clip_reads_it(sigmoid, tmp_path):
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    (tmp_path / "in").mkdir()
    document = {"model_cfg": config, "preprocess_cfg": preprocess}
    (tmp_path / "in" / "open_clip_config.json").write_text(json.dumps(document))
    made = open_clip.CustomTextCLIP(**json.loads(json.dumps(config)), **({"init_logit_bias": -3.0} if sigmoid else {}))
    save_file({k: v.contiguous() for k, v in made.state_dict().items() if not k.endswith("attn_mask")},
              tmp_path / "in" / "open_clip_model.safetensors")  # fmt: skip
    ours = mmrep.load(tmp_path / "in")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.05)
    folder = ours.export("open_clip", tmp_path / "out")
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    words = ["a cat", "two dogs on a mat"]
    with torch.no_grad():
        pixels = torch.stack([transform(picture) for picture in PICTURES])
        images, texts, *_ = theirs.eval()(pixels, open_clip.get_tokenizer(f"local-dir:{folder}")(words))
    np.testing.assert_allclose(ours.encode(PICTURES, "image"), images, atol=2e-6)
    np.testing.assert_allclose(ours.encode(words, "text"), texts, atol=2e-6)
    assert torch.equal(theirs.logit_scale.detach().reshape(1), ours.temperature("default").log_scale.detach())
    if sigmoid:
        assert torch.equal(theirs.logit_bias.detach().reshape(1), ours.temperature("default").bias.detach())


def test_onnxruntime_runs_it(tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    image = TowerConfig(encoder=component("encoders", "image-vit", size=16, patch=4, width=16, depth=1, heads=2))
    text = TowerConfig(
        encoder=component("encoders", "text-transformer", tokenizer="bytes", width=16, depth=1, heads=2, max_length=20)
    )
    ours = Model(ModelConfig(dim=8, towers={"image": image, "text": text})).eval()
    folder = ours.export("onnx", tmp_path / "out")
    named = json.loads((folder / "inputs.json").read_text())
    assert named["image"] == {"pixels": {"dtype": "uint8", "shape": [None, 3, 16, 16]}}
    assert named["text"]["ids"]["shape"] == [None, None]
    for name, raw in {"image": PICTURES[:2], "text": ["a", "a much longer text"]}.items():
        encoder = ours.tower(name).encoder
        inputs = encoder.collate([encoder.prepare(one) for one in raw])
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {key: inputs[key].numpy() for key in named[name]})
        np.testing.assert_allclose(found, ours.encode(raw, name), atol=2e-6)


def test_a_graph_that_is_wrong_on_another_size_is_refused(tmp_path):
    """Tracing keeps the branch that the example took; a network that branches on the number of samples shows it."""
    encoder = component("encoders", "image-cnn", size=16, widths=[8], depths=[1])
    model = Model(ModelConfig(dim=4, towers={"image": TowerConfig(encoder=encoder)})).eval()
    tower = model.tower("image")
    plain = tower.projector.forward
    tower.projector.forward = lambda features: plain(features) * (2 if len(features) == 5 else 1)
    tower.normalize = False
    with pytest.raises(ExportError, match=r"differ by .* on a batch of another size"):
        model.export("onnx", tmp_path / "out")


def test_what_a_target_cannot_express_is_refused_and_nothing_is_left(bert, tmp_path):
    picture = component("encoders", "image-vit", size=16, patch=4, width=16, depth=1, heads=2)
    towers = {"a": TowerConfig(encoder=component("encoders", "hf-text", path=str(bert)))}
    two = ModelConfig(dim=5, towers={**towers, "image": TowerConfig(encoder=picture)})
    both = Model(two)
    cases = [
        (both, "sentence-transformers", {}, "choose one with tower=: a, image"),
        (both, "sentence-transformers", {"tower": "image"}, "hf-text"),
        (both, "hf", {"tower": "a"}, "no place for the projector 'linear'"),
        (both, "hf", {"tower": "image"}, "not one of transformers"),
        (both, "open_clip", {}, "this has hf-text, image-vit"),
        (text_model(bert, projector="mlp"), "sentence-transformers", {}, "'mlp' is more than one linear map"),
        (text_model(bert, pool="attention"), "sentence-transformers", {}, "no pooling 'attention'"),
    ]
    for model, target, options, message in cases:
        with pytest.raises(ExportError, match=message):
            model.export(target, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(FileExistsError, match="choose another folder"):
        both.export("hf", tmp_path / "full")
    with pytest.raises(LookupError, match="did you mean 'onnx'"):
        both.export("onn", tmp_path / "out")
