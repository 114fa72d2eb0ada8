"""The series view: each change is what its parameters say, alone or in any batch, and leaves padding and gaps alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmrep.config import ConfigError, component
from mmrep.modalities.time_series._resample import permutation, piecewise, warp
from mmrep.modalities.time_series.views import SeriesAugment
from mmrep.tokens import Inputs
from mmrep.views.view import Params

OFF = {"scale": [1, 1], "jitter": 0}
ALL = {
    "crop": [0.5, 0.9], "time_warp": 1.0, "permute": 4, "remove": 2, "add": 2, "magnitude_warp": 0.5,
    "scale": [0.5, 2], "jitter": 0.2, "drop_channels": 0.3, "gap": 0.3,
}  # fmt: skip
EACH = [{key: value} for key, value in ALL.items()]
LENGTHS = (50, 33, 8, 2, 1)


def view(**fields: Any) -> SeriesAugment:
    return component("views", "series-augment", **{**OFF, **fields}).build()


def batch(lengths: tuple[int, ...] = LENGTHS, channels: int = 2, gaps: bool = True) -> Inputs:
    longest = max(lengths)
    values = torch.zeros(len(lengths), longest, channels)
    observed, valid = torch.zeros_like(values, dtype=torch.bool), torch.zeros(len(lengths), longest, dtype=torch.bool)
    times = torch.zeros(len(lengths), longest)
    rng = np.random.default_rng(0)
    for row, n in enumerate(lengths):
        values[row, :n] = torch.tensor(np.cumsum(rng.normal(size=(n, channels)), 0) + 5)
        observed[row, :n] = torch.tensor(rng.random((n, channels)) < 0.85) if gaps and n > 5 else True
        times[row, :n] = torch.tensor(np.cumsum(rng.random(n)) - 0.5)
        times[row, :n] -= times[row, 0].clone()
        valid[row, :n] = True
    return {"values": values * observed, "observed": observed, "times": times, "valid": valid}


def seeds(n: int, first: int = 4) -> Tensor:
    return torch.arange(n) * 7919 + first


def run(inputs: Inputs, **fields: Any) -> tuple[Inputs, Params]:
    return view(**fields).batch(inputs, seeds(len(inputs["valid"])))


def test_neutral_ranges_change_nothing():
    inputs = batch()
    out, params = run(inputs)
    assert not params
    assert all(torch.equal(out[key], inputs[key]) for key in inputs)


@pytest.mark.parametrize("fields", [*EACH, ALL], ids=lambda f: "+".join(f))
def test_a_sample_is_changed_alone_as_in_a_batch_and_the_input_is_left(fields: dict[str, Any]):
    inputs = batch()
    before = {key: value.clone() for key, value in inputs.items()}
    together, params = run(inputs, **fields)
    assert all(torch.equal(before[key], inputs[key]) for key in inputs)
    changed = False
    for row, n in enumerate(LENGTHS):
        alone = {key: value[row : row + 1, :n] for key, value in inputs.items()}
        one, own = view(**fields).batch(alone, seeds(len(LENGTHS))[row : row + 1])
        for key in inputs:
            torch.testing.assert_close(one[key][0], together[key][row, :n], rtol=1e-4, atol=1e-4)
            assert not together[key][row, n:].any()
        for key in params:
            wanted = params[key][row, :n] if key == "source" else params[key][row]
            torch.testing.assert_close(own[key][0], wanted, rtol=1e-5, atol=1e-4)
        changed |= not torch.equal(together["values"][row], inputs["values"][row])
        assert together["observed"][row].any()
        assert not (together["observed"][row] & ~together["valid"][row, :, None]).any()
        assert not together["values"][row][~together["observed"][row]].any()
    assert changed


@pytest.mark.parametrize("fields", [*EACH, ALL], ids=lambda f: "+".join(f))
def test_more_channels_beside_it_do_not_change_a_channel(fields: dict[str, Any]):
    if "drop_channels" in fields:
        fields = {key: value for key, value in fields.items() if key != "drop_channels"}  # one channel is never dropped
    inputs = batch()
    first = {key: value[..., :1] if value.ndim == 3 else value for key, value in inputs.items()}
    # Without gaps: whether a crop is possible depends on what is observed in any channel.
    inputs["observed"] = inputs["observed"] | inputs["valid"][..., None]
    first["observed"] = inputs["observed"][..., :1]
    both, one = run(inputs, **fields)[0], run(first, **fields)[0]
    torch.testing.assert_close(one["values"], both["values"][..., :1])


@pytest.mark.parametrize(
    "fields", [ALL, {"jitter": 1.0, "add": 3, "magnitude_warp": 5, "remove": 3}], ids=["all", "big"]
)
@pytest.mark.parametrize("factor", [1e38 / 20, 1e-42, 0.0])
def test_extreme_values_stay_finite(fields: dict[str, Any], factor: float):
    inputs = batch()
    inputs["values"] = inputs["values"] * factor
    out, _ = run(inputs, **fields)
    assert out["values"].isfinite().all()
    assert out["values"].abs().max() <= 1e38


def test_other_seeds_give_other_changes_and_the_same_seed_the_same():
    inputs = batch((40, 40))
    inputs = {key: value[:1].expand(2, *value.shape[1:]) for key, value in inputs.items()}
    out, _ = view(**ALL).batch(inputs, torch.tensor([5, 5]))
    assert torch.equal(out["values"][0], out["values"][1])
    out, _ = view(**ALL).batch(inputs, torch.tensor([5, 6]))
    assert not torch.equal(out["values"][0], out["values"][1])


@pytest.mark.parametrize("fields", [{}, ALL], ids=["neutral", "all"])
def test_an_empty_batch_stays_empty(fields: dict[str, Any]):
    inputs = {key: value[:0] for key, value in batch().items()}
    out, _ = view(**fields).batch(inputs, seeds(0))
    assert out["values"].shape == inputs["values"].shape


def many(n: int = 400, length: int = 60, **fields: Any) -> tuple[Inputs, Inputs, Params]:
    inputs = batch((length,), gaps=False)
    inputs = {key: value.expand(n, *value.shape[1:]) for key, value in inputs.items()}
    return inputs, *run(inputs, **fields)


def test_crop_keeps_a_window_and_its_times_begin_at_zero():
    inputs, out, params = many(crop=[0.25, 0.75])
    assert params["length"].min() == 15
    assert params["length"].max() == 45
    assert params["start"].min() == 0
    assert (params["start"] + params["length"]).max() == 60
    for row in range(20):
        start, n = int(params["start"][row]), int(params["length"][row])
        torch.testing.assert_close(out["values"][row, :n], inputs["values"][row, start : start + n])
        torch.testing.assert_close(out["times"][row, :n], inputs["times"][row, start : start + n]
                                   - inputs["times"][row, start])  # fmt: skip
        assert out["valid"][row].sum() == n


def test_a_crop_or_warp_that_would_see_nothing_is_left_out():
    inputs = batch((30,) * 50, gaps=False)
    inputs["observed"] = torch.zeros_like(inputs["observed"])
    inputs["observed"][:, 14:16] = True
    inputs["values"] = inputs["values"] * inputs["observed"]
    for fields in ({"crop": [0.1, 0.3]}, {"time_warp": 1.0}, {"gap": 1.0}):
        out, params = run(inputs, **fields)
        assert out["observed"].any(1).any(1).all()
        kept = out["valid"].all(1) if "crop" in fields else params.get("source", params.get("gap"))
        assert len(kept.unique(dim=0)) > 1, "left out for some, done for others"
    out, params = run(inputs, crop=[0.1, 0.3])
    whole = params["length"] == 30
    assert whole.any()
    assert not params["start"][whole].any()
    assert torch.equal(out["values"][whole], inputs["values"][whole])


def test_time_warp_is_a_monotone_reading_from_end_to_end():
    inputs, out, params = many(time_warp=1.0, knots=3)
    source = params["source"]
    assert (source.diff(dim=1) > 0).all()
    assert torch.equal(source[:, 0], torch.zeros(400))
    assert torch.equal(source[:, -1], torch.full((400,), 59.0))
    assert params["speed"].min() > np.exp(-1) - 1e-6
    assert params["speed"].max() < np.exp(1) + 1e-6
    assert params["speed"].std() > 0.3
    for row in range(10):
        for channel in range(2):
            expected = np.interp(source[row], np.arange(60), inputs["values"][row, :, channel])
            np.testing.assert_allclose(out["values"][row, :, channel], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(out["times"], inputs["times"])


def test_warp_speed_is_the_slope_of_the_reading():
    places = warp(torch.tensor([[1.0, 3.0]]), torch.tensor([9]), 11)[0]
    np.testing.assert_allclose(places, [0, 0.5, 1, 1.5, 2, 3.5, 5, 6.5, 8, 8, 8])


def test_time_warp_observes_only_what_lies_between_observed_values():
    inputs = batch((40,) * 30)
    out, params = run(inputs, time_warp=1.0)
    low, high = params["source"].floor().long(), params["source"].ceil().long()
    for row in range(30):
        expected = inputs["observed"][row][low[row]] & inputs["observed"][row][high[row]]
        assert torch.equal(out["observed"][row], expected)


def test_permute_moves_equal_segments():
    inputs, out, params = many(permute=5)
    counts = (params["segments"] >= 0).sum(1)
    assert set(counts.tolist()) == {1, 2, 3, 4, 5}
    for row in range(50):
        k = int(counts[row])
        order = params["segments"][row, :k].tolist()
        assert sorted(order) == list(range(k))
        bounds = [i * 60 // k for i in range(k + 1)]
        expected = torch.cat([inputs["values"][row, bounds[i] : bounds[i + 1]] for i in order])
        torch.testing.assert_close(out["values"][row], expected)
    assert len({tuple(row) for row in params["segments"][counts == 3].tolist()}) == 6


def test_permute_moves_segments_of_what_the_time_warp_read():
    inputs, out, params = many(n=20, time_warp=1.0, permute=4)
    warped, _ = run(inputs, time_warp=1.0)
    for row in range(20):
        order = [i for i in params["segments"][row].tolist() if i >= 0]
        bounds = [i * 60 // len(order) for i in range(len(order) + 1)]
        expected = torch.cat([warped["values"][row, bounds[i] : bounds[i + 1]] for i in order])
        torch.testing.assert_close(out["values"][row], expected)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_permutation_is_one_whatever_the_length(count: int):
    u = torch.rand(200, 7, generator=torch.Generator().manual_seed(0))
    order, moved = permutation(u, torch.full((200,), count), 20)
    for row in range(200):
        assert sorted(moved[row].tolist()) == list(range(20))
        assert moved[row, count:].tolist() == list(range(count, 20))
        assert (order[row] >= 0).sum() <= count


def spectrum(values: Tensor) -> Tensor:
    return torch.fft.rfft(values, dim=1).abs()


@pytest.mark.parametrize("length", [60, 61])
def test_remove_takes_exactly_those_frequencies_out(length: int):
    inputs, out, params = many(remove=3, length=length)
    before, after = spectrum(inputs["values"]), spectrum(out["values"])
    assert params["removed"].min() == 1
    assert params["removed"].max() == (length - 1) // 2
    for row in range(20):
        gone = params["removed"][row].unique()
        kept = torch.tensor([f for f in range(before.shape[1]) if f not in gone])
        assert after[row, gone].max() < 1e-3
        torch.testing.assert_close(after[row, kept], before[row, kept], rtol=1e-3, atol=1e-2)


def test_add_puts_in_waves_of_the_size_of_the_spread():
    inputs, out, params = many(add=1, wave=0.5)
    change = spectrum(out["values"] - inputs["values"]) * 2 / 60
    spread = inputs["values"][0].std(0, correction=0)
    size = change.amax(1) / spread
    assert size.max() < 0.5 + 1e-3
    assert size.max() > 0.45
    assert size.min() < 0.05
    assert torch.equal(change[:, :, 0].argmax(1), params["added"][:, 0])
    torch.testing.assert_close(size[:, 0], size[:, 1], rtol=1e-2, atol=1e-3)


def test_a_series_too_short_for_a_frequency_is_left_alone():
    inputs = batch((2, 1))
    out, params = run(inputs, remove=2, add=2)
    assert not params["removed"].any()
    assert not params["added"].any()
    torch.testing.assert_close(out["values"], inputs["values"])


def test_scale_is_log_uniform_and_one_a_channel():
    inputs, out, params = many(scale=[0.25, 4])
    torch.testing.assert_close(out["values"], inputs["values"] * params["scale"][:, None])
    logs = params["scale"].log() / np.log(4)
    assert logs.abs().max() <= 1
    assert logs.mean().abs() < 0.1
    assert (logs.std() - 3**-0.5).abs() < 0.05
    assert (params["scale"][:, 0] != params["scale"][:, 1]).all()


def test_magnitude_warp_goes_from_knot_to_knot():
    inputs, out, params = many(magnitude_warp=0.5, knots=2, length=61)
    factor = out["values"] / inputs["values"]
    torch.testing.assert_close(factor[:, [0, 30, 60]], params["magnitude"], rtol=1e-3, atol=1e-3)
    middle = (params["magnitude"][:, 0] * params["magnitude"][:, 1]).sqrt()
    torch.testing.assert_close(factor[:, 15], middle, rtol=1e-3, atol=1e-3)
    assert params["magnitude"].max() < np.exp(0.5)
    assert params["magnitude"].min() > np.exp(-0.5)


def test_piecewise_is_numpy_interp():
    knots = torch.rand(3, 5, 2)
    got = piecewise(knots, torch.tensor([9, 4, 1]), 9)
    for row, n in enumerate((9, 4, 1)):
        for channel in range(2):
            places = np.arange(n) / max(n - 1, 1) * 4
            np.testing.assert_allclose(got[row, :n, channel], np.interp(places, range(5), knots[row, :, channel]),
                                       rtol=1e-5)  # fmt: skip


def test_jitter_is_normal_noise_of_the_size_of_the_spread():
    inputs, out, _ = many(jitter=0.1)
    noise = (out["values"] - inputs["values"]) / (0.1 * inputs["values"][0].std(0, correction=0))
    flat = noise.flatten()
    assert flat.mean().abs() < 0.02
    assert (flat.std() - 1).abs() < 0.02
    assert ((flat.abs() < 1).float().mean() - 0.6827).abs() < 0.01
    assert ((flat.abs() < 2).float().mean() - 0.9545).abs() < 0.01
    pairs = [noise[:, :, 0] * noise[:, :, 1], noise[:, 1:] * noise[:, :-1], noise[1:] * noise[:-1]]
    assert all(pair.mean().abs() < 0.02 for pair in pairs)


def test_a_constant_channel_gets_no_noise():
    inputs = batch((20,), gaps=False)
    inputs["values"] = torch.full_like(inputs["values"], 1e6 / 3)
    assert torch.equal(run(inputs, jitter=1.0, add=2)[0]["values"], inputs["values"])


def test_dropped_channels_are_unobserved_and_one_stays():
    inputs, out, params = many(drop_channels=0.5)
    assert torch.equal(out["observed"], inputs["observed"] & ~params["dropped"][:, None])
    share = params["dropped"].float().mean(0)
    assert ((share > 0.15) & (share < 0.35)).all()  # a quarter: where both would go, none does
    assert not params["dropped"].all(1).any()


def test_a_gap_is_one_hidden_stretch():
    _, out, params = many(gap=0.5)
    assert params["gap"][:, 1].max() == 30
    assert params["gap"][:, 0].min() == 0
    assert params["gap"].sum(1).max() == 60
    for row in range(30):
        start, size = params["gap"][row].tolist()
        expected = torch.ones(60, 2, dtype=torch.bool)
        expected[start : start + size] = False
        assert torch.equal(out["observed"][row], expected)


@pytest.mark.parametrize(("fields", "message"), [
    ({"crop": [0.9, 0.5]}, "crop: the lowest, 0.9, is above the highest, 0.5"), ({"scale": [2, 1]}, "scale"),
    ({"jitter": -1}, "jitter"), ({"scale": [0, 1]}, "scale"), ({"crop": [0.5, 1.5]}, "crop"),
    ({"permute": 0}, "permute"),
    ({"gaps": 0.1}, "did you mean 'gap'"),
])  # fmt: skip
def test_impossible_ranges_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        component("views", "series-augment", **fields)


def test_the_role_is_what_the_config_says():
    assert view(role="corrupt").role == "corrupt"


def test_an_encoder_reads_what_the_view_gives():
    torch.manual_seed(0)
    encoder = component("encoders", "series-patch", channels=2, patch=8, width=16, depth=1, heads=2).build().eval()
    inputs = encoder.collate([encoder.prepare(raw) for raw in encoder.examples(8, 0)])
    for first in range(20):
        out, _ = view(**ALL).batch(inputs, seeds(8, first))
        with torch.no_grad():
            encoded = encoder(out).tokens
        assert (encoded.grid.valid & ~encoded.grid.special).any(1).all()
        assert encoded.values.isfinite().all()
