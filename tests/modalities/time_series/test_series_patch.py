"""The patch encoder: contract, amplitude, gaps, times, channels and what it learns before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.modalities.time_series._normalization import learn
from mmrep.modalities.time_series._scalars import ScalarEmbedding
from mmrep.modalities.time_series._stats import standardize
from mmrep.modalities.time_series.patch import SeriesPatch, sincos
from mmrep.testing import check_encoder
from mmrep.tokens import Tokens

SMALL = {"patch": 8, "width": 32, "depth": 2, "heads": 2}
CASES = [
    {},
    {"channels": 3, "registers": 2, "layer_scale": 0.1},
    {"channels": 3, "channel_tokens": True, "drop_path": 0.1},
    {"channels": "any"},
    {"stride": 3, "irregular": True, "normalize": "series", "dropout": 0.1},
    {"channels": "any", "irregular": True, "class_token": False, "time_scale": 0.5, "stride": 5},
    {"amplitude": False, "class_token": False, "max_length": 30, "cut": "end"},
]


def build(**fields: Any) -> SeriesPatch:
    torch.manual_seed(0)
    return component("encoders", "series-patch", **{**SMALL, **fields}).build().eval()


def tokens(encoder: SeriesPatch, *raw: Any) -> Tokens:
    with torch.no_grad():
        return encoder.tokenize(encoder.collate([encoder.prepare(r) for r in raw]))


def pooled(encoder: SeriesPatch, raw: Any) -> torch.Tensor:
    with torch.no_grad():
        return encoder(encoder.collate([encoder.prepare(raw)])).tokens.values[0].mean(0)


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_contract(fields: dict[str, Any]):
    check_encoder(build(**fields), n=6)


@pytest.mark.parametrize("fields", [
    {"channels": 2, "normalize": "fit"}, {"channels": "any", "normalize": "fit", "time_scale": None},
    {"time_scale": None, "irregular": True},
], ids=str)  # fmt: skip
def test_contract_of_what_is_learned_before(fields: dict[str, Any], tmp_path: Path):
    chosen = component("encoders", "series-patch", **SMALL, **fields)
    channels = 2 if fields.get("channels", 1) != 1 else 1
    chosen.cls.fit(
        chosen.config, [np.random.default_rng(i).normal(3, 2, (9 + i, channels)) for i in range(4)], tmp_path
    )
    check_encoder(chosen.cls(chosen.config, files=tmp_path))


# --- amplitude -------------------------------------------------------------------------------------------------------

WAVE = np.sin(np.arange(40) / 3)


@pytest.mark.parametrize(
    "other", [WAVE * 3, WAVE + 2, WAVE * 1e-3, -WAVE + 1e4], ids=["scale", "offset", "small", "far"]
)
def test_amplitude_and_offset_tell_series_apart(other: np.ndarray):
    encoder = build()
    assert (pooled(encoder, WAVE) - pooled(encoder, other)).abs().max() > 0.02


@pytest.mark.parametrize("other", [WAVE * 3, WAVE + 2, WAVE * 1e-6, WAVE * 1e6 - 5e6])
def test_shape_alone_does_not(other: np.ndarray):
    encoder = build(amplitude=False)
    torch.testing.assert_close(pooled(encoder, WAVE), pooled(encoder, other), rtol=0, atol=2e-5)


def test_tiny_and_huge_series_are_finite_and_apart():
    encoder = build()
    made = {scale: pooled(encoder, WAVE * scale) for scale in (1e-30, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e30)}
    assert all(vector.isfinite().all() for vector in made.values())
    for scale in (1e-3, 1.0, 1e3, 1e6):
        assert (made[1e-6] - made[scale]).abs().max() > 0.02
    assert (made[1e6] - made[1.0]).abs().max() > 0.02


def test_normalising_each_series_takes_its_offset_and_scale_away():
    encoder = build(normalize="series")
    torch.testing.assert_close(pooled(encoder, WAVE), pooled(encoder, WAVE * 7 + 100), rtol=0, atol=1e-4)


def scalar_twin(embedding: ScalarEmbedding, x: float) -> torch.Tensor:
    """The formula of arXiv:2310.07402 scale by scale, in float64."""
    vectors, weights = [], []
    for w, b, k in zip(embedding.weight.double(), embedding.bias.double(), embedding.scales.double(), strict=True):
        unit = abs(x) + k  # layer norm does not see it, but for its eps
        vectors.append(F.layer_norm((x * w + k * b) / unit, w.shape, eps=1e-5))
        weights.append(1 / (torch.log(abs(x) / k + 1e-6).abs() + 1e-6))
    shares = torch.stack(weights) / sum(weights)
    return (shares[:, None] * torch.stack(vectors)).sum(0)


@pytest.mark.parametrize("x", [0.0, 1e-6, -3e-5, 0.02, 0.99, -7.0, 350.0, 1e4, -1e7])
def test_scalar_embedding_equals_its_formula_and_its_gradient(x: float):
    torch.manual_seed(1)
    embedding = ScalarEmbedding(12, [10.0**i for i in range(-4, 5)])
    scalar = torch.tensor([x])
    expected, got = scalar_twin(embedding, scalar.double().item()), embedding(scalar)[0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    mix = torch.randn(12)
    slow = torch.autograd.grad((expected * mix).sum(), [embedding.weight, embedding.bias])
    fast = torch.autograd.grad((got * mix).sum(), [embedding.weight, embedding.bias])
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_scalar_embedding_is_bounded_at_any_float_and_stays_float32_under_autocast():
    embedding = ScalarEmbedding(8, [1e-4, 1.0, 1e4])
    with torch.autocast("cpu", torch.bfloat16):
        out = embedding(torch.tensor([0.0, 1e-45, 1e38, -1e38, 3.0]))
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert out.abs().max() < 8**0.5 + 1e-3
    assert ScalarEmbedding(8, [1e-4, 1e-3])(torch.tensor([1e38])).isfinite().all()


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e5])
@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_standardize_equals_float64_over_the_observed_values(offset: float, dim: int):
    rng = np.random.default_rng(0)
    values = (rng.normal(0, 2, (4, 5, 6)) + offset).astype(np.float32)
    observed = rng.random((4, 5, 6)) < 0.7
    observed[0] = observed[:, 0] = observed[:, :, 0] = True
    shape, mean, spread = standardize(torch.tensor(np.where(observed, values, 99)), torch.tensor(observed), dim)
    wide = np.where(observed, values.astype(np.float64), np.nan)
    own, std = np.nanmean(wide, dim, keepdims=True), np.nanstd(wide, dim, keepdims=True)
    np.testing.assert_allclose(mean, own, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(spread, std, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shape, np.where(observed, (wide - own) / np.maximum(std, 1e-9), 0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [1 / 3, 1e6 / 3, 1e30, -1e38, 1e-40, 0.0])
def test_a_constant_has_no_spread_at_all(value: float):
    values = torch.full((1, 7), value)
    shape, mean, spread = standardize(values, torch.arange(7)[None] > 1, -1)
    assert spread.item() == 0
    assert not shape.any()
    assert mean.item() == pytest.approx(values[0, 0].item(), rel=1e-6)


def test_huge_and_tiny_values_keep_their_shape():
    usual = torch.tensor([[0.0, 1, 5, 2]])
    seen = torch.ones(1, 4, dtype=torch.bool)
    for scale in (1e-28, 1e-10, 1e30, 1e37):
        shape, mean, spread = standardize(usual * scale, seen, -1)
        torch.testing.assert_close(shape, standardize(usual, seen, -1)[0])
        assert mean.item() == pytest.approx(2 * scale, rel=1e-5)
        assert spread.item() == pytest.approx(3.5**0.5 * scale, rel=1e-5)


def test_nothing_observed_gives_zeros_and_gradients_are_finite():
    values = torch.tensor([[3.0, 4.0], [5.0, 5.0]], requires_grad=True)
    parts = standardize(values, torch.tensor([[False, False], [True, True]]), -1)
    assert not any(part[0].any() for part in parts)
    sum(part.sum() for part in parts).backward()
    assert values.grad.isfinite().all()


# --- windows, gaps, times --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [8, 3])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 11, 16, 17, 40])
def test_windows_cover_every_step_and_none_is_superfluous(length: int, stride: int):
    starts = [0]
    while starts[-1] + 8 < length:
        starts.append(starts[-1] + stride)
    encoder = build(stride=stride, class_token=False)
    grid = tokens(encoder, np.arange(length, dtype=float), np.arange(60.0)).grid
    assert int(grid.valid[0].sum()) == len(starts)
    centres = [np.mean(np.arange(s, min(s + 8, length))) for s in starts]
    np.testing.assert_allclose(grid.coords[0, : len(starts), 0], centres)
    assert tokens(encoder, np.arange(length, dtype=float)).grid.shape == (len(starts),)


def test_every_step_changes_its_own_window_only():
    encoder = build()
    base = np.random.default_rng(0).normal(size=20)
    before = tokens(encoder, base)
    for step in range(20):
        changed = base.copy()
        changed[step] += 1
        differs = (tokens(encoder, changed).values - before.values).abs().amax(-1)[0] > 1e-6
        assert differs.tolist() == [False] + [step // 8 == i for i in range(3)]


def test_a_gap_is_known_and_is_not_a_zero():
    encoder = build(class_token=False)
    gap, zero = ([1.0, 2, 3, 4, x, 6, 7, 8] for x in (None, 0))
    assert (tokens(encoder, gap).values - tokens(encoder, zero).values).abs().max() > 0.01
    # A constant has the same shape, mean and spread with a gap as without: only the mask tells.
    holed, whole = ([5.0, 5, 5, x, 5, 5, 5, 5] for x in (None, 5))
    assert (tokens(encoder, holed).values - tokens(encoder, whole).values).abs().max() > 0.01


def test_values_that_are_not_observed_do_not_count():
    encoder = build(normalize="series")
    inputs = encoder.collate([encoder.prepare([1.0, None, 3, 5] * 4)])
    filled = {**inputs, "values": torch.where(inputs["observed"], inputs["values"], 1e9)}
    with torch.no_grad():
        assert torch.equal(encoder(inputs).tokens.values, encoder(filled).tokens.values)


def test_a_window_without_observations_makes_no_token():
    encoder = build(channels=2, class_token=False)
    values = np.ones((24, 2))
    values[8:16] = np.nan
    values[16:, 0] = np.nan
    assert tokens(encoder, values).grid.valid.tolist() == [[True, False, True]]
    assert tokens(encoder, values).grid.shape is None
    grid = tokens(build(channels=2, channel_tokens=True, class_token=False), values).grid
    assert grid.valid.tolist() == [[True, False, False, True, False, True]]


def test_positions_go_by_time_not_by_index():
    encoder = build(time_scale=0.5, class_token=False)
    even = {"values": WAVE, "times": np.arange(40) * 0.5}
    late = {"values": WAVE, "times": np.where(np.arange(40) < 8, np.arange(40), np.arange(40) + 100) * 0.5}
    usual = tokens(build(class_token=False), WAVE)
    torch.testing.assert_close(tokens(encoder, even).values, usual.values)
    moved = tokens(encoder, late)
    torch.testing.assert_close(moved.values[:, 0], usual.values[:, 0])
    assert (moved.values[:, 1] - usual.values[:, 1]).abs().max() > 0.1
    assert moved.grid.coords[0, :2, 0].tolist() == [3.5 * 0.5, 111.5 * 0.5]
    expected = usual.values[0, 1] - sincos(torch.tensor(11.5 / 8), 32) + sincos(torch.tensor(111.5 / 8), 32)
    torch.testing.assert_close(moved.values[0, 1], expected)


@pytest.mark.parametrize("irregular", [True, False])
def test_spacing_inside_a_window_is_seen_if_asked_for(irregular: bool):
    encoder = build(irregular=irregular)
    even = tokens(encoder, {"values": np.arange(8.0), "times": [0, 1, 2, 3, 4, 5, 6, 7]}).values
    uneven = tokens(encoder, {"values": np.arange(8.0), "times": [0, 0.5, 2, 3, 4, 5, 6.5, 7]}).values
    assert ((even - uneven).abs().max() > 0.01) == irregular


def test_spacing_is_known_by_its_shape_and_by_its_size():
    encoder = build(irregular=True, class_token=False)
    times = np.array([0, 0.5, 1, 1.5, 2, 4, 5.5, 7])

    def without_position(times: np.ndarray) -> torch.Tensor:
        made = tokens(encoder, {"values": np.arange(8.0), "times": times})
        return made.values[0, 0] - sincos(made.grid.coords[0, 0, 0] / 8, 32)

    usual = without_position(times)
    assert (usual - without_position(7 - times[::-1])).abs().max() > 0.01  # mirrored: of the same spread
    assert (usual - without_position(times * 3)).abs().max() > 0.01


def test_sincos_is_the_formula():
    places = torch.tensor([0.0, 0.5, 100.25])
    expected = [[f(p / 10000 ** (2 * i / 6)) for f in (np.sin, np.cos) for i in range(3)] for p in places.tolist()]
    np.testing.assert_allclose(sincos(places, 6), expected, atol=1e-5)


# --- channels --------------------------------------------------------------------------------------------------------


def test_one_token_a_window_mixes_channels_and_knows_which_is_which():
    encoder = build(channels=2)
    values = np.random.default_rng(0).normal(size=(16, 2))
    assert tokens(encoder, values).grid.shape == (2,)
    assert (pooled(encoder, values) - pooled(encoder, values[:, ::-1].copy())).abs().max() > 0.01


def test_channel_tokens_are_channel_by_channel_with_coordinates_and_names():
    encoder = build(channels=2, channel_tokens=True, class_token=False)
    values = np.random.default_rng(0).normal(size=(16, 2))
    made = tokens(encoder, values)
    assert made.grid.shape == (2, 2)
    assert made.grid.coords[0].tolist() == [[3.5, 0], [11.5, 0], [3.5, 1], [11.5, 1]]
    turned = tokens(encoder, values[:, ::-1].copy()).values
    name = encoder.channel_embedding.detach()[:, 0]
    torch.testing.assert_close(made.values[:, :2] - name[0], turned[:, 2:] - name[1])
    assert (made.values[:, :2] - turned[:, 2:]).abs().max() > 0.01


def test_any_number_of_channels_gives_each_its_tokens_and_no_name():
    encoder = build(channels="any", class_token=False)
    values = np.random.default_rng(0).normal(size=(16, 3))
    made = tokens(encoder, values, values[:, 1:2])
    assert made.grid.valid[1].tolist() == [True] * 2 + [False] * 4
    torch.testing.assert_close(made.values[1, :2], made.values[0, 2:4])
    assert (pooled(encoder, values) - pooled(encoder, values[:, ::-1].copy())).abs().max() < 1e-5


# --- learned before training -----------------------------------------------------------------------------------------


def test_fit_learns_mean_and_spread_of_each_channel_over_observed_values(tmp_path: Path):
    rng = np.random.default_rng(0)
    parts = [rng.normal([1e6, -2], [3, 0.1], (n, 2)) for n in (5, 40, 300)]
    parts[1][3:9, 0] = np.nan
    learned = learn([parts[0], "no such file", None, parts[1], np.ones((4, 3)), {"values": parts[2]}], 2)
    everything = np.concatenate(parts).astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(learned.mean, np.nanmean(everything, 0), rtol=1e-12)
    np.testing.assert_allclose(learned.std, np.nanstd(everything, 0), rtol=1e-9)
    pooled_all = learn(parts, None)
    np.testing.assert_allclose(pooled_all.mean, [np.nanmean(everything)], rtol=1e-9)
    np.testing.assert_allclose(pooled_all.std, [np.nanstd(everything)], rtol=1e-9)


def test_fit_learns_the_usual_interval(tmp_path: Path):
    days = np.array(["2024-01-01", "2024-01-02", "2024-01-03", "2024-03-01"], "M8[D]")
    series = {"values": np.arange(4.0), "times": days}
    assert learn([series, series, np.arange(3.0)], 1).interval == 86400
    assert learn([[1.0]], 1).interval == 1
    assert learn([{"values": [1, 2], "times": [3, 3]}], 1).interval == 1


def test_a_constant_channel_has_spread_one_and_an_unseen_one_is_an_error():
    assert learn([np.full((5, 1), 3.0)], 1).std == (1.0,)
    with pytest.raises(ValueError, match="no value for channel 1"):
        learn([[[1, None], [2, None]]], 2)
    with pytest.raises(ValueError, match="no readable series"):
        learn([None, "nowhere"], 2)


def test_fitted_normalisation_is_applied_saved_and_wanted(tmp_path: Path):
    chosen = component("encoders", "series-patch", **SMALL, channels=2, normalize="fit", time_scale=None)
    with pytest.raises(ValueError, match=r"normalize 'fit' is learned .* SeriesPatch\.fit"):
        chosen.build()
    values = np.random.default_rng(0).normal([5, -100], [2, 30], (50, 2))
    chosen.cls.fit(chosen.config, [{"values": values, "times": np.arange(50) * 10}], tmp_path)
    torch.manual_seed(0)
    encoder = chosen.cls(chosen.config, files=tmp_path).eval()
    assert encoder.time_scale == 10
    inputs = encoder.collate([encoder.prepare(values)])
    torch.testing.assert_close(inputs["values"][0].double(), torch.tensor(values), rtol=1e-6, atol=1e-5)
    normal = encoder.normalize(inputs["values"], inputs["observed"])[0]
    torch.testing.assert_close(normal.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    # The encoder that takes values as they are gives the same for values that someone else has normalised.
    plain = build(channels=2, time_scale=10)
    plain.load_state_dict(encoder.state_dict())
    given = {"values": normal.numpy(), "times": np.arange(50) * 10}
    torch.testing.assert_close(
        tokens(plain, given).values, tokens(encoder, {"values": values, "times": np.arange(50) * 10}).values,
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    other = tmp_path / "saved"
    other.mkdir()
    encoder.save_files(other)
    saved = json.loads((other / "normalization.json").read_text())
    assert saved["interval"] == 10
    assert len(saved["mean"]) == 2


def test_values_far_beyond_the_training_split_stay_finite(tmp_path: Path):
    chosen = component("encoders", "series-patch", **SMALL, normalize="fit")
    chosen.cls.fit(chosen.config, [WAVE * 1e-20], tmp_path)
    encoder = chosen.cls(chosen.config, files=tmp_path).eval()
    assert pooled(encoder, WAVE * 1e30).isfinite().all()


def test_nothing_is_learned_or_written_unless_asked_for(tmp_path: Path):
    chosen = component("encoders", "series-patch", **SMALL)
    chosen.cls.fit(chosen.config, [], tmp_path)
    chosen.build().save_files(tmp_path)
    assert not list(tmp_path.iterdir())


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "message"), [
    ({"channels": "any", "channel_tokens": False}, "needs a token for each channel"),
    ({"stride": 9}, "stride=9 is more than patch=8"),
    ({"heads": 5}, "heads=5 does not divide width=32"),
    ({"scales": []}, "give at least one"),
    ({"patch": 1}, "greater than or equal to 2"),
    ({"channels": 0}, "channels"),
    ({"width": 33}, "multiple of 2"),
    ({"cut": "middle"}, "cut"),
])  # fmt: skip
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        component("encoders", "series-patch", **{**SMALL, **fields})


def test_tables_and_special_tokens_do_not_decay():
    named = build(channels=2, channel_tokens=True, irregular=True, registers=1).no_weight_decay()
    tables = {f"{part}.{kind}" for part in ("moments.0", "moments.1", "spacing") for kind in ("weight", "bias")}
    assert named == {"special", "channel_embedding"} | tables
