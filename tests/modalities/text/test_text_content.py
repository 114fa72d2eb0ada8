"""What a text's tokens are made from: ids that spell it out; and what is left of a hidden one: its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmrep.config import component
from mmrep.modalities.text._tokenizer import BEGIN, END
from mmrep.tokens import index_set

TEXTS = ["a red bird", "zwei blaue Häuser am See"]


def small(**fields):
    torch.manual_seed(0)
    return component("encoders", "text-transformer", width=32, depth=2, heads=2, **fields).build().eval()


def batch(encoder, texts):
    return encoder.collate([encoder.prepare(text) for text in texts])


def test_the_ids_of_bytes_spell_the_text():
    encoder = small()
    inputs = batch(encoder, TEXTS)
    content, grid = encoder.content(inputs), encoder.tokenize(inputs).grid
    assert content.vocabulary == encoder.embedding.num_embeddings == 260
    plain = grid.valid & ~grid.special
    spelled = [bytes((row[marks] - 4).tolist()).decode() for row, marks in zip(content.values, plain, strict=True)]
    assert spelled == [text.casefold() for text in TEXTS]
    assert set(content.values[grid.special].tolist()) == {BEGIN, END}


@pytest.mark.parametrize("causal", [False, True])
def test_values_are_embeddings_and_positions(causal: bool):
    encoder = small(causal=causal)
    inputs = batch(encoder, TEXTS)
    tokens = encoder.tokenize(inputs)
    assert torch.equal(tokens.values, encoder.embedding(inputs["ids"]) + tokens.positions)
    assert torch.equal(tokens.positions[0], encoder.positions[: inputs["ids"].shape[1]])


def test_a_hidden_word_cannot_be_told_from_another():
    encoder, token = small(), torch.randn(32)
    one, other = (encoder.tokenize(batch(encoder, [text])) for text in ("a red bird", "a tan bird"))
    hidden = torch.tensor([[3, 4, 5]])  # behind begin, "a" and a space
    a, b = (encoder.encode(tokens.hide(hidden, token)).tokens.values for tokens in (one, other))
    assert torch.equal(a, b)
    a, b = (encoder.encode(tokens.hide(hidden[:, :2], token)).tokens.values for tokens in (one, other))
    assert not torch.allclose(a, b)


def test_a_prompt_travels_with_repeated_tokens():
    encoder = small(prompt="query: ", prompt_pooled=False)
    tokens = encoder.tokenize(batch(encoder, TEXTS)).repeat(2)
    assert torch.equal(tokens.grid.prompt[0], tokens.grid.prompt[1])
    assert encoder.encode(tokens).tokens.grid.valid.sum(1).tolist()[::2] == [len("a red bird") + 2, 27]


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2", "llama", "clip"])
def test_a_hugging_face_model_adds_places_to_hidden_tokens_itself(hf_folder: Callable[[str], Path], kind: str):
    encoder = component("encoders", "hf-text", path=str(hf_folder(kind)), projection=False).build().eval()
    inputs = batch(encoder, ["w1 w2 w3 w4", "w9 w8 w7 w6 w5"])
    tokens, content = encoder.tokenize(inputs), encoder.content(inputs)
    embedding = encoder.model.get_input_embeddings()
    assert torch.equal(embedding(content.values), tokens.values)
    assert content.vocabulary == len(embedding.weight)
    hidden = index_set(tokens.grid.valid & ~tokens.grid.special)[:, 1:4:2]
    out = encoder.encode(tokens.hide(hidden, torch.randn(encoder.width))).tokens.values
    assert not torch.allclose(out[1, hidden[1, 0]], out[1, hidden[1, 1]], atol=1e-4)
    told = {**inputs, "ids": inputs["ids"].scatter(1, hidden, inputs["ids"].gather(1, hidden).flip(1))}
    torch.manual_seed(0)
    mask = torch.randn(encoder.width)
    blind = [encoder.encode(encoder.tokenize(i).hide(hidden, mask)).tokens.values for i in (inputs, told)]
    assert torch.equal(*blind)


def test_a_projection_of_another_width_leaves_no_mask_token(hf_folder: Callable[[str], Path]):
    path = str(hf_folder("clip-narrow"))
    for projection in (True, False):
        encoder = component("encoders", "hf-text", path=path, projection=projection).build()
        positions = encoder.tokenize(batch(encoder, ["w1 w2"])).positions
        assert ("mask_token" in encoder.supports) == (positions is not None) == (not projection)
