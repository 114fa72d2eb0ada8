"""Our own text transformer: learned tokenizer, truncation, token contract, save and reload."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrep.config import component
from mmrep.heads import ClsPool, EosPool, LastPool, MeanPool
from mmrep.modalities.text._tokenizer import BEGIN, END, FILE, UNKNOWN
from mmrep.modalities.text.transformer import TextTransformer
from mmrep.tokens import Tokens

CAPTIONS = [
    "a red cat on a mat", ["a blue dog", "ein blauer Hund", "μπλε σκύλος"], "赤い猫が寝ている", "красный кот", None,
    "", 7, "two\nlines", b"bytes of a red dog", "gâteau au chocolat", "a red dog and a blue cat", "the mat is red",
]  # fmt: skip


def build(files: Path | None = None, **fields: object) -> TextTransformer:
    torch.manual_seed(0)
    settings = {"width": 16, "depth": 3, "heads": 2, "max_length": 24, **fields}
    model = component("encoders", "text-transformer", **settings).build(files=files).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(model: TextTransformer, texts: list[str], **options: object) -> object:
    inputs = model.collate([model.prepare(text) for text in texts])
    return model.encode(model.tokenize(inputs), **options)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    chosen = component("encoders", "text-transformer", tokenizer="sentencepiece", vocab_size=400)
    chosen.cls.fit(chosen.config, CAPTIONS, folder)
    return folder


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_fit_is_reproducible_and_a_small_corpus_gives_fewer_pieces(tmp_path: Path, algorithm: str) -> None:
    written = []
    for name in ("one", "two"):
        chosen = component(
            "encoders", "text-transformer", tokenizer="sentencepiece", algorithm=algorithm, vocab_size=30000
        )
        (tmp_path / name).mkdir()
        chosen.cls.fit(chosen.config, iter(CAPTIONS), tmp_path / name)
        written.append((tmp_path / name / FILE).read_bytes())
    assert written[0] == written[1]
    model = build(tmp_path / "one", tokenizer="sentencepiece", vocab_size=30000)
    assert 260 < model.tokenizer.size < 1000
    assert model.embedding.num_embeddings == model.tokenizer.size


def test_learned_pieces_cover_every_language_and_nothing_is_unknown(learned: Path) -> None:
    model = build(learned, tokenizer="sentencepiece")
    known, rare = model.tokenizer("赤い猫"), model.tokenizer("犬 🐕 \x00 ẞ")
    assert len(known) <= 4
    assert rare
    assert UNKNOWN not in rare
    assert model.tokenizer("A Red CAT") == model.tokenizer("a red cat")
    assert len(model.tokenizer("a red cat")) < len("a red cat")


def test_fit_learns_from_every_caption_of_a_list(learned: Path) -> None:
    """Greek letters are in the second caption of a list only: a piece each once learned, two bytes each if not."""
    model = build(learned, tokenizer="sentencepiece")
    assert len(model.tokenizer("μπλε σκύλος")) <= len(" μπλε σκύλος")


def test_a_vocabulary_smaller_than_the_alphabet_says_what_to_change(tmp_path: Path) -> None:
    chosen = component("encoders", "text-transformer", tokenizer="sentencepiece", vocab_size=264)
    with pytest.raises(ValueError, match=r"vocab_size 264 is too small.*raise vocab_size or lower character_coverage"):
        chosen.cls.fit(chosen.config, CAPTIONS, tmp_path)
    with pytest.raises(ValueError, match="no text to learn"):
        chosen.cls.fit(chosen.config, [None, "", 3], tmp_path)


def test_sentencepiece_without_a_learned_file_says_what_to_do(tmp_path: Path) -> None:
    for files in (None, tmp_path):
        with pytest.raises(ValueError, match=r"train through a recipe.*or set tokenizer: bytes"):
            build(files, tokenizer="sentencepiece")
    (tmp_path / FILE).write_bytes(b"not a model")
    with pytest.raises(ValueError, match="no sentencepiece model"):
        build(tmp_path, tokenizer="sentencepiece")


@settings(deadline=None, max_examples=100)
@given(text=st.text(min_size=1, max_size=60).filter(str.strip), max_length=st.integers(3, 30))
def test_trap_a_truncation_keeps_begin_and_end_whatever_the_length(text: str, max_length: int) -> None:
    model = build(max_length=max_length, depth=1)
    ids = model.prepare(text)["ids"].tolist()
    assert ids[0] == BEGIN
    assert ids[-1] == END
    assert len(ids) == min(max_length, 2 + len(text.casefold().encode()))
    assert ids[1:-1] == [4 + byte for byte in text.casefold().encode()][: max_length - 2]


def test_trap_a_truncation_keeps_the_end_of_learned_pieces(learned: Path) -> None:
    model = build(learned, tokenizer="sentencepiece", max_length=8)
    item = model.prepare("a red cat " * 30)
    assert item["ids"].tolist()[0] == BEGIN
    assert item["ids"].tolist()[-1] == END
    assert item["special"].tolist() == [True] + [False] * 6 + [True]


@pytest.mark.parametrize("causal", [False, True])
def test_trap_b_and_c_eos_pool_reads_the_end_token_though_its_id_is_small(causal: bool) -> None:
    model = build(causal=causal)
    out = run(model, ["abc", "a"])
    pooled = EosPool(EosPool.Config(), model.width)(out)
    torch.testing.assert_close(pooled[0], out.tokens.values[0, 4])
    torch.testing.assert_close(pooled[1], out.tokens.values[1, 2])
    assert not torch.allclose(pooled[1], out.tokens.values[1, 0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pool", [MeanPool, ClsPool, EosPool, LastPool])
def test_trap_d_batch_invariance_alone_equals_in_a_padded_batch(causal: bool, pool: type) -> None:
    model = build(causal=causal)
    head = pool(pool.Config(), model.width)
    texts = model.examples(6, seed=1)
    together = head(run(model, texts))
    for row, text in enumerate(texts):
        torch.testing.assert_close(head(run(model, [text]))[0], together[row], rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5), causal=st.booleans())
def test_batch_invariance_for_any_lengths(lengths: list[int], causal: bool) -> None:
    model = build(causal=causal, depth=1)
    texts = ["".join(chr(97 + (i * 7 + n) % 26) for i in range(n)) for n in lengths]
    together = run(model, texts).tokens.values
    for row, text in enumerate(texts):
        alone = run(model, [text]).tokens.values[0]
        torch.testing.assert_close(alone, together[row, : len(alone)], rtol=1e-4, atol=1e-5)


def test_positions_are_added_before_tokens_are_dropped() -> None:
    model = build()
    inputs = model.collate([model.prepare("aaaa")])
    values = model.tokenize(inputs).values[0]
    torch.testing.assert_close(values[2] - values[1], (model.positions[2] - model.positions[1]).detach())


@pytest.mark.parametrize("causal", [False, True])
def test_keep_computes_only_the_kept_tokens(causal: bool) -> None:
    """Dropped tokens must have no influence: change them and nothing moves; they are not in what the blocks see."""
    model = build(causal=causal)
    tokens = model.tokenize(model.collate([model.prepare("abcdef"), model.prepare("xy")]))
    keep = torch.tensor([[5, 2], [1, -1]])
    seen: list[int] = []
    handle = model.transformer.blocks[0].register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    out = model.encode(tokens, keep, layers=(2,))
    handle.remove()
    assert seen == [4]
    assert out.tokens.grid.coords[0, :, 0].tolist() == [0, 7, 5, 2]
    assert out.tokens.grid.special[0].tolist() == [True, True, False, False]
    assert out.layers[0].shape == out.tokens.values.shape
    changed = tokens.values.clone()
    changed[0, [1, 3, 4, 6]] += 10
    changed[1, 2] += 10
    again = model.encode(Tokens(changed, tokens.grid), keep).tokens.values
    valid = out.tokens.grid.valid
    torch.testing.assert_close(again[valid], out.tokens.values[valid])


def test_causal_keep_equals_running_the_kept_tokens_in_sentence_order() -> None:
    model = build(causal=True)
    tokens = model.tokenize(model.collate([model.prepare("abcdef")]))
    out = model.encode(tokens, torch.tensor([[5, 2]]))  # stored as 0, 7, 5, 2
    places = torch.tensor([0, 2, 5, 7])
    twin = model.norm(model.transformer(tokens.values[:, places])[0])
    torch.testing.assert_close(out.tokens.values[:, [0, 3, 2, 1]], twin)


def test_causal_tokens_see_nothing_after_them_and_others_do() -> None:
    for causal in (True, False):
        model = build(causal=causal)
        one, two = run(model, ["abcx"]).tokens.values, run(model, ["abcy"]).tokens.values
        assert torch.equal(one[:, :4], two[:, :4]) is causal
        assert not torch.equal(one[:, 4], two[:, 4])


def test_layers_are_the_blocks_outputs_in_the_order_asked_for() -> None:
    model = build()
    out = run(model, ["abc", "a"], layers=(3, 1))
    torch.testing.assert_close(model.norm(out.layers[0]), out.tokens.values)
    seen = []
    handle = model.transformer.blocks[0].register_forward_hook(lambda _m, _a, o: seen.append(o))
    run(model, ["abc", "a"])
    handle.remove()
    torch.testing.assert_close(out.layers[1], seen[0])
    with pytest.raises(ValueError, match=r"has layers 1 to 3; asked for \[4\]"):
        run(model, ["abc"], layers=(4,))


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_saved_files_and_weights_rebuild_the_encoder(tmp_path: Path, learned: Path, tokenizer: str) -> None:
    model = build(learned, tokenizer=tokenizer)
    model.save_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ([FILE] if tokenizer == "sentencepiece" else [])
    again = TextTransformer(model.config, files=tmp_path).eval()
    again.load_state_dict(model.state_dict())
    texts = model.examples(5, 0)
    assert torch.equal(run(again, texts).tokens.values, run(model, texts).tokens.values)


@pytest.mark.parametrize("causal", [False, True])
def test_gradient_reaches_every_parameter(causal: bool) -> None:
    model = build(causal=causal).train()
    out = run(model, model.examples(4, 0))
    (out.tokens.values * torch.randn_like(out.tokens.values)).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_only_the_position_table_is_spared_from_decay() -> None:
    model = build()
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))
    assert model.no_weight_decay() == {"positions"}


def test_dropout_acts_in_training_and_evaluation_is_deterministic() -> None:
    model = build(dropout=0.5)
    texts = model.examples(3, 0)
    assert torch.equal(run(model, texts).tokens.values, run(model, texts).tokens.values)
    model.train()
    assert not torch.equal(run(model, texts).tokens.values, run(model, texts).tokens.values)
