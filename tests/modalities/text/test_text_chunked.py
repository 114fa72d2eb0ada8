"""Long texts in windows: nothing lost, nothing twice, and a text that fits is the inner encoder's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import KINDS, WORDS, tokenizer

from mmrep.config import component
from mmrep.encoder import BadSampleError
from mmrep.heads import EosPool, MeanPool
from mmrep.modalities.text._base import TextEncoder
from mmrep.modalities.text.chunked import ChunkedText
from mmrep.modalities.text.chunks import TextChunk
from mmrep.testing import ENCODER_CHECKS, check_encoder

Folder = Callable[[str], Path]
LONG = " ".join(WORDS)  # 56 words, where the tiny models read 16 tokens
CLIP = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
OURS = {"width": 16, "depth": 2, "heads": 2, "max_length": 12}


def chunked(name: str, overlap: int = 4, max_windows: int | None = 64, **fields: Any) -> ChunkedText:
    torch.manual_seed(0)
    config = ChunkedText.Config(encoder=component("encoders", name, **fields), overlap=overlap, max_windows=max_windows)
    encoder = ChunkedText(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def run(encoder: Any, texts: list[Any]) -> Any:
    with torch.no_grad():
        return encoder(encoder.collate([encoder.prepare(text) for text in texts]))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """open_clip towers: causal, reading both ways, and with a Hugging Face tokenizer."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    tokenizer("end", pad_token="</s>").save_pretrained(folder / "words")
    both = {**CLIP, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    models = {
        "mmrep-chunk-clip": {"text_cfg": CLIP},
        "mmrep-chunk-both": {"custom_text": True, "text_cfg": both},
        "mmrep-chunk-words": {
            "custom_text": True, "text_cfg": {**both, "vocab_size": 60, "hf_tokenizer_name": str(folder / "words")}
        },
    }  # fmt: skip
    vision = {"layers": 1, "width": 64, "image_size": 8, "patch_size": 8}
    for name, fields in models.items():
        (folder / f"{name}.json").write_text(json.dumps({"vision_cfg": vision, "embed_dim": 32, **fields}))
    open_clip.add_model_config(folder)
    return {name: name for name in models}


NAMES = ["bytes", "causal", *KINDS, "mmrep-chunk-clip", "mmrep-chunk-both", "mmrep-chunk-words"]


@pytest.fixture
def make(hf_folder: Folder, clips: dict[str, str]) -> Callable[..., ChunkedText]:
    def made(name: str, **fields: Any) -> ChunkedText:
        if name in clips:
            return chunked("open-clip-text", model=name, **fields)
        if name in KINDS:
            return chunked("hf-text", path=str(hf_folder(name)), **fields)
        return chunked("text-transformer", causal=name == "causal", **OURS, **fields)

    return made


@pytest.mark.parametrize("name", NAMES)
def test_pieces_in_their_frame_are_what_the_encoder_reads(make: Callable[..., ChunkedText], name: str) -> None:
    inner = make(name).inner
    for text in ("w1", "w1 w2 w3", LONG, "a cat, 42"):
        assert inner.framed(inner.pieces(text)[: inner.room]) == inner.token_ids(text)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_that_fits_is_the_inner_encoders_own(make: Callable[..., ChunkedText], name: str) -> None:
    encoder = make(name)
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    ours, theirs = run(encoder, texts), run(encoder.inner, texts)
    assert torch.equal(ours.tokens.values, theirs.tokens.values)
    assert torch.equal(ours.tokens.grid.valid, theirs.tokens.grid.valid)
    assert torch.equal(ours.tokens.grid.special, theirs.tokens.grid.special)
    valid = theirs.tokens.grid.valid
    assert torch.equal(ours.tokens.grid.coords[valid], theirs.tokens.grid.coords[valid])
    assert (ours.pooled is None) == (theirs.pooled is None)
    if ours.pooled is not None:
        assert torch.equal(ours.pooled, theirs.pooled)
    # In the company of a long one, too.
    company = run(encoder, [*texts, LONG]).tokens
    for row in range(3):
        torch.testing.assert_close(
            company.values[row][company.grid.valid[row]], theirs.tokens.values[row][valid[row]], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("overlap", [0, 1, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_each_token_of_a_long_text_is_kept_once(make: Callable[..., ChunkedText], name: str, overlap: int) -> None:
    encoder = make(name, overlap=overlap)
    inner = encoder.inner
    before, after = inner.frame
    for n in (13, 14, 15, 23, 24, 25, 26, 40, 56):
        text = " ".join(WORDS[:n])
        item = encoder.prepare(text)
        kept = item["ids"][item["counted"]].tolist()
        want = [*before, *inner.pieces(text), *after]
        assert kept[: len(want)] == want
        assert len(set(kept[len(want) :])) <= 1, "only padding may follow"
        assert all(length <= inner.max_length for length in item["lengths"].tolist())
        grid = run(encoder, [text]).tokens.grid
        assert grid.coords[0, :, 0][grid.valid[0]].tolist() == list(range(int(grid.valid.sum())))
        assert grid.special.sum() == sum(inner.token_ids(text)[1])


def test_tokens_are_those_of_the_window_in_which_they_stand_farther_from_the_edge() -> None:
    encoder = chunked("text-transformer", overlap=4, **OURS)  # 10 bytes of text in a window, 6 of them new
    text = "abcdefghijklmnopqrst"
    windows = ["abcdefghij", "ghijklmnop", "mnopqrst"]
    assert encoder.prepare(text)["lengths"].tolist() == [12, 12, 10]
    twin = [run(encoder.inner, [window]).tokens.values[0] for window in windows]
    want = torch.cat([twin[0][:9], twin[1][3:9], twin[2][3:]])  # begin abcdefgh | ijklmn | opqrst end
    out = run(encoder, [text]).tokens
    torch.testing.assert_close(out.values[0][out.grid.valid[0]], want)
    mean = MeanPool(MeanPool.Config(), encoder.width)(run(encoder, [text]))
    torch.testing.assert_close(mean[0], want.mean(0))
    torch.testing.assert_close(EosPool(EosPool.Config(), encoder.width)(run(encoder, [text]))[0], twin[2][-1])


def test_pooled_is_the_mean_of_the_windows_weighted_by_what_is_kept(make: Callable[..., ChunkedText]) -> None:
    encoder = make("clip", overlap=4)
    text = " ".join(WORDS[:20])  # 14 words in a window, 10 of them new
    windows = [" ".join(WORDS[0:14]), " ".join(WORDS[10:20])]
    twin = run(encoder.inner, windows).pooled
    want = (twin * torch.tensor([13.0, 9.0])[:, None]).sum(0) / 22  # with the begin of the one and the end of the other
    torch.testing.assert_close(run(encoder, ["w1", text]).pooled[1], want)


def test_the_tail_of_a_long_text_is_seen_and_truncation_is_blind_to_it() -> None:
    encoder = chunked("text-transformer", overlap=2, **OURS)
    one, two = "x" * 200 + "a", "x" * 200 + "b"
    pool = MeanPool(MeanPool.Config(), encoder.width)
    assert torch.equal(*pool(run(encoder.inner, [one, two])))
    assert not torch.allclose(*pool(run(encoder, [one, two])))


def test_the_most_windows_bound_the_work() -> None:
    for limit, count in ((3, 3), (None, 100)):
        encoder = chunked("text-transformer", overlap=0, max_windows=limit, **OURS)
        item = encoder.prepare("x" * 1000)
        assert len(item["lengths"]) == count
        assert encoder.length(item) == 12 * count
        assert int(item["counted"].sum()) == 10 * count + 2


@pytest.mark.parametrize("pooled", [True, False])
def test_every_window_stands_behind_the_prompt(make: Callable[..., ChunkedText], pooled: bool) -> None:
    encoder = make("bert", overlap=2, prompt="w9 w8 ", prompt_pooled=pooled)
    plain = make("bert").inner
    text = " ".join(WORDS[20:40])
    windows = ["w9 w8 " + " ".join(WORDS[a:b]) for a, b in ((20, 32), (30, 40))]
    twin = run(plain, windows).tokens.values
    out = run(encoder, [text]).tokens
    first = twin[0][:14] if pooled else torch.cat([twin[0][:1], twin[0][3:14]])
    want = torch.cat([first, twin[1][4:13], twin[1][13:14]])
    torch.testing.assert_close(out.values[0][out.grid.valid[0]], want)
    batch = encoder.collate([encoder.prepare(text), encoder.prepare("w1")])
    with torch.no_grad():
        steps, whole = encoder.encode(encoder.tokenize(batch)).tokens, encoder(batch).tokens
    assert torch.equal(steps.grid.valid, whole.grid.valid)
    assert torch.equal(steps.grid.coords, whole.grid.coords)
    places = [0, *range(1 if pooled else 3, 24)]  # begin, two words of the prompt, twenty of the text, end
    assert whole.grid.coords[0, :, 0][whole.grid.valid[0]].tolist() == places
    short = run(encoder.inner, ["w1"]).tokens.grid
    assert torch.equal(whole.grid.coords[1][whole.grid.valid[1]], short.coords[0][short.valid[0]])


def test_a_view_and_a_chosen_prompt_go_through() -> None:
    encoder = chunked("text-transformer", overlap=2, prompts={"query": "q: "}, **OURS)
    view = TextChunk(TextChunk.Config(length=1))
    assert encoder.prepare("aa bb", view=view, seed=1)["ids"].tolist() in (
        encoder.prepare("aa")["ids"].tolist(), encoder.prepare("bb")["ids"].tolist()
    )  # fmt: skip
    ids = encoder.prepare(encoder.prompted("abc", "query", None))["ids"]
    assert torch.equal(ids, encoder.prepare("q: abc")["ids"])


@pytest.mark.parametrize("name", NAMES)
def test_contract(make: Callable[..., ChunkedText], name: str) -> None:
    # Reading a million characters in full takes seconds, and is the same for all.
    checks = [check for check in ENCODER_CHECKS if check != "odd_input" or name == "bytes"]
    check_encoder(make(name, overlap=2, max_windows=8), only=checks)


def test_contract_with_a_learned_tokenizer_and_prompts_left_out(tmp_path: Path) -> None:
    inner = component(
        "encoders", "text-transformer", tokenizer="sentencepiece", vocab_size=400, prompt="a red ",
        prompt_pooled=False, **OURS,
    )  # fmt: skip
    config = ChunkedText.Config(encoder=inner, overlap=1)
    ChunkedText.fit(config, ["a red cat", "eine rote Katze", "赤い猫"] * 3, tmp_path)
    check_encoder(ChunkedText(config, files=tmp_path))


def test_what_cannot_be_read_in_windows_says_why() -> None:
    with pytest.raises(ValueError, match="overlap=10: a window has 10 tokens of text"):
        chunked("text-transformer", overlap=10, **OURS)
    with pytest.raises(ValueError, match="'image-cnn' is no text encoder"):
        chunked("image-cnn")
    encoder = chunked("text-transformer", overlap=4, **OURS)
    with pytest.raises(BadSampleError, match="prompt too long: 6 tokens, of the 10"):
        encoder.prepare({"text": "x" * 30, "prompt": "123456"})
    with pytest.raises(BadSampleError, match="empty text"):
        encoder.prepare(" ")
    assert isinstance(encoder.inner, TextEncoder)
    with pytest.raises(ValueError, match="ChunkedText does not support 'drop_tokens'"):
        encoder.encode(encoder.tokenize(encoder.collate([encoder.prepare("a")])), keep=torch.tensor([[1]]))
