"""TSDAE: a decoder writes a text from one vector of its damaged reading."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.data.batch import Batch
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from tests.modalities.text import tiny_hf
from tests.objectives import ssl_toys

TEXTS = ["ab", "a longer text", "x", "some words"]
BYTES = {"tokenizer": "bytes", "width": 12, "depth": 1, "heads": 2, "max_length": 16}
SMALL = {"depth": 2, "heads": 2}


def build(*, encoder=None, frozen=False, pool="mean", decoder=SMALL, **fields):
    torch.manual_seed(0)
    tower = TowerConfig(
        encoder=encoder or component("encoders", "text-transformer", **BYTES), pool=component("pools", pool),
        frozen=frozen,
    )  # fmt: skip
    model = Model(ModelConfig(dim=5, towers={"a": tower}, temperatures={}))
    chosen = component("objectives", "denoise", **{"field": "x", "decoder": decoder, **fields})
    return Root(model, [chosen], fields={"x": "a"}, views={})


def batch(encoder, damaged, whole):
    read = [encoder.collate([encoder.prepare(text) for text in texts]) for texts in (damaged, whole)]
    here = torch.ones(len(whole), dtype=torch.bool)
    ids = [str(i) for i in range(len(whole))]
    return Batch(ids=ids, inputs={"x": read}, present={"x": here}, seeds=torch.arange(len(whole)))


def slow(root, damaged, whole):
    """Token by token, each text alone, each prefix anew."""
    tower, decoder = root.model.tower("a"), root.objectives["denoise"].decoder
    losses = []
    for left, text in zip(damaged, whole, strict=True):
        vector = tower.pool(tower.encoder(tower.encoder.collate([tower.encoder.prepare(left)])))
        ids = tower.encoder.prepare(text)["ids"]
        for t in range(1, min(len(ids), decoder.places.shape[0] + 1)):
            x = tower.encoder.embedding.weight[ids[:t]] + decoder.places[:t]
            x = F.layer_norm(x, x.shape[-1:], decoder.begin.weight, decoder.begin.bias)[None]
            for block, given in zip(decoder.transformer.blocks, decoder.given, strict=True):
                x = block(x + F.linear(vector, given.weight, given.bias), causal=True)
            logits = decoder.norm(x)[0, -1] @ tower.encoder.embedding.weight.T + decoder.bias
            losses.append(-logits.log_softmax(0)[ids[t]])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("length", [128, 4])
def test_the_loss_is_that_of_every_token_after_those_before_it(length):
    root = build(decoder={**SMALL, "length": length}).double()
    damaged = ["a", "longer", "x", "words"]
    loss = root(batch(root.model.tower("a").encoder, damaged, TEXTS))["loss"]
    expected = slow(root, damaged, TEXTS)
    torch.testing.assert_close(loss, expected)
    named = {n: p for n, p in root.named_parameters() if p.requires_grad}
    mine, theirs = (torch.autograd.grad(x, list(named.values())) for x in (loss, expected))
    for (name, _), a, b in zip(named.items(), mine, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    assert not any("projector" in name or "decoder.own" in name for name in named)


def test_nothing_is_known_of_the_text_but_one_vector_and_what_was_written():
    root = build().double()
    decoder = root.objectives["denoise"].decoder
    codes, vectors = torch.randint(0, 200, (3, 6)), torch.randn(3, 12).double()
    before = decoder(codes, vectors)
    later = codes.clone()
    later[:, 4:] = 7
    torch.testing.assert_close(decoder(later, vectors)[:, :4], before[:, :4])
    assert (decoder(later, vectors)[:, 4:] - before[:, 4:]).abs().max() > 1e-3
    assert (decoder(codes, vectors + 1) - before).abs().amin((0, 2)).max() > 1e-6


def test_parts_of_a_batch_weigh_as_many_as_their_tokens():
    root = build().double()
    encoder = root.model.tower("a").encoder
    whole, a, b = (root(batch(encoder, t, t))["loss"] for t in (TEXTS, TEXTS[:1], TEXTS[1:]))
    objective = root.objectives["denoise"]
    counts = [objective.count(ssl_toys.step_of(root, batch(encoder, t, t))) for t in (TEXTS[:1], TEXTS[1:])]
    assert counts == [3, 13 + 1 + 1 + 1 + 10 + 1]
    torch.testing.assert_close(whole, (counts[0] * a + counts[1] * b) / sum(counts))


def test_it_learns_to_keep_the_text_in_the_vector():
    torch.manual_seed(0)
    root = build(pool="cls")
    encoder = root.model.tower("a").encoder
    data = batch(encoder, TEXTS, TEXTS)
    optimizer = torch.optim.Adam(root.parameters(), lr=0.03)
    for _ in range(60):
        out = root(data)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert out["denoise/accuracy"] > 0.95
    swapped = batch(encoder, TEXTS[::-1], TEXTS)  # the vector of another text writes that one
    assert root(swapped)["denoise/accuracy"] < 0.7


@pytest.mark.slow  # the library takes ten seconds to import
def test_the_library_computes_the_same(tmp_path):
    """Given its decoder; the gradient of the encoder too."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.losses import DenoisingAutoEncoderLoss
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    transformers.BertModel(transformers.BertConfig(**tiny_hf.SIZES, **off)).save_pretrained(tmp_path)
    tiny_hf.tokenizer("both", cls_token="<s>", sep_token="</s>").save_pretrained(tmp_path)
    library = SentenceTransformer(modules=[Transformer(str(tmp_path), max_seq_length=16), Pooling(16, "cls")])
    theirs = DenoisingAutoEncoderLoss(library, str(tmp_path), tie_encoder_decoder=False).double().cpu().eval()
    root = build(encoder=component("encoders", "hf-text", path=str(tmp_path)), pool="cls").double().eval()
    encoder = root.model.tower("a").encoder
    root.objectives["denoise"].decoder = Theirs(theirs.decoder)
    whole, damaged = ["w1 w2 w3 w4 w5", "w7", "w8 w9 w1"], ["w2 w5", "w7", "w1"]
    loss = root(batch(encoder, damaged, whole))["loss"]
    features = [dict(theirs.encoder.tokenize(texts)) for texts in (damaged, whole)]
    expected = theirs(features, None)
    torch.testing.assert_close(loss, expected)
    own = dict(encoder.model.named_parameters())
    other = dict(library.transformers_model.named_parameters())
    a = torch.autograd.grad(loss, list(own.values()))
    b = torch.autograd.grad(expected, [other[name] for name in own])
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right)


class Theirs(torch.nn.Module):
    """The library's decoder in the place of ours."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, codes, vectors):
        mask = torch.ones(len(codes), 1, dtype=torch.long)
        return self.inner(
            input_ids=codes, encoder_hidden_states=vectors[:, None], encoder_attention_mask=mask, use_cache=False
        ).logits


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"field": "xx"}, r"unknown 'xx'; did you mean 'x'"),
        ({"target": 0}, "view 0 is the damaged one too"),
        ({"frozen": True}, "is frozen"),
        ({"decoder": {"heads": 5}}, "5 does not divide the width of 12"),
        ({"decoder": {"width": 8}}, "12; leave it out, or set decoder.tied: false"),
        ({"encoder": component("encoders", "toy-ssl")}, "no codes that could be written"),
        ({"encoder": component("encoders", "toy")}, "does not support 'content'"),
    ],
)
def test_what_cannot_be_written_is_refused_when_built(options, words):
    with pytest.raises(ConfigError, match=words):
        build(**options)


def test_a_decoder_of_its_own_width_has_a_table_of_its_own():
    root = build(decoder={**SMALL, "width": 8, "tied": False})
    assert root.objectives["denoise"].decoder.own.weight.shape[1] == 8
    loss = root(batch(root.model.tower("a").encoder, TEXTS, TEXTS))["loss"]
    assert "objectives.denoise.decoder.own.weight" in ssl_toys.reached(loss, root)
