"""The text parts of joint models equal transformers' own features, with the projection and without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_hf import JOINT

from mmrep.config import component
from mmrep.heads import ClsPool, EosPool, NativePool
from mmrep.modalities.text.hf import HFText

Folder = Callable[[str], Path]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1 w2"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def build(path: object, **fields: Any) -> HFText:
    return component("encoders", "hf-text", path=str(path), **fields).build().eval()


def run(encoder: HFText, texts: list[str], **options: Any) -> Any:
    with torch.no_grad():
        inputs = encoder.collate([encoder.prepare(text) for text in texts])
        return encoder.encode(encoder.tokenize(inputs), **options) if options else encoder(inputs)


def library(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The whole model and a padded batch."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = words(TEXTS, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    return transformers.AutoModel.from_pretrained(folder).eval().to(dtype), inputs


def features(kind: str, model: Any, inputs: Any) -> torch.Tensor:
    """The library's features; CLAP's are of length 1 there, and its class of the text part has them before that."""
    out = model.get_text_features(**inputs).pooler_output
    if kind != "clap":
        return out
    longer = model.text_projection(model.text_model(**inputs).pooler_output)
    torch.testing.assert_close(torch.nn.functional.normalize(longer, dim=-1), out)
    return longer


@pytest.mark.parametrize("kind", JOINT)
def test_the_pooled_vector_is_the_librarys_text_features(kind: str, hf_folder: Folder):
    model, inputs = library(hf_folder(kind))
    with torch.no_grad():
        want = features(kind, model, inputs)
        plain = model.text_model(**inputs, output_hidden_states=True)
    encoder = build(hf_folder(kind))
    got = run(encoder, TEXTS)
    torch.testing.assert_close(NativePool(NativePool.Config(), encoder.width)(got), want, **CLOSE)
    assert want.std() > 0.05
    assert want.shape[1] == (encoder.pooled_width or encoder.width) == (12 if kind == "clap" else 16)
    if kind != "clap":
        pool = EosPool(EosPool.Config(), 16) if kind == "metaclip2" else ClsPool(ClsPool.Config(), 16)
        torch.testing.assert_close(pool(got), want, **CLOSE)
    valid = got.tokens.grid.valid
    tokens = plain.last_hidden_state if kind == "clap" else model.text_projection(plain.last_hidden_state)
    torch.testing.assert_close(got.tokens.values[valid], tokens[valid], **CLOSE)
    layers = run(encoder, TEXTS, layers=(2, 1)).layers
    for ours, number in zip(layers, (2, 1), strict=True):
        torch.testing.assert_close(ours[valid], plain.hidden_states[number][valid], **CLOSE)


@pytest.mark.parametrize("kind", JOINT)
def test_without_the_projection_it_is_the_text_model_alone(kind: str, hf_folder: Folder, tmp_path: Path):
    model, inputs = library(hf_folder(kind))
    with torch.no_grad():
        want = model.text_model(**inputs)
    encoder = build(hf_folder(kind), projection=False)
    got = run(encoder, TEXTS)
    valid = got.tokens.grid.valid
    torch.testing.assert_close(got.tokens.values[valid], want.last_hidden_state[valid], **CLOSE)
    assert encoder.width == (20 if kind == "altclip" else 16)
    assert not any("projection" in name for name, _ in encoder.named_parameters())
    if kind in ("metaclip2", "altclip"):
        torch.testing.assert_close(got.pooled, want.pooler_output, **CLOSE)
    else:
        assert got.pooled is None
    encoder.save_files(tmp_path)
    again = HFText(encoder.config, files=tmp_path).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(run(again, TEXTS).tokens.values, got.tokens.values)


@pytest.mark.parametrize("kind", ["align", "clap"])
def test_the_pooling_layer_is_kept_when_asked_for(kind: str, hf_folder: Folder):
    model, inputs = library(hf_folder(kind))
    with torch.no_grad():
        want = model.text_model(**inputs).pooler_output
    torch.testing.assert_close(run(build(hf_folder(kind), projection=False, pooler=True), TEXTS).pooled, want, **CLOSE)


@pytest.mark.parametrize("kind", JOINT)
def test_bfloat16_is_the_librarys(kind: str, hf_folder: Folder):
    model, inputs = library(hf_folder(kind), torch.bfloat16)
    with torch.no_grad():
        want = features(kind, model, inputs)
    got = run(build(hf_folder(kind)).bfloat16(), TEXTS).pooled
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=0.02 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", JOINT)
def test_gradients_are_the_librarys(kind: str, hf_folder: Folder):
    model, inputs = library(hf_folder(kind))
    encoder = build(hf_folder(kind))
    features(kind, model, inputs).square().sum().backward()
    encoder(encoder.collate([encoder.prepare(text) for text in TEXTS])).pooled.square().sum().backward()
    theirs = dict(model.named_parameters())
    for name, parameter in encoder.model.named_parameters():
        want = theirs[name.replace("pooled_projection", "text_projection")].grad
        scale = float(want.abs().max() + 1)
        torch.testing.assert_close(parameter.grad, want, atol=1e-5 * scale, rtol=1e-3, msg=name)


def test_a_part_saved_alone_is_read(hf_folder: Folder, tmp_path: Path):
    for kind in ("chinese-clip", "align", "clap"):
        model, _ = library(hf_folder(kind))
        place = tmp_path / kind
        model.text_model.save_pretrained(place)
        for path in hf_folder(kind).glob("tokenizer*"):
            shutil.copy(path, place)
        whole, part = build(hf_folder(kind), projection=False), build(place)
        torch.testing.assert_close(run(part, TEXTS).tokens.values, run(whole, TEXTS).tokens.values)
