"""TimesFM equals transformers' own calls: padding, odd lengths, gaps, several channels, dropped patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import mmrep
from mmrep import BadSampleError
from mmrep.config import component
from mmrep.modalities.time_series._hf_timesfm import bridged
from mmrep.modalities.time_series.hf import HFSeries
from mmrep.testing import check_encoder
from mmrep.tokens import Tokens

SIZES = {
    "patch_length": 8, "context_length": 40, "horizon_length": 8, "num_hidden_layers": 2, "hidden_size": 16,
    "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 2,
}  # fmt: skip
MODELS = {
    "1": lambda: hf.TimesFmModelForPrediction(hf.TimesFmConfig(**SIZES, use_positional_embedding=True)),
    "2": lambda: hf.TimesFmModelForPrediction(hf.TimesFmConfig(**SIZES)),
    "2.5": lambda: hf.TimesFm2_5ModelForPrediction(
        hf.TimesFm2_5Config(**SIZES, num_key_value_heads=1, output_quantile_len=8)
    ),
}
WAVE = np.random.default_rng(0).normal(size=(60,)).cumsum() + 3


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("timesfm")
    torch.manual_seed(0)
    made = MODELS[request.param]()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(folder)
    return made.eval(), folder


def build(path: Path, **fields: Any) -> HFSeries:
    return component("encoders", "hf-series", path=str(path), **fields).build().eval()


def run(encoder: HFSeries, *raw: Any, **options: Any) -> Any:
    with torch.no_grad():
        return encoder.encode(encoder.tokenize(encoder.collate([encoder.prepare(r) for r in raw])), **options)


@torch.no_grad()
def library(whole: Any, series: np.ndarray, frequency: int = 0) -> Any:
    """The library's own padding to its context, and its decoder's own call: [n, D] of whole patches of padding too."""
    decoder = whole.decoder if hasattr(whole, "decoder") else whole.model
    values, padding, freq = whole._preprocess([torch.tensor(series, dtype=torch.float32)], [frequency])
    extra = {"freq": freq.long()} if hasattr(decoder, "freq_emb") else {}
    return decoder(past_values=values, past_values_padding=padding[:, : values.shape[1]], **extra,
                   output_hidden_states=True)  # fmt: skip


@pytest.mark.parametrize("length", [3, 8, 21, 40, 60])
def test_tokens_layers_and_embedding_equal_the_librarys_own_call(model: Any, length: int):
    whole, folder = model
    encoder = build(folder)
    out = run(encoder, WAVE[:length, None], layers=[1, 2])
    own = library(whole, WAVE[:length])
    n = min(5, -(-length // 8))
    assert out.tokens.values.shape == (1, n, 16)
    torch.testing.assert_close(out.tokens.values, own.last_hidden_state[:, -n:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.layers[1], out.tokens.values)
    torch.testing.assert_close(out.layers[0], own.hidden_states[1][:, -n:], rtol=1e-4, atol=1e-4)
    vector = mmrep.load(folder).encode([WAVE[:length, None]], "time_series")
    np.testing.assert_allclose(vector[0], own.last_hidden_state[0, -n:].mean(0), rtol=1e-4, atol=1e-4)


def test_a_batch_of_other_lengths_changes_nothing(model: Any):
    encoder = build(model[1])
    lengths = (5, 37, 16)
    together = run(encoder, *(WAVE[:n, None] for n in lengths)).tokens
    for row, length in enumerate(lengths):
        n = -(-length // 8)
        alone = run(encoder, WAVE[:length, None]).tokens.values[0]
        torch.testing.assert_close(together.values[row, -n:], alone, rtol=1e-4, atol=1e-5)
        assert together.grid.valid[row].tolist() == [False] * (5 - n) + [True] * n


def test_channels_are_series_of_their_own(model: Any):
    encoder = build(model[1])
    pair = np.stack([WAVE[:21], WAVE[20:41] * 7], 1)
    both = run(encoder, pair)
    assert both.tokens.grid.coords[0].tolist() == [[t, c] for c in (0.0, 1.0) for t in (2.0, 8.5, 16.5)]
    for channel in (0, 1):
        alone = run(encoder, pair[:, channel : channel + 1]).tokens.values
        torch.testing.assert_close(both.tokens.values[:, 3 * channel :][:, :3], alone, rtol=1e-4, atol=1e-5)


def test_gaps_are_bridged_and_what_is_before_the_first_value_is_padding(model: Any):
    encoder = build(model[1])
    gaps = WAVE[:30].copy()
    gaps[[0, 1, 9, 10, 15, 28, 29]] = np.nan
    seen = ~np.isnan(gaps)
    filled = np.interp(np.arange(30), np.flatnonzero(seen), gaps[seen])
    got = run(encoder, gaps[:, None]).tokens.values
    torch.testing.assert_close(got, run(encoder, filled[2:, None]).tokens.values, rtol=1e-4, atol=1e-4)
    empty = np.stack([WAVE[:30], np.full(30, np.nan)], 1)
    found = run(encoder, empty).tokens
    assert found.grid.valid[0].tolist() == [True] * 4 + [False] * 4
    assert found.values.isfinite().all()


def test_bridged_is_numpys_interpolation():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(50, 12))
    observed = generator.random((50, 12)) < 0.4
    observed[0] = False
    found, missing = bridged(torch.tensor(values), torch.tensor(observed))
    for row in range(50):
        places = np.flatnonzero(observed[row])
        first = places[0] if len(places) else 12
        assert missing[row].tolist() == [i < first for i in range(12)]
        wanted = np.interp(np.arange(first, 12), places, values[row, places]) if len(places) else []
        np.testing.assert_allclose(found[row, first:], wanted, atol=1e-12)
        assert not found[row, :first].any()


def test_kept_patches_are_as_in_the_whole_whose_others_are_masked(model: Any):
    encoder = build(model[1]).double()
    pair = np.stack([WAVE[:37], WAVE[20:57]], 1)
    tokens = encoder.tokenize({
        key: value.double() if value.is_floating_point() else value
        for key, value in encoder.collate([encoder.prepare(pair)]).items()
    })  # fmt: skip
    keep = torch.tensor([[8, 0, 3, 4, 6]])
    got = encoder.encode(tokens, keep=keep).tokens.values
    # The library's own blocks over one channel, whose mask leaves out the patches that are not kept.
    for channel, kept in ((0, [0, 3, 4]), (1, [1, 3])):
        values = tokens.values[:, 5 * channel :][:, :5]
        seen = torch.zeros(5, dtype=torch.bool).index_fill(0, torch.tensor(kept), True)
        mask = torch.where(seen[None] & (torch.arange(5) <= torch.arange(5)[:, None]), 0.0, -1e9).double()[None, None]
        places = torch.arange(5)[None]
        for block in encoder.model.layers:
            if encoder.forecaster.newer:
                angles = encoder.model.rotary_emb(values, places)
                values = block(values, position_embeddings=angles, attention_mask=mask, position_ids=places)
            else:
                values = block(values, attention_mask=mask, paddings=torch.zeros(1, 5).double())
        for place in kept:
            at = keep[0].tolist().index(5 * channel + place)
            torch.testing.assert_close(got[:, at], values[:, place])
    assert (got[:, 2] - encoder.encode(tokens).tokens.values[:, 3]).abs().max() > 1e-3


def test_gradients_equal_the_librarys_own(model: Any):
    whole, folder = model
    decoder = whole.decoder if hasattr(whole, "decoder") else whole.model
    encoder = build(folder)
    weight = torch.randn(5, 16)
    inputs = encoder.collate([encoder.prepare(WAVE[:40, None])])
    (encoder(inputs).tokens.values[0] * weight).sum().backward()
    decoder.zero_grad()
    extra = {"freq": torch.zeros(1, 1, dtype=torch.long)} if hasattr(decoder, "freq_emb") else {}
    values = inputs["values"][:, :, 0]
    out = decoder(past_values=values, past_values_padding=torch.zeros_like(values), **extra).last_hidden_state[0]
    (out * weight).sum().backward()
    theirs = dict(decoder.named_parameters())
    for name, parameter in encoder.model.named_parameters():
        want = theirs[name].grad
        torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=1e-5 * (1 + float(want.abs().max())), msg=name)


def test_contract(model: Any):
    check_encoder(build(model[1]))


def test_frequency_is_the_librarys(model: Any):
    whole, folder = model
    if build(folder).forecaster.newer:
        with pytest.raises(ValueError, match="frequency=1: this model knows 0"):
            build(folder, frequency=1)
        return
    got = run(build(folder, frequency=2), WAVE[:40, None]).tokens.values
    torch.testing.assert_close(got, library(whole, WAVE[:40], 2).last_hidden_state, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="frequency=3: this model knows 0, 1, 2"):
        build(folder, frequency=3)


def test_settings_and_series_that_it_does_not_take(model: Any):
    for fields in ({"pad": "right"}, {"fill": "mean"}):
        with pytest.raises(ValueError, match="padded on the left"):
            build(model[1], **fields)
    with pytest.raises(BadSampleError, match="value range"):
        build(model[1]).prepare(WAVE[:, None] * 1e9)
    flat = np.concatenate([np.full(8, 1e8), np.array([-1e8, 1e9])])[:, None]
    assert run(build(model[1]), flat).tokens.values.isfinite().all()


def test_a_saved_model_is_the_same(model: Any, tmp_path: Path):
    ours = mmrep.load(model[1])
    ours.save_pretrained(tmp_path)
    again = mmrep.load(tmp_path)
    np.testing.assert_array_equal(again.encode([WAVE[:21, None]]), ours.encode([WAVE[:21, None]]))


def test_bfloat16_stays_near(model: Any):
    encoder = build(model[1])
    want = run(encoder, WAVE[:40, None]).tokens.values
    got = run(encoder.bfloat16(), WAVE[:40, None]).tokens
    assert isinstance(got, Tokens)
    assert got.values.dtype == torch.bfloat16
    torch.testing.assert_close(got.values.float(), want, atol=0.05 * float(want.abs().max()), rtol=0)


def test_a_channel_that_sees_nothing_is_no_number_for_nobody(model: Any):
    """The library's plain attention takes its softmax in float32, where float64's least is infinite."""
    encoder = build(model[1])
    empty = np.stack([WAVE[:40], np.full(40, np.nan)], 1)
    want = run(encoder, empty).tokens
    tokens = encoder.tokenize(encoder.collate([encoder.prepare(empty)]))
    encoder.double().model.set_attn_implementation("eager")
    got = encoder.encode(Tokens(tokens.values.double(), tokens.grid)).tokens.values
    assert got.isfinite().all()
    torch.testing.assert_close(got.float()[:, :5], want.values[:, :5], atol=1e-3, rtol=1e-3)
