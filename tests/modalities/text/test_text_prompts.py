"""Prompts and instructions: equal to prefixing by hand, chosen by name, and left out of the pool when asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_hf import KINDS

from mmrep.config import ConfigError, component, parse
from mmrep.encoder import BadSampleError
from mmrep.heads import ClsPool, LastPool, MeanPool
from mmrep.modalities.text._prompts import shared_start
from mmrep.model import Model, ModelConfig
from mmrep.registry import UnknownNameError
from mmrep.testing import check_encoder

Folder = Callable[[str], Path]
PROMPTS = {"query": "query: ", "passage": "passage: "}
OURS = {"width": 16, "depth": 2, "heads": 2, "max_length": 24}


def ours(**fields: Any) -> Any:
    torch.manual_seed(0)
    return component("encoders", "text-transformer", **{**OURS, **fields}).build().eval()


def run(encoder: Any, texts: list[Any]) -> Any:
    with torch.no_grad():
        return encoder(encoder.collate([encoder.prepare(text) for text in texts]))


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    text = {"encoder": {"type": "text-transformer", "prompts": PROMPTS, **OURS}}
    image = {"encoder": {"type": "image-cnn", "size": 8, "widths": [4], "depths": [1]}}
    return Model(parse(ModelConfig, {"dim": 8, "towers": {"text": text, "image": image}})).eval()


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.full((8, 8, 3), 9, np.uint8)


def test_a_chosen_prompt_is_prefixing_by_hand(model: Model) -> None:
    texts = ["a cat", "two dogs", "ein Haus"]
    by_hand = model.encode([f"query: {text}" for text in texts], "text")
    for options in ({"prompt_name": "query"}, {"prompt": "query: "}, {"prompt": "query: ", "prompt_name": "passage"}):
        np.testing.assert_array_equal(model.encode(texts, "text", **options), by_hand)
    np.testing.assert_array_equal(model.encode_query(texts, "text"), by_hand)
    passages = model.encode([f"passage: {text}" for text in texts], "text")
    np.testing.assert_array_equal(model.encode_document(texts, "text"), passages)
    np.testing.assert_array_equal(model.encode("a", "text", prompt_name="query"), model.encode("query: a", "text"))
    assert not np.allclose(by_hand, model.encode(texts, "text"), atol=1e-4)
    np.testing.assert_array_equal(model.encode_query(texts, "text", prompt_name="passage"), passages)


def test_dicts_go_to_the_towers_that_take_prompts(model: Model, picture: np.ndarray) -> None:
    both = model.encode({"text": ["a cat"], "image": [picture]}, prompt_name="query")
    np.testing.assert_array_equal(both["text"], model.encode(["query: a cat"], "text"))
    np.testing.assert_array_equal(both["image"], model.encode([picture], "image"))
    np.testing.assert_array_equal(model.encode_query([picture], "image"), both["image"])
    assert model.encode_document({"image": [picture]})["image"].shape == (1, 8)
    for inputs, modality in (([picture], "image"), ({"image": [picture]}, None)):
        with pytest.raises(ValueError, match="image: takes no prompts, and 'query' was asked for"):
            model.encode(inputs, modality, prompt_name="query")
        with pytest.raises(ValueError, match="image: takes no prompts, and 'a ' was asked for"):
            model.encode(inputs, modality, prompt="a ")


def test_an_unknown_name_says_the_near_match(model: Model) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown prompt 'qurey'; did you mean 'query'\?.*query, passage"):
        model.encode(["a"], "text", prompt_name="qurey")
    with pytest.raises(UnknownNameError, match="Known: none; set `prompts`"):
        ours().prompted("a", "query", None)
    assert ours().prompted("a", ("query", "document"), None) == "a"


def test_a_value_may_bring_its_own_prompt_or_instruction() -> None:
    plain = ours()
    encoder = ours(prompt="p: ", prompts=PROMPTS, instruction="Do: {instruction}\nText: ")
    for raw, text in [
        ("a", "p: a"),
        ({"text": "a"}, "p: a"),
        ({"text": "a", "prompt": "x "}, "x a"),
        ({"text": "a", "prompt": ""}, "a"),
        ({"text": "a", "prompt": None, "instruction": None}, "p: a"),
        ({"text": b"a", "instruction": "see"}, "Do: see\nText: a"),
        ({"text": ["", "a", "b"], "instruction": "{x} {instruction}"}, "Do: {x} {instruction}\nText: a"),
        (encoder.prompted("a", "query", None), "query: a"),
        (encoder.prompted(["a", "b"], "query", None), "query: a"),
        (encoder.prompted({"text": "a"}, "query", None), "query: a"),
        (encoder.prompted({"text": "a", "prompt": "x "}, "query", None), "x a"),
        (encoder.prompted({"text": "a", "instruction": "see"}, None, "y "), "Do: see\nText: a"),
        (encoder.prompted("a", None, ""), "a"),
    ]:
        assert torch.equal(encoder.prepare(raw)["ids"], plain.prepare(text)["ids"]), raw
    assert encoder.preview({"text": "  a  b", "instruction": "see"}) == "a b"
    for raw in ({"text": "a", "prompt": 3}, {"text": "a", "prompt": "x", "instruction": "y"}, {"prompt": "x"}, {}):
        with pytest.raises(BadSampleError, match="not text"):
            encoder.prepare(raw)
    with pytest.raises(BadSampleError, match="empty text"):
        encoder.prepare({"text": " ", "prompt": "x"})


@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
def test_a_prompt_left_out_of_the_mean_is_attended_to_and_not_averaged(hf_folder: Folder, kind: str) -> None:
    """INSTRUCTOR (arXiv:2212.09741, section 2.1): the twin averages transformers' own output past the prompt."""
    fields = {"path": str(hf_folder(kind)), "prompts": {"q": "w9 w8 "}}
    encoder = component("encoders", "hf-text", prompt_pooled=False, **fields).build().eval()
    raws = [encoder.prompted("w1 w2 w3", "q", None), encoder.prompted("w4", "q", None), "w5 w6"]
    whole = component("encoders", "hf-text", **fields).build().eval()
    for row, (raw, prompt) in enumerate(zip(raws, (2, 2, 0), strict=True)):
        alone = run(whole, [raw]).tokens.values[0]
        begin = len(encoder.frame[0])
        want = torch.cat([alone[:begin], alone[begin + prompt :]]).mean(0)
        got = MeanPool(MeanPool.Config(), encoder.width)(run(encoder, raws))[row]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        last = LastPool(LastPool.Config(), encoder.width)(run(encoder, raws))[row]
        torch.testing.assert_close(last, alone[-1], rtol=1e-4, atol=1e-5)
    if kind == "bert":
        cls = ClsPool(ClsPool.Config(), encoder.width)(run(encoder, raws))[0]
        torch.testing.assert_close(cls, run(whole, raws).tokens.values[0, 0])


def test_the_mean_is_that_of_sentence_transformers_for_a_tokenizer_without_a_begin_token(hf_folder: Folder) -> None:
    """Its include_prompt=False: the attention mask of the pool is zero over the prompt's ids but for the end token."""
    words = transformers.AutoTokenizer.from_pretrained(hf_folder("t5"))
    net = transformers.T5EncoderModel.from_pretrained(hf_folder("t5")).eval()
    inputs = words(["w9 w8 w1 w2 w3"], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        hidden = net(**inputs).last_hidden_state[0]
    length = len(words("w9 w8 ")["input_ids"]) - 1
    encoder = component(
        "encoders", "hf-text", path=str(hf_folder("t5")), prompt="w9 w8 ", prompt_pooled=False
    ).build().eval()  # fmt: skip
    got = MeanPool(MeanPool.Config(), encoder.width)(run(encoder, ["w1 w2 w3"]))[0]
    torch.testing.assert_close(got, hidden[length:].mean(0), rtol=1e-4, atol=1e-5)


def test_tokens_of_a_prompt_are_those_that_do_not_change_with_the_text() -> None:
    assert shared_start([5, 6, 7], [5, 6, 8, 9]) == 2  # the last joined with the text
    assert shared_start([5, 6], [5, 6, 7]) == 2
    assert shared_start([], [5]) == 0
    encoder = ours(prompt="query: ", prompt_pooled=False)
    item = encoder.prepare("ab")
    assert item["prompt"].tolist() == [False] + [True] * 7 + [False] * 3
    assert encoder.prepare({"text": "ab", "prompt": ""})["prompt"].sum() == 0
    batch = encoder.collate([item, encoder.prepare({"text": "abcdef", "prompt": "q"})])
    assert batch["prompt"].sum(1).tolist() == [7, 1]
    assert "prompt" not in ours(prompt="query: ").prepare("ab")


def test_a_prompt_that_leaves_no_room_is_a_bad_sample_where_it_is_not_pooled() -> None:
    encoder = ours(prompt_pooled=False)
    assert encoder.prepare({"text": "abc", "prompt": "x" * 21})["ids"].shape == (24,)
    with pytest.raises(BadSampleError, match="prompt too long: 22 tokens, of the 22"):
        encoder.prepare({"text": "abc", "prompt": "x" * 22})
    assert ours().prepare({"text": "abc", "prompt": "x" * 22})["ids"].shape == (24,)


def test_dropping_tokens_keeps_what_is_left_out_left_out() -> None:
    encoder = ours(prompt="q: ", prompt_pooled=False)
    tokens = encoder.tokenize(encoder.collate([encoder.prepare("abcd")]))
    out = encoder.encode(tokens, keep=torch.tensor([[1, 5, 4, -1]])).tokens  # a token of the prompt, two of the text
    assert out.grid.coords[0, :, 0].tolist() == [0, 8, 1, 5, 4, 0]
    assert out.grid.valid[0].tolist() == [True, True, False, True, True, False]


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("kind", ["ours", "causal", *KINDS])
def test_contract(hf_folder: Folder, kind: str, pooled: bool) -> None:
    fields = {"prompt": "w9 w8 ", "prompt_pooled": pooled}
    if kind in KINDS:
        encoder = component("encoders", "hf-text", path=str(hf_folder(kind)), **fields).build()
    else:
        encoder = ours(causal=kind == "causal", **fields)
    names = ["prepare_collate", "forward", "grid", "batch_invariance", "empty_batch", "gradients", "keep", "layers",
             "config_round_trip", "weights_round_trip"]  # fmt: skip
    check_encoder(encoder, only=names)


def test_an_instruction_needs_a_place_for_its_words() -> None:
    with pytest.raises(ConfigError, match=r"has no \{instruction\} in it"):
        component("encoders", "text-transformer", instruction="Instruct: ")


def test_a_vocabulary_is_learned_from_the_texts_of_dicts(tmp_path: Path) -> None:
    chosen = component("encoders", "text-transformer", tokenizer="sentencepiece", vocab_size=300, **OURS)
    chosen.cls.fit(chosen.config, [{"text": "μπλε σκύλος", "instruction": "find"}] * 3, tmp_path)
    assert len(chosen.build(files=tmp_path).pieces("μπλε σκύλος")) <= len(" μπλε σκύλος")
