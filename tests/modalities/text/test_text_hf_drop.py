"""Dropped tokens of Hugging Face text models leave no trace, and those that are kept stay where they stood."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
import transformers as hf

from mmrep.config import component
from mmrep.modalities.text.hf import HFText
from mmrep.testing import check_encoder
from mmrep.tokens import Tokens, keep_special

SIZES = {**tiny_hf.SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 59}
OFFSET = {**SIZES, "max_position_embeddings": 17}
GROUPED = {**SIZES, "num_key_value_heads": 1}
WIDE = {**GROUPED, "head_dim": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**OFFSET)),
    "xlm-roberta": lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**OFFSET)),
    "camembert": lambda: hf.CamembertModel(hf.CamembertConfig(**OFFSET)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(
            vocab_size=60, dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=16, pad_token_id=0
        )
    ),
    "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**SIZES, embedding_size=8)),
    "albert": lambda: hf.AlbertModel(hf.AlbertConfig(**SIZES, embedding_size=8)),
    "eurobert": lambda: hf.EuroBertModel(hf.EuroBertConfig(**GROUPED, mask_token_id=2)),
    "nomic_bert": lambda: hf.NomicBertModel(hf.NomicBertConfig(**SIZES)),
    "jina_embeddings_v3": lambda: hf.JinaEmbeddingsV3Model(hf.JinaEmbeddingsV3Config(**SIZES)),
    "modernbert": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(**SIZES, **MIXED, local_attention=4, cls_token_id=1, sep_token_id=59)
    ),
    "gpt2": lambda: hf.GPT2Model(
        hf.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=59)
    ),
    "gpt_neox": lambda: hf.GPTNeoXModel(hf.GPTNeoXConfig(**SIZES)),
    "opt": lambda: hf.OPTModel(
        hf.OPTConfig(vocab_size=60, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                     max_position_embeddings=16, word_embed_proj_dim=16, pad_token_id=0)
    ),
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**GROUPED)),
    "gemma": lambda: hf.GemmaModel(hf.GemmaConfig(**WIDE)),
    "granite": lambda: hf.GraniteModel(hf.GraniteConfig(**GROUPED)),
    "mistral": lambda: hf.MistralModel(hf.MistralConfig(**WIDE, sliding_window=3)),
    "mistral without a window": lambda: hf.MistralModel(hf.MistralConfig(**WIDE, sliding_window=None)),
    "phi3": lambda: hf.Phi3Model(hf.Phi3Config(**GROUPED, sliding_window=3, original_max_position_embeddings=16)),
    "qwen2": lambda: hf.Qwen2Model(hf.Qwen2Config(**GROUPED)),
    "qwen2 with a window": lambda: hf.Qwen2Model(
        hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    ),
    "qwen3": lambda: hf.Qwen3Model(hf.Qwen3Config(**WIDE)),
    "gemma2": lambda: hf.Gemma2Model(hf.Gemma2Config(**WIDE, sliding_window=3)),
    "gemma3": lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**WIDE, **MIXED, sliding_window=3)),
    "gemma3 both ways": lambda: hf.Gemma3TextModel(
        hf.Gemma3TextConfig(**WIDE, **MIXED, sliding_window=3, use_bidirectional_attention=True)
    ),
}  # fmt: skip
QUICK = ("bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "mistral", "gemma3 both ways", "gemma2")
JOINT = ("clip", "metaclip2", "altclip", "chinese-clip", "align", "clap")


def saved(model: Any, folder: Path) -> HFText:
    for parameter in model.parameters():  # tiny initial weights would hide what does not reach the output
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tiny_hf.tokenizer("both", cls_token="<s>", sep_token="</s>").save_pretrained(folder)
    return component("encoders", "hf-text", path=str(folder)).build().eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three texts of 14, 11 and 9 tokens, with special ones at both ends."""
    count = torch.tensor([14, 11, 9])
    places = torch.arange(14)
    valid = places < count[:, None]
    special = (places == 0) | (places == count[:, None] - 1)
    ids = torch.randint(3, 58, (3, 14), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "valid": valid, "special": special}


KEEP = torch.tensor([[9, 2, 3, 12, 7, 1], [8, 1, 5, 2, -1, -1], [1, 7, 4, -1, -1, -1]])


def pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, values.shape[2]))


@torch.no_grad()
def whole(encoder: HFText, tokens: Tokens, index: torch.Tensor) -> Any:
    """The library's call on all tokens, whose mask leaves out those that are not kept."""
    seen = torch.zeros(tokens.values.shape[:2], dtype=torch.long)
    seen.scatter_(1, index.clamp_min(0), 1)  # the first is always kept, so an empty slot adds nothing
    options = {"attention_mask": seen, "output_hidden_states": True}
    if encoder.hf_config.model_type == "opt":  # it would count the places of what is seen alone
        options["position_ids"] = torch.arange(14).expand(3, -1)
    if encoder._takes_embeddings:
        return encoder.model(inputs_embeds=tokens.values, **options)
    return encoder.model(input_ids=torch.zeros_like(seen), **options)


def compare(encoder: HFText, batch: dict[str, torch.Tensor]) -> None:
    # Gemma 2 takes its softmax in float32, where the library's mask of float64 is infinite.
    encoder = encoder if encoder.hf_config.model_type == "gemma2" else encoder.double()
    tokens = encoder.tokenize(batch)
    index = keep_special(KEEP, tokens.grid)
    with torch.no_grad():
        got = encoder.encode(tokens, keep=KEEP, layers=(1,))
    handle = None
    if not encoder._takes_embeddings:
        handle = encoder._embedding.register_forward_hook(lambda *_: tokens.values)
    want = whole(encoder, tokens, index)
    if handle is not None:
        handle.remove()
    hidden = want.last_hidden_state if encoder._projection is None else encoder._projection(want.last_hidden_state)
    kept = index >= 0
    assert torch.equal(got.tokens.grid.valid, kept)
    torch.testing.assert_close(got.tokens.values[kept], pick(hidden, index)[kept], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.layers[0][kept], pick(want.hidden_states[1], index)[kept], atol=1e-6, rtol=1e-5)
    everything = pick(encoder.encode(tokens).tokens.values, index)
    assert (everything - got.tokens.values)[kept].abs().max() > 1e-3, "the others were attended to"
    if encoder._reads_first:
        torch.testing.assert_close(got.pooled, hidden[:, 0], atol=1e-6, rtol=1e-5)
    if encoder._is_clip:
        torch.testing.assert_close(got.pooled, hidden[torch.arange(3), batch["valid"].sum(1) - 1], atol=1e-6, rtol=1e-5)
    if encoder.pooled_width is not None:
        torch.testing.assert_close(got.pooled, want.pooler_output, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
def test_kept_tokens_are_as_in_the_whole_whose_others_are_masked(kind, batch, tmp_path):
    torch.manual_seed(0)
    encoder = saved(MODELS[kind](), tmp_path)
    assert "drop_tokens" in encoder.supports
    compare(encoder, batch)


@pytest.mark.parametrize("kind", JOINT)
def test_so_are_those_of_the_text_parts_of_joint_models(kind, batch, hf_folder):
    compare(component("encoders", "hf-text", path=str(hf_folder(kind))).build().eval(), batch)


def test_pooling_layer_reads_the_class_token(batch, tmp_path):
    saved(MODELS["bert"](), tmp_path)
    encoder = component("encoders", "hf-text", path=str(tmp_path), pooler=True).build().eval()
    tokens = encoder.tokenize(batch)
    want = whole(encoder, tokens, keep_special(KEEP, tokens.grid)).pooler_output
    torch.testing.assert_close(encoder.encode(tokens, keep=KEEP).pooled, want)


@pytest.mark.parametrize("kind", ["distilbert", "modernbert", "qwen3"])
def test_the_contract_of_kinds_that_no_other_test_checks(kind, tmp_path):
    torch.manual_seed(0)
    check_encoder(saved(MODELS[kind](), tmp_path), only=["keep", "layers", "blocks", "mask_token", "content"])


def test_gradients_are_those_of_the_whole(batch, tmp_path):
    encoder = saved(MODELS["llama"](), tmp_path).double()
    index = keep_special(KEEP, encoder.tokenize(batch).grid)
    kept = index >= 0
    weight = torch.randn(*index.shape, 16, dtype=torch.float64)

    def gradients(values: torch.Tensor) -> list[torch.Tensor]:
        encoder.zero_grad()
        (values * weight)[kept].sum().backward()
        return [parameter.grad.clone() for parameter in encoder.parameters()]

    ours = gradients(encoder.encode(encoder.tokenize(batch), keep=KEEP).tokens.values)
    tokens = encoder.tokenize(batch)
    seen = torch.zeros(3, 14, dtype=torch.long).scatter_(1, index.clamp_min(0), 1)
    theirs = gradients(pick(encoder.model(inputs_embeds=tokens.values, attention_mask=seen).last_hidden_state, index))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "change"), [
    ("t5", {}), ("siglip", {}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ("bert", {"is_decoder": True}),
])  # fmt: skip
def test_models_that_cannot_be_told_places_say_so(kind, change, tmp_path):
    model, tokenizer = tiny_hf.make(kind)
    for name, value in change.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = component("encoders", "hf-text", path=str(tmp_path)).build()
    assert "drop_tokens" not in encoder.supports
    tokens = encoder.tokenize(encoder.collate([encoder.prepare("w1 w2 w3")]))
    with pytest.raises(ValueError, match=r"does not support 'drop_tokens'.*text-transformer"):
        encoder.encode(tokens, keep=torch.tensor([[0]]))


def test_a_masked_autoencoder_of_text_learns_from_visible_tokens_alone(tmp_path):
    """An objective that needs ``drop_tokens`` takes the encoder."""
    encoder = saved(MODELS["bert"](), tmp_path)
    tokens = encoder.tokenize(encoder.collate([encoder.prepare("w1 w2 w3 w4 w5 w6"), encoder.prepare("w5 w1 w2")]))
    keep = torch.tensor([[1, 4], [2, -1]])
    visible = encoder.encode(tokens, keep=keep).tokens
    assert visible.values.shape == (2, 4, 16)
    changed = tokens.values.clone()
    changed[0, 2:4] += 1
    changed[0, 5:7] -= 1
    other = encoder.encode(Tokens(changed, tokens.grid), keep=keep).tokens
    assert torch.equal(visible.values[0], other.values[0]), "nothing of a dropped token is seen"


def test_an_empty_slot_that_sees_nothing_is_no_number_for_nobody(batch, tmp_path):
    """Its row of the softmax would be of nothing; Gemma's softmax is in float32, where float64's least is infinite."""
    encoder = saved(MODELS["gemma2"](), tmp_path).double()
    tokens = encoder.tokenize({**batch, "special": torch.zeros_like(batch["special"])})
    keep = torch.tensor([[9, 2, 12], [8, 5, 2], [1, 7, 4]])
    want = encoder.encode(tokens, keep=keep).tokens.values
    got = encoder.encode(tokens, keep=torch.cat([keep, torch.full((3, 1), -1)], 1)).tokens.values
    assert got.isfinite().all()
    torch.testing.assert_close(got[:, :3], want)
