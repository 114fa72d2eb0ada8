"""What a series' tokens are made from: the values of windows; a hidden window's mean and spread are hidden, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmrep.config import component

T = 50


def small(**fields):
    torch.manual_seed(0)
    how = {"channels": 2, "patch": 8, "width": 32, "depth": 2, "heads": 2, **fields}
    return component("encoders", "series-patch", **how).build().eval()


def series(seed: int) -> np.ndarray:
    """Two channels of very different size, with a gap in the second."""
    noise = np.random.default_rng(seed).normal(size=(T, 2)).cumsum(0).astype(np.float32)
    values = noise * np.array([1.0, 1e3], np.float32) + np.array([5.0, -2e4], np.float32)
    values[20:24, 1] = np.nan
    return values


def batch(encoder, *seeds: int):
    return encoder.collate([encoder.prepare(series(seed)) for seed in seeds])


@pytest.mark.parametrize("channel_tokens", [False, True])
@pytest.mark.parametrize("normalize", ["none", "series"])
def test_windows_times_spread_plus_mean_are_the_series(normalize: str, channel_tokens: bool):
    encoder = small(normalize=normalize, channel_tokens=channel_tokens, registers=1)
    content = encoder.content(batch(encoder, 0, 1))
    values, seen = content.values[:, 2:], content.observed[:, 2:]
    n = -(-T // 8)
    for i in range(2):
        raw = series(i)
        mean, spread = np.nanmean(raw.astype(float), 0), np.nanstd(raw.astype(float), 0)
        if channel_tokens:
            back, there = (part[i].view(2, n * 8).T for part in (values, seen))
        else:
            back, there = (part[i].view(n, 2, 8).transpose(1, 2).reshape(n * 8, 2) for part in (values, seen))
        assert torch.equal(there[:T], torch.from_numpy(~np.isnan(raw)))
        assert not there[T:].any()
        assert not back[~there].any()
        given = (back[:T].double().numpy() * spread + mean)[~np.isnan(raw)]
        np.testing.assert_allclose(given, raw[~np.isnan(raw)], rtol=2e-5, atol=1e-4)


def test_windows_that_overlap_have_their_common_steps_both():
    encoder = small(channels=1, stride=4, class_token=False)
    content = encoder.content(encoder.collate([encoder.prepare(series(0)[:, 0])]))
    assert torch.equal(content.values[0, :-2, 4:], content.values[0, 1:-1, :4])


def test_values_as_they_are_and_fixed_units_differ_by_the_fixed_units(tmp_path):
    chosen = component("encoders", "series-patch", channels=2, patch=8, width=32, depth=1, heads=2, normalize="fit")
    chosen.cls.fit(chosen.config, [series(0), series(1)], tmp_path)
    encoder = chosen.build(files=tmp_path)
    content = encoder.content(batch(encoder, 0))
    back = content.values[0, 1:].view(-1, 2, 8).transpose(1, 2).reshape(-1, 2)[:T] * encoder.std + encoder.mean
    known = ~np.isnan(series(0))
    np.testing.assert_allclose(back.numpy()[known], series(0)[known], rtol=2e-5, atol=1e-3)


@pytest.mark.parametrize("channel_tokens", [False, True])
def test_mean_and_spread_of_a_hidden_window_are_hidden(channel_tokens: bool):
    encoder, token = small(channel_tokens=channel_tokens), torch.randn(32)
    inputs = batch(encoder, 0)
    moved = {**inputs, "values": inputs["values"].clone()}
    moved["values"][:, 8:16] *= 100  # of the second window: its shape stays
    one, two = encoder.tokenize(inputs), encoder.tokenize(moved)
    changed = (one.values != two.values).any(-1)
    assert int(changed.sum()) == 1 + channel_tokens
    hidden = changed.nonzero()[:, 1][None]
    a, b = (encoder.encode(t.hide(hidden, token)).tokens.values for t in (one, two))
    assert torch.equal(a, b)


def test_positions_are_time_and_channel():
    encoder = small(channel_tokens=True)
    one, two = (encoder.tokenize(batch(encoder, seed)) for seed in (0, 1))
    assert torch.equal(one.positions, two.positions)
    n = -(-T // 8)
    by_channel = one.positions[0, 1:].view(2, n, 32)
    torch.testing.assert_close(
        by_channel[1] - by_channel[0], (encoder.channel_embedding[1] - encoder.channel_embedding[0]).expand(n, -1)
    )
    assert (by_channel[0, 1:] - by_channel[0, :-1]).abs().amax(1).min() > 0.1
