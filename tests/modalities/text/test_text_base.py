"""Reading raw text, padding, examples and the caption-choosing view: what all text encoders share."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrep.config import ConfigError, component
from mmrep.encoder import BadSampleError
from mmrep.modalities.text._base import last_special
from mmrep.modalities.text.transformer import TextTransformer
from mmrep.modalities.text.views import TextChoice


@pytest.fixture(scope="module")
def encoder() -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(TextTransformer.Config(width=16, depth=1, heads=2, max_length=12)).eval()


@pytest.mark.parametrize("raw", ["", " \n\t", "\u3000", b"", [], ["", "  "], ()])
def test_text_without_a_word_is_a_bad_sample(encoder: TextTransformer, raw: object) -> None:
    with pytest.raises(BadSampleError) as caught:
        encoder.prepare(raw)
    assert caught.value.cause == "empty text"


@pytest.mark.parametrize(
    "raw",
    [
        None,
        3,
        2.5,
        {"caption": "a"},
        {"text": "a", "class": 1},
        {"text": 3},
        ["a", 3],
        b"\xff\xfe",
        "half \ud800 character",
    ],
)
def test_what_is_no_text_is_a_bad_sample(encoder: TextTransformer, raw: object) -> None:
    with pytest.raises(BadSampleError) as caught:
        encoder.prepare(raw)
    assert caught.value.cause == "not text"


def test_bytes_lists_and_arrays_are_read_as_the_string_they_hold(encoder: TextTransformer) -> None:
    expected = encoder.prepare("ein Äffchen")["ids"]
    array = np.array(["", "ein Äffchen"], dtype=object)
    for raw in ("ein Äffchen".encode(), ["ein Äffchen", "two"], array, np.str_("ein Äffchen")):
        assert torch.equal(encoder.prepare(raw)["ids"], expected)


def test_collate_pads_on_the_right_and_tells_it_by_the_mask(encoder: TextTransformer) -> None:
    items = [encoder.prepare("ab"), encoder.prepare("abcd")]
    assert [encoder.length(item) for item in items] == [4, 6]
    batch = encoder.collate(items)
    assert batch["valid"].tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    assert batch["ids"][0, 4:].tolist() == [encoder.pad_id] * 2
    assert batch["special"].tolist() == [[True, False, False, True, False, False], [True] + [False] * 4 + [True]]
    assert batch["ids"].dtype == torch.long


def test_the_last_special_token_is_found_and_the_last_valid_one_stands_in_for_it() -> None:
    valid = torch.tensor([[True, True, True, False], [True, True, True, False], [True, True, True, True]])
    special = torch.tensor([[True, True, False, True], [False] * 4, [True, False, False, True]])
    assert last_special(valid, special).tolist() == [1, 2, 3]


def test_examples_are_reproducible_varied_and_one_is_too_long(encoder: TextTransformer) -> None:
    texts = encoder.examples(8, seed=3)
    assert texts == encoder.examples(8, seed=3) != encoder.examples(8, seed=4)
    assert len(set(texts)) == 8
    assert any(ord(character) > 0x3000 for text in texts for character in text)
    assert len(encoder.tokenizer(texts[2])) > encoder.max_length
    code = ("from mmrep.modalities.text.transformer import TextTransformer as T; "
            "print(repr(T(T.Config(width=16, depth=1, heads=2, max_length=12)).examples(8, 3)))")  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8",
                         env={"PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"})  # fmt: skip
    assert out.stdout.strip() == repr(texts)


def test_a_view_chooses_among_captions_by_its_seed(encoder: TextTransformer) -> None:
    view = TextChoice(TextChoice.Config())
    captions = ["aa", " ", "bbb", "cccc"]
    lengths = [encoder.length(encoder.prepare(captions, view=view, seed=seed)) for seed in range(300)]
    assert lengths == [encoder.length(encoder.prepare(captions, view=view, seed=seed)) for seed in range(300)]
    counts = Counter(lengths)
    assert set(counts) == {4, 5, 6}
    assert min(counts.values()) > 70
    assert encoder.length(encoder.prepare("aa", view=view, seed=9)) == 4


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 7), first=st.floats(0, 1), seed=st.integers(0, 2**63 - 1))
def test_text_choice_never_leaves_the_list(n: int, first: float, seed: int) -> None:
    captions = [str(i) for i in range(n)]
    assert TextChoice(TextChoice.Config(first=first)).sample(captions, seed) in captions
    assert TextChoice(TextChoice.Config()).sample(captions, seed) in captions


def test_text_choice_first_is_the_share_of_the_first_caption() -> None:
    view = TextChoice(TextChoice.Config(first=0.7))
    counts = Counter(view.sample(["a", "b", "c"], seed) for seed in range(2000))
    assert counts["a"] / 2000 == pytest.approx(0.7, abs=0.04)
    assert counts["b"] / 2000 == pytest.approx(0.15, abs=0.03)
    assert Counter(TextChoice(TextChoice.Config(first=0.0)).sample(["a", "b"], s) for s in range(50)) == {"b": 50}


def test_components_are_found_by_name_and_their_config_is_checked() -> None:
    assert component("views", "text-choice", first=0.5).build().config.first == 0.5
    with pytest.raises(ConfigError, match="first"):
        component("views", "text-choice", first=1.5)
    with pytest.raises(ConfigError, match=r"max_lenght: unknown; did you mean 'max_length'\?"):
        component("encoders", "text-transformer", max_lenght=3)
    with pytest.raises(ConfigError, match="heads=5 does not divide width=16"):
        component("encoders", "text-transformer", width=16, heads=5)


def test_modalities_refuses_to_be_imported_under_its_folder_name(tmp_path: object) -> None:
    import mmrep.modalities

    folder = mmrep.modalities.__path__[0].removesuffix("mmrep/modalities")
    run = subprocess.run([sys.executable, "-c", "import modalities"], cwd=folder, capture_output=True, text=True)
    if "No module named" in run.stderr:
        pytest.skip("installed without the source folder")
    assert "ImportError: import mmrep.modalities, not modalities" in run.stderr


def test_importing_the_encoders_imports_no_heavy_library() -> None:
    code = ("import sys, mmrep.modalities.text.transformer, mmrep.modalities.text.hf, mmrep.modalities.text.open_clip, "
            "mmrep.modalities.text.views; print([m for m in ('transformers', 'open_clip', 'sentencepiece', 'timm') "
            "if m in sys.modules])")  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_preview_is_the_text_that_is_read_on_one_short_line():
    encoder = TextTransformer(TextTransformer.Config(width=16, depth=1, heads=2))
    assert encoder.preview(["  a cat\non a mat ", "eine Katze"]) == "a cat on a mat"
    assert len(encoder.preview("word " * 100)) == 118
