"""PatchTST and PatchTSMixer equal transformers' own calls; context length, padding and masks are as documented."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from mmrep import BadSampleError
from mmrep.config import component
from mmrep.modalities.time_series.hf import HFSeries
from mmrep.registry import encoders
from mmrep.testing import check_encoder

SHARED = {"num_input_channels": 2, "context_length": 26, "patch_length": 8, "patch_stride": 4, "d_model": 16}
TST = {**SHARED, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
MIXER = {**SHARED, "num_layers": 2}
CLASS = {"use_cls_token": True, "norm_type": "layernorm", "channel_attention": True}
MODELS: dict[str, Callable[[], Any]] = {
    "tst": lambda: hf.PatchTSTModel(hf.PatchTSTConfig(**TST)),
    "tst-pretraining": lambda: hf.PatchTSTForPretraining(hf.PatchTSTConfig(**TST, **CLASS)),
    "tst-classes": lambda: hf.PatchTSTForClassification(
        hf.PatchTSTConfig(
            **TST, scaling="mean", share_embedding=False, positional_encoding_type="random", num_targets=3
        )
    ),
    "mixer": lambda: hf.PatchTSMixerModel(hf.PatchTSMixerConfig(**MIXER, self_attn=True, use_positional_encoding=True)),
    "mixer-pretraining": lambda: hf.PatchTSMixerForPretraining(
        hf.PatchTSMixerConfig(**MIXER, mode="mix_channel", scaling=None)
    ),
}
WAVE = np.random.default_rng(0).normal(size=(26, 2)).cumsum(0) + 3
GAPS = np.where(np.random.default_rng(1).random((26, 2)) < 0.8, WAVE, np.nan)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = tmp_path_factory.mktemp(kind)
            model = MODELS[kind]()
            for module in model.modules():  # running statistics of their own, as after training
                if isinstance(module, torch.nn.BatchNorm1d):
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
            model.save_pretrained(made[kind])
        return made[kind]

    return make


def build(path: Path, **fields: Any) -> HFSeries:
    return component("encoders", "hf-series", path=str(path), **fields).build().eval()


def run(encoder: HFSeries, *raw: Any, **options: Any) -> Any:
    with torch.no_grad():
        return encoder.encode(encoder.tokenize(encoder.collate([encoder.prepare(r) for r in raw])), **options)


def library(path: Path, kind: str, *series: np.ndarray, **options: Any) -> Any:
    """What a user of transformers writes: NaN to zero, and a mask of what is observed."""
    cls = hf.PatchTSMixerModel if kind.startswith("mixer") else hf.PatchTSTModel
    extra = {} if kind.startswith("mixer") else {"do_mask_input": False}
    model = cls.from_pretrained(path, **extra).eval()
    values = torch.tensor(np.stack(series), dtype=torch.float32)
    name = "observed_mask" if kind.startswith("mixer") else "past_observed_mask"
    with torch.no_grad():
        return model(values.nan_to_num(0), **{name: ~values.isnan()}, **options)


@pytest.mark.parametrize("kind", MODELS)
def test_contract(folder: Any, kind: str):
    check_encoder(build(folder(kind)))


@pytest.mark.parametrize("fields", [{"pad": "right"}, {"cut": "start", "fill": "mean"}], ids=str)
def test_contract_of_other_settings(folder: Any, fields: dict[str, Any]):
    check_encoder(build(folder("tst-pretraining"), **fields))


def test_every_registered_series_encoder_has_a_contract_test():
    ours = {name for name, cls in encoders.load_all().items() if getattr(cls, "modality", "") == "time_series"}
    assert ours == {"series-patch", "hf-series"}


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_and_layers_equal_the_librarys_own_call(folder: Any, kind: str):
    encoder = build(folder(kind))
    out = run(encoder, GAPS, WAVE * 100, layers=[1, 2])
    own = library(folder(kind), kind, GAPS, WAVE * 100, output_hidden_states=True)
    first = 0 if kind.startswith("mixer") else 1  # PatchTST's begin with the embeddings
    # PatchTST's hidden states end before the last block.
    expected = {1: own.hidden_states[first], 2: own.last_hidden_state}

    def flat(hidden: torch.Tensor) -> torch.Tensor:
        if not encoder.class_token:
            return hidden.reshape(2, -1, 16)
        return torch.cat([hidden[:, :, 0], hidden[:, 0, 1:], hidden[:, 1, 1:]], 1)

    torch.testing.assert_close(out.tokens.values, flat(own.last_hidden_state))
    for layer, number in zip(out.layers, (1, 2), strict=True):
        torch.testing.assert_close(layer, flat(expected[number]))


@pytest.mark.parametrize("kind", ["tst", "mixer"])
def test_gradients_equal_the_librarys_own(folder: Any, kind: str):
    encoder = build(folder(kind))
    cls = hf.PatchTSMixerModel if kind == "mixer" else hf.PatchTSTModel
    model = cls.from_pretrained(folder(kind)).eval()
    weight = torch.randn(1, 2, 5, 16)
    inputs = encoder.collate([encoder.prepare(WAVE)])
    (encoder(inputs).tokens.values * weight.reshape(1, 10, 16)).sum().backward()
    (model(inputs["values"]).last_hidden_state * weight).sum().backward()
    theirs = dict(model.named_parameters())
    for name, parameter in encoder.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad)


def test_a_pretraining_checkpoint_is_read_without_random_masks(folder: Any):
    assert hf.PatchTSTConfig.from_pretrained(folder("tst-pretraining")).do_mask_input
    encoder = build(folder("tst-pretraining"))
    assert torch.equal(run(encoder, WAVE).tokens.values, run(encoder, WAVE).tokens.values)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_a_short_series_is_padded_with_steps_that_are_not_observed(folder: Any, pad: str):
    series = {"values": WAVE[:11], "times": np.arange(11) * 2.0}
    out = run(build(folder("tst"), pad=pad), series)
    padding = np.full((15, 2), np.nan)
    whole = np.concatenate([padding, WAVE[:11]] if pad == "left" else [WAVE[:11], padding])
    own = library(folder("tst"), "tst", whole).last_hidden_state
    torch.testing.assert_close(out.tokens.values, own.reshape(1, 10, 16))
    # 26 steps in patches of 8 by 4 from step 2 on: 2-9, 6-13, 10-17, 14-21, 18-25.
    seen = [False, False, True, True, True] if pad == "left" else [True, True, True, False, False]
    assert out.tokens.grid.valid[0].tolist() == seen * 2
    assert out.tokens.grid.shape is None
    starts = (range(10, 20, 4), 15) if pad == "left" else (range(2, 12, 4), 0)
    for token, start in zip(np.flatnonzero(seen), starts[0], strict=True):
        covered = [2.0 * (s - starts[1]) for s in range(start, start + 8) if 0 <= s - starts[1] < 11]
        assert out.tokens.grid.coords[0, token].tolist() == pytest.approx([np.mean(covered), 0])
        assert out.tokens.grid.coords[0, token + 5].tolist() == pytest.approx([np.mean(covered), 1])


@pytest.mark.parametrize(("cut", "kept"), [("end", slice(14, 40)), ("start", slice(0, 26))])
def test_a_long_series_is_cut(folder: Any, cut: str, kept: slice):
    long = np.random.default_rng(2).normal(size=(40, 2))
    own = library(folder("tst"), "tst", long[kept]).last_hidden_state
    torch.testing.assert_close(run(build(folder("tst"), cut=cut), long).tokens.values, own.reshape(1, 10, 16))
    with pytest.raises(BadSampleError, match="max_length=26"):
        build(folder("tst"), cut="refuse").prepare(long)


def test_fill_mean_puts_the_channels_mean_into_gaps(folder: Any):
    filled = np.where(np.isnan(GAPS), np.nanmean(GAPS, 0), GAPS)
    model = hf.PatchTSTModel.from_pretrained(folder("tst")).eval()
    mask = torch.tensor(~np.isnan(GAPS))[None]
    with torch.no_grad():
        own = model(torch.tensor(filled[None], dtype=torch.float32), past_observed_mask=mask).last_hidden_state
    got = run(build(folder("tst"), fill="mean"), GAPS).tokens.values
    torch.testing.assert_close(got, own.reshape(1, 10, 16), rtol=1e-4, atol=1e-5)
    assert (got - run(build(folder("tst")), GAPS).tokens.values).abs().max() > 0.01


def test_class_tokens_are_special_and_stand_in_front(folder: Any):
    grid = run(build(folder("tst-pretraining")), WAVE).tokens.grid
    assert grid.special[0].tolist() == [True] * 2 + [False] * 10
    assert grid.shape == (2, 5)


def test_what_the_patches_do_not_cover_cannot_be_all_there_is(folder: Any):
    values = np.full((26, 2), np.nan)
    values[1] = 1  # the five patches begin at step 2
    with pytest.raises(BadSampleError) as caught:
        build(folder("tst")).prepare(values)
    assert caught.value.cause == "all missing"
    with pytest.raises(BadSampleError):
        build(folder("tst"), pad="right").prepare([[1.0, 2.0]])
    assert build(folder("tst")).prepare([[1.0, 2.0]])["observed"].all()


@pytest.mark.parametrize(("raw", "cause"), [
    (WAVE[:, :1], "wrong channels"), (np.where(WAVE > 3, np.inf, WAVE), "not finite"), (WAVE * 1e16, "value range"),
])  # fmt: skip
def test_bad_series(folder: Any, raw: np.ndarray, cause: str):
    with pytest.raises(BadSampleError) as caught:
        build(folder("tst")).prepare(raw)
    assert caught.value.cause == cause


def test_other_models_are_refused_by_name(tmp_path: Path):
    config = hf.BertConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    hf.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"'bert' checkpoint is no time series encoder .* patchtst, patchtsmixer, timesfm"
    ):
        build(tmp_path)
