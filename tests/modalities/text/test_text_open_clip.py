"""open_clip text towers equal open_clip's own encode_text, padded or not, and are rebuilt from their files alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_hf import tokenizer

from mmrep.config import component
from mmrep.heads import EosPool, LastPool, NativePool
from mmrep.modalities.text.open_clip import OpenClipText
from mmrep.testing import check_encoder

SMALL = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TEXTS = ["a cat", "a dog on the mat " * 10, "b", "it says <end_of_text> here"]
MODELS: dict[str, dict[str, Any]] = {
    "mmrep-test-clip": {"embed_dim": 32, "text_cfg": SMALL},
    "mmrep-test-narrow": {"embed_dim": 24, "text_cfg": SMALL},
    "mmrep-test-quick": {"embed_dim": 32, "text_cfg": SMALL, "quick_gelu": True},
    "mmrep-test-plain": {"embed_dim": 32, "text_cfg": {**SMALL, "proj_type": "none"}},
    "mmrep-test-eos": {"embed_dim": 32, "text_cfg": {**SMALL, "pool_type": "eos", "eos_id": 49407}},
    "mmrep-test-bothways": {
        "embed_dim": 32, "custom_text": True,
        "text_cfg": {**SMALL, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
}  # fmt: skip
VISION = {"layers": 1, "width": 64, "image_size": 8, "patch_size": 8}


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("models")
    refused = {
        "mmrep-test-hf": {"embed_dim": 8, "text_cfg": {"hf_model_name": "bert-tiny"}},
        "mmrep-test-coca": {"embed_dim": 8, "text_cfg": {**SMALL, "embed_cls": True}},
    }
    for name, fields in {**MODELS, **refused}.items():
        (folder / f"{name}.json").write_text(json.dumps({"vision_cfg": VISION, **fields}))
    open_clip.add_model_config(folder)
    from open_clip import factory

    before = list(factory._MODEL_CONFIG_PATHS[:-1])
    yield
    factory._MODEL_CONFIG_PATHS[:] = before
    for name in [n for n in factory._MODEL_CONFIGS if n.startswith("mmrep-test-")]:
        del factory._MODEL_CONFIGS[name]


def pair(name: str, folder: Path, **fields: Any) -> tuple[Any, OpenClipText]:
    """open_clip's model with random weights, and our encoder from those weights."""
    torch.manual_seed(0)
    full = open_clip.create_model(name).eval()
    for parameter in full.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = folder / "weights.safetensors"
    save_file({key: value.clone() for key, value in full.state_dict().items()}, path)
    return full, component("encoders", "open-clip-text", model=name, pretrained=str(path), **fields).build().eval()


def run(encoder: OpenClipText, texts: list[str]) -> Any:
    with torch.no_grad():
        return encoder(encoder.collate([encoder.prepare(text) for text in texts]))


@pytest.mark.parametrize("name", MODELS)
def test_native_pool_equals_encode_text(name: str, tmp_path: Path) -> None:
    full, encoder = pair(name, tmp_path)
    texts = TEXTS if name != "mmrep-test-eos" else TEXTS[:3]  # its search takes the first end token, a spelled one too
    with torch.no_grad():
        expected = full.encode_text(open_clip.get_tokenizer(name)(texts))
    got = NativePool(NativePool.Config(), encoder.width)(run(encoder, texts))
    if name not in ("mmrep-test-bothways", "mmrep-test-eos"):  # argmax, too, takes the first of several end tokens
        got, expected = got[:3], expected[:3]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    other = LastPool if name == "mmrep-test-bothways" else EosPool
    torch.testing.assert_close(
        other(other.Config(), encoder.width)(run(encoder, texts))[:3], expected[:3], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["mmrep-test-clip", "mmrep-test-narrow", "mmrep-test-bothways"])
def test_contract(name: str, tmp_path: Path) -> None:
    check_encoder(pair(name, tmp_path)[1])


def test_trap_a_truncation_keeps_the_end_token(tmp_path: Path) -> None:
    _, encoder = pair("mmrep-test-clip", tmp_path)
    item = encoder.prepare("a dog " * 40)
    assert len(item["ids"]) == 16
    assert item["ids"][-1] == encoder.tokenizer.eot_token_id
    assert item["special"].tolist() == [True] + [False] * 14 + [True]


def test_trap_b_and_c_an_end_token_spelled_out_in_the_text_is_not_taken_for_the_end(tmp_path: Path) -> None:
    _, encoder = pair("mmrep-test-clip", tmp_path)
    item = encoder.prepare(TEXTS[3])
    assert item["ids"].tolist().count(encoder.tokenizer.eot_token_id) == 2
    out = run(encoder, [TEXTS[3]])
    torch.testing.assert_close(out.pooled[0], out.tokens.values[0, -1])


def test_trap_e_towers_that_read_their_padding_get_it_in_full(tmp_path: Path) -> None:
    _, siglip = pair("mmrep-test-bothways", tmp_path)
    batch = siglip.collate([siglip.prepare("b")])
    assert batch["ids"].shape == (1, 16)
    assert batch["valid"].all()
    _, clip = pair("mmrep-test-clip", tmp_path)
    assert clip.collate([clip.prepare("b")])["ids"].shape == (1, 3)


@pytest.mark.parametrize("name", ["mmrep-test-narrow", "mmrep-test-quick", "mmrep-test-bothways"])
def test_files_rebuild_the_encoder_without_the_model_name(name: str, tmp_path: Path) -> None:
    _, encoder = pair(name, tmp_path)
    files = tmp_path / "files"
    files.mkdir()
    encoder.save_files(files)
    config = OpenClipText.Config(model="no-such-model", pretrained="no-such-tag")
    again = OpenClipText(config, files=files).eval()
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(run(again, TEXTS).pooled, run(encoder, TEXTS).pooled)


def test_a_hugging_face_tokenizer_is_saved_with_the_tower(tmp_path: Path) -> None:
    """As SigLIP models have: the tokenizer lies elsewhere, and texts are padded to full length."""
    words = tmp_path / "words"
    tokenizer("end", pad_token="</s>").save_pretrained(words)
    text_cfg = {**MODELS["mmrep-test-bothways"]["text_cfg"], "vocab_size": 60, "hf_tokenizer_name": str(words)}
    (tmp_path / "mmrep-test-words.json").write_text(
        json.dumps({"vision_cfg": VISION, "embed_dim": 32, "custom_text": True, "text_cfg": text_cfg})
    )
    open_clip.add_model_config(tmp_path / "mmrep-test-words.json")
    texts = ["w1 w2", "w3 " * 30]
    full, encoder = pair("mmrep-test-words", tmp_path)
    with torch.no_grad():
        expected = full.encode_text(open_clip.get_tokenizer("mmrep-test-words")(texts))
    torch.testing.assert_close(run(encoder, texts).pooled, expected, rtol=1e-4, atol=1e-5)
    files = tmp_path / "files"
    files.mkdir()
    encoder.save_files(files)
    shutil.rmtree(words)
    again = OpenClipText(encoder.config, files=files).eval()
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(run(again, texts).pooled, expected, rtol=1e-4, atol=1e-5)


def test_layers_are_the_blocks_outputs_before_the_final_norm(tmp_path: Path) -> None:
    full, encoder = pair("mmrep-test-plain", tmp_path)
    tokens = encoder.tokenize(encoder.collate([encoder.prepare("a cat")]))
    out = encoder.encode(tokens, layers=(2, 1))
    torch.testing.assert_close(full.ln_final(out.layers[0]), out.tokens.values)
    mask = full.attn_mask[:4, :4]
    torch.testing.assert_close(out.layers[1], full.transformer.resblocks[0](tokens.values, attn_mask=mask))


def test_without_projection_the_width_is_the_towers_own(tmp_path: Path) -> None:
    _, projected = pair("mmrep-test-narrow", tmp_path)
    _, plain = pair("mmrep-test-narrow", tmp_path, projection=False)
    assert (projected.width, plain.width) == (24, 32)
    assert "layers" in plain.supports - projected.supports
    assert not any("projection" in name for name, _ in plain.named_parameters())


def test_only_the_text_tower_is_kept_and_random_without_pretrained() -> None:
    torch.manual_seed(1)
    one = component("encoders", "open-clip-text", model="mmrep-test-clip").build()
    two = component("encoders", "open-clip-text", model="mmrep-test-clip").build()
    assert not any("visual" in name for name in one.state_dict())
    assert not torch.equal(one.text.token_embedding.weight, two.text.token_embedding.weight)


def test_the_activation_of_the_models_name_holds_without_pretrained_weights_too() -> None:
    for name, activation in (("mmrep-test-clip", "GELU"), ("mmrep-test-quick", "QuickGELU")):
        encoder = component("encoders", "open-clip-text", model=name).build()
        assert type(encoder.text.transformer.resblocks[0].mlp.gelu).__name__ == activation


def test_a_tag_with_another_activation_sets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ViT-B-32` with tag `openai` needs QuickGELU, which the name alone does not say; open_clip only warns."""
    full, _ = pair("mmrep-test-quick", tmp_path)
    from open_clip import factory

    tag = {"quick_gelu": True}
    for module in (open_clip, factory):
        monkeypatch.setattr(module, "get_pretrained_cfg", lambda *_: tag)
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: str(tmp_path / "weights.safetensors"))
    encoder = component("encoders", "open-clip-text", model="mmrep-test-clip", pretrained="openai").build().eval()
    with torch.no_grad():
        expected = full.encode_text(open_clip.get_tokenizer("mmrep-test-quick")(TEXTS[:3]))
    torch.testing.assert_close(run(encoder, TEXTS[:3]).pooled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("fields", "message"), [
    ({"model": "ViT-B-23"}, r"'ViT-B-23' is unknown to open_clip; did you mean 'ViT-B-32"),
    ({"model": "mmrep-test-hf"}, r"'bert-tiny' of Hugging Face as its text tower: use encoder \{type: hf-text"),
    ({"model": "mmrep-test-coca"}, "is a CoCa model"),
    ({"model": "ViT-B-32", "pretrained": "openia"}, r"neither a file nor a tag of 'ViT-B-32'; did you mean 'openai'"),
])  # fmt: skip
def test_names_that_do_not_work_say_why(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        component("encoders", "open-clip-text", **fields).build()


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"not even opened")
    with pytest.raises(ValueError, match="may be a pickle: reading one can run any program"):
        component(
            "encoders", "open-clip-text", model="mmrep-test-clip", pretrained=str(tmp_path / "weights.pt")
        ).build()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    pair("mmrep-test-narrow", tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        component(
            "encoders", "open-clip-text", model="mmrep-test-clip", pretrained=str(tmp_path / "weights.safetensors")
        ).build()
