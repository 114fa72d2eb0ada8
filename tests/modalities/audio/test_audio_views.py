"""Audio augmentation: seeded per clip, neutral where told so, and torchaudio's noise, speed and masks."""

from __future__ import annotations

import pytest
import torch
import torchaudio

from mmrep.config import ConfigError, component
from mmrep.modalities.audio._signals import signal
from mmrep.modalities.audio.decode import Waveform
from mmrep.modalities.audio.spectrogram import AudioSpectrogram
from mmrep.modalities.audio.views import AudioAugment, SpecAugment, reverberate
from mmrep.views import View

NEUTRAL = {"speed": [1.0, 1.0], "gain": [0.0, 0.0], "polarity": 0.0, "noise": 0.0}
STRONG = {"gain": [-20.0, 10.0], "polarity": 0.5, "shift": 0.5, "noise": 0.7, "snr": [0.0, 20.0]}
SAMPLE = {"speed": [0.7, 1.4], "crop_seconds": 0.1, "reverb": 0.6}
SEEDS = torch.tensor([3, -(2**62), 5, 2**63 - 1, 11, 12])
LENGTHS = torch.tensor([900, 2_000, 1, 1_500, 77, 1_999])


def view(**fields) -> AudioAugment:
    return component("views", "audio-augment", **{**NEUTRAL, **fields}).build()


def masks(**fields) -> SpecAugment:
    return component("views", "spec-augment", **fields).build()


def waves(channels: int = 1) -> dict[str, torch.Tensor]:
    batch = torch.zeros(6, channels, 2_000)
    for row, (n, clip) in enumerate(zip(LENGTHS.tolist(), batch, strict=True)):
        for c in range(channels):
            clip[c, :n] = torch.from_numpy(signal("noise", n, 10 * row + c).astype("float32")) / (1 << 15)
    return {"wave": batch, "lengths": LENGTHS, "seconds": LENGTHS / 16_000}


def noise(n: int = 4_000, rate: int = 16_000) -> Waveform:
    return Waveform(torch.from_numpy(signal("noise", n, 0).astype("float32"))[None] / (1 << 15), rate)


def encoder(**fields) -> AudioSpectrogram:
    torch.manual_seed(0)
    return component("encoders", "audio-spectrogram", width=16, depth=1, heads=2, **fields).build().eval()


def test_they_are_views_with_roles():
    assert isinstance(view(), View)
    assert view(role="local").role == "local"
    assert masks(role="corrupt").role == "corrupt"
    for name in ("speed", "gain", "snr", "reverb_seconds"):
        with pytest.raises(ConfigError, match="is above the highest"):
            view(**{name: [2.0, 1.0]})


def test_neutral_ranges_change_nothing():
    clip, inputs = noise(), waves(2)
    assert torch.equal(view().sample(clip, 7).values, clip.values)
    assert torch.equal(view(level="sample").sample(clip, 7).values, clip.values)
    out, params = view().batch(inputs, SEEDS)
    assert torch.equal(out["wave"], inputs["wave"])
    assert torch.isinf(params["snr"]).all()


def test_a_clip_is_changed_alike_alone_and_in_any_batch():
    v, inputs = view(**STRONG), waves(2)
    together, params = v.batch(inputs, SEEDS)
    for i in range(6):
        n = int(LENGTHS[i])
        alone, own = v.batch(
            {"wave": inputs["wave"][i : i + 1, :, :n], "lengths": LENGTHS[i : i + 1]}, SEEDS[i : i + 1]
        )
        torch.testing.assert_close(alone["wave"][0], together["wave"][i, :, :n])
        assert together["wave"][i, :, n:].abs().sum() == 0, "padding stays silent"
        for name, value in params.items():
            torch.testing.assert_close(own[name][0], value[i])
    other, _ = v.batch(inputs, SEEDS + 1)
    changed = (other["wave"] - together["wave"]).abs().amax((1, 2))
    assert (changed > 0.01).all()
    assert v.batch({key: value[:0] for key, value in inputs.items()}, SEEDS[:0])[0]["wave"].shape == (0, 2, 2_000)


def test_samples_are_changed_by_their_seed_alone():
    v, clip = view(**SAMPLE), noise()
    torch.manual_seed(1)
    first = v.sample(clip, 5).values
    torch.manual_seed(2)
    assert torch.equal(v.sample(clip, 5).values, first)
    others = [v.sample(clip, seed).values for seed in range(20)]
    assert sum(torch.equal(a, first) for a in others) == 1
    assert all(a.shape == (1, 1_600) for a in others)


def test_gain_polarity_and_shift_are_what_the_parameters_say():
    inputs = waves()
    out, p = view(gain=[-12.0, 6.0], polarity=0.5, shift=0.5).batch(inputs, SEEDS)
    assert 0 < p["polarity"].sum() < 6
    for i, n in enumerate(LENGTHS.tolist()):
        twin = torch.roll(inputs["wave"][i, :, :n], int(p["shift"][i]), dims=1)
        twin = torchaudio.functional.gain(twin, p["gain"][i].item()) * (-1 if p["polarity"][i] else 1)
        torch.testing.assert_close(out["wave"][i, :, :n], twin)
        assert abs(p["shift"][i]) <= n / 2 + 0.5
    assert p["shift"].dtype == torch.long


def test_noise_has_the_ratio_that_the_parameters_say():
    inputs = waves(2)
    out, p = view(noise=0.6, snr=[3.0, 30.0]).batch(inputs, SEEDS)
    added = out["wave"] - inputs["wave"]
    quiet = p["snr"].isinf()
    assert 0 < quiet.sum() < 6
    assert added[quiet].abs().max() == 0
    power = inputs["wave"].square().sum(2) / added.square().sum(2)
    torch.testing.assert_close((10 * power.log10())[~quiet], p["snr"][~quiet, None].expand(-1, 2), atol=0.05, rtol=0)
    every = view(noise=1.0).batch(inputs, SEEDS)[0]["wave"] - inputs["wave"]
    assert abs(torch.corrcoef(every[1])[0, 1]) < 0.1, "channels have noise of their own"
    spectrum = torch.fft.rfft(every[1, 0]).abs().square()
    assert 0.7 < spectrum[10:500].mean() / spectrum[500:990].mean() < 1.4, "white"
    silent = {**inputs, "wave": torch.zeros(6, 2, 2_000)}
    assert view(noise=1.0).batch(silent, SEEDS)[0]["wave"].abs().max() == 0


def test_ranges_hold_and_are_used():
    seeds = torch.arange(3_000)
    inputs = {"wave": torch.ones(3_000, 1, 8), "lengths": torch.full((3_000,), 8)}
    _, p = view(**STRONG).batch(inputs, seeds)
    loud = p["snr"][~p["snr"].isinf()]
    for values, low, high in ((p["gain"], -20, 10), (loud, 0, 20)):
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
    assert p["shift"].unique().tolist() == list(range(-4, 5))
    assert abs(p["polarity"].float().mean() - 0.5) < 0.04
    assert abs(len(loud) / 3_000 - 0.7) < 0.04
    draws = torch.stack([p["gain"], p["polarity"].float(), p["shift"].float(), p["snr"].isinf().float()])
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.08


def test_speed_is_torchaudios():
    clip = noise(3_200)
    lengths = set()
    for seed in range(30):
        out = view(speed=[0.8, 1.25]).sample(clip, seed)
        lengths.add(out.values.shape[1])
        assert out.sampling_rate == 16_000
    assert min(lengths) >= 3_200 / 1.25
    assert max(lengths) <= 3_200 / 0.8
    assert len(lengths) > 15
    twin, _ = torchaudio.functional.speed(clip.values, 100, 1.25)
    torch.testing.assert_close(view(speed=[1.25, 1.25]).sample(clip, 0).values, twin)


def test_crops_are_parts_and_reach_both_ends():
    clip = Waveform(torch.arange(1.0, 21.0)[None], 8_000)
    starts = set()
    for seed in range(300):
        out = view(crop_seconds=16 / 8_000).sample(clip, seed).values[0]
        assert out.tolist() == list(range(int(out[0]), int(out[0]) + 16))
        starts.add(int(out[0]))
    assert starts == {1, 2, 3, 4, 5}
    assert torch.equal(view(crop_seconds=1.0).sample(clip, 0).values, clip.values)


def test_reverberation_decays_by_60_db_in_its_time():
    rate, seconds = 8_000, 0.5
    click = torch.zeros(1, 6_000)
    click[0, 0] = 1
    response = reverberate(click, seconds, rate, torch.tensor([4]))[0] * 2**0.5
    torch.testing.assert_close(response[0].item(), 1.0, rtol=1e-4, atol=0)
    torch.testing.assert_close(response[1:].norm().item(), 1.0, rtol=1e-3, atol=0)
    energy = response[1:4_001].square().reshape(10, 400).mean(1)
    fall = 10 * (energy[0] / energy[9]).log10()
    assert abs(fall - 60 * 0.9) < 3
    assert response[4_001:].abs().max() < 1e-5
    assert view(reverb=1.0).sample(noise(), 1).values.shape == (1, 4_000)
    stereo = reverberate(torch.cat([click, 2 * click]), seconds, rate, torch.tensor([4]))
    torch.testing.assert_close(stereo[1], 2 * stereo[0])


def test_at_sample_level_the_same_happens_in_the_loader():
    inputs = waves()
    seeds = SEEDS[3:4]
    device, _ = view(**STRONG).batch({"wave": inputs["wave"][3:4], "lengths": LENGTHS[3:4]}, seeds)
    loader = view(**STRONG, level="sample")
    out = loader.sample(Waveform(inputs["wave"][3, :, :1_500], 16_000), int(seeds))
    torch.testing.assert_close(out.values, device["wave"][0, :, :1_500])
    assert loader.batch({"features": inputs["wave"]}, SEEDS)[1] == {}
    with pytest.raises(ValueError, match="set level: sample"):
        view().batch({"features": inputs["wave"]}, SEEDS)


# SpecAugment


def test_masks_are_alike_alone_and_in_any_batch():
    inputs = waves()
    together, params = masks().batch(inputs, SEEDS)
    assert params["mask_time"].shape == params["mask_mel"].shape == (6, 2, 2)
    assert torch.equal(together["mask_time"], params["mask_time"])
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    turned, _ = masks().batch({key: value[order] for key, value in inputs.items()}, SEEDS[order])
    e = encoder(class_token=False)
    long, _ = e.spectrogram(together)
    for i, n in enumerate(LENGTHS.tolist()):
        alone = {
            "wave": inputs["wave"][i : i + 1, :, :n],
            "lengths": LENGTHS[i : i + 1],
            "seconds": inputs["seconds"][i : i + 1],
        }
        own, counts = e.spectrogram(masks().batch(alone, SEEDS[i : i + 1])[0])
        torch.testing.assert_close(own[0], long[i, :, : int(counts)])
    torch.testing.assert_close(turned["mask_mel"], together["mask_mel"][order])
    other, _ = masks().batch(inputs, SEEDS + 1)
    assert ((other["mask_mel"] - together["mask_mel"]).abs().amax((1, 2)) > 1e-3).all()


def test_masks_have_the_widths_asked_for_and_reach_both_ends():
    n = 4_000
    seeds, seconds = torch.arange(n), torch.linspace(0.5, 4.0, n)
    _, p = masks(time=0.4, time_share=0.3, mel=0.25).batch({"seconds": seconds}, seeds)
    for spans, greatest in ((p["mask_time"], (0.4 / seconds).clamp_max(0.3)), (p["mask_mel"], torch.full((n,), 0.25))):
        width = spans[..., 1] - spans[..., 0]
        assert (width >= 0).all()
        assert (width <= greatest[:, None] + 1e-6).all()
        assert abs((width / greatest[:, None]).mean() - 0.5) < 0.02
        assert spans.min() < 0.005
        assert spans.max() > 0.995
        assert (spans >= 0).all()
        assert (spans <= 1 + 1e-6).all()
        middle = spans.mean(2)
        assert abs(middle.mean() - 0.5) < 0.01
    draws = torch.stack(
        [p["mask_time"][:, 0, 0], p["mask_time"][:, 1, 0], p["mask_mel"][:, 0, 0], p["mask_mel"][:, 1, 0]]
    )
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.06


def test_masked_frames_and_bands_are_the_mean_and_the_rest_is_as_it_was():
    e, inputs = encoder(), waves()
    plain, counts = e.spectrogram(inputs)
    drawn = {
        "mask_time": torch.tensor([[[0.25, 0.5]]]).expand(6, -1, -1),
        "mask_mel": torch.tensor([[[0.0, 0.25], [0.75, 1.0]]]).expand(6, -1, -1),
    }
    out, _ = e.spectrogram({**inputs, **drawn})
    F = int(counts[1])  # 13 frames, of which those with middles in 3.25 .. 6.5 are masked: 3, 4, 5 (and 6 lies at 6.5)
    assert F == 13
    rows = torch.zeros(13, dtype=torch.bool)
    rows[3:6] = True
    bands = torch.zeros(64, dtype=torch.bool)
    bands[:16] = bands[48:] = True
    hidden = rows[:, None] | bands
    assert (out[1, 0, hidden] == 0).all()
    assert torch.equal(out[1, 0, ~hidden], plain[1, 0, ~hidden])
    assert (plain[1, 0, hidden] != 0).all()


def test_every_frame_and_band_is_masked_equally_often_but_at_the_ends():
    """The first and the last frame are reached as often as each other, and never left out."""
    n = 3_000
    inputs = {
        "wave": torch.ones(n, 1, 1_600) * 0.1,
        "lengths": torch.full((n,), 1_600),
        "seconds": torch.full((n,), 0.1),
    }
    e = encoder(mels=32, patch=[1, 32])
    drawn, _ = masks(time_masks=1, time_share=0.5, mel_masks=1, mel=0.5).batch(inputs, torch.arange(n))
    hidden = (e.spectrogram(drawn)[0][:, 0] == 0).float()
    times = hidden.amin(2).mean(0)  # share of clips in which a frame is masked in all bands
    bands = hidden.amin(1).mean(0)
    for shares in (times, bands):
        assert shares[0] > 0.01
        assert abs(shares[0] - shares[-1]) < 0.02
        assert shares.argmax() not in (0, len(shares) - 1)


@pytest.mark.parametrize("fields", [{"time_masks": 0}, {"mel_masks": 0}, {"time_masks": 0, "mel_masks": 0}])
def test_no_masks(fields: dict):
    out, params = masks(**fields).batch(waves(), SEEDS)
    assert params["mask_time"].shape[1] == fields.get("time_masks", 2)
    mel, _ = encoder().spectrogram(out)
    if len(fields) == 2:
        assert torch.equal(mel, encoder().spectrogram(waves())[0])
    empty = {key: value[:0] for key, value in waves().items()}
    assert masks(**fields).batch(empty, SEEDS[:0])[1]["mask_mel"].shape[0] == 0
    assert encoder()(masks(**fields).batch(empty, SEEDS[:0])[0]).tokens.values.shape[0] == 0


def test_augmentation_may_end_in_masks():
    v = view(**STRONG, masks={"time_masks": 3, "mel": 0.1})
    out, params = v.batch(waves(), SEEDS)
    assert set(params) == {"gain", "polarity", "shift", "snr", "mask_time", "mask_mel"}
    assert out["mask_time"].shape == (6, 3, 2)
    assert torch.equal(params["mask_mel"], masks(time_masks=3, mel=0.1).batch(waves(), SEEDS)[1]["mask_mel"])
    draws = torch.stack([params["gain"], params["mask_time"][:, 0, 1]])
    assert abs(torch.corrcoef(draws)[0, 1]) < 0.95, "the masks are drawn apart from the rest"


def test_an_encoder_without_a_spectrogram_refuses_masks():
    e = component("encoders", "audio-wave", width=16, depth=1, heads=2, conv_width=8).build()
    with pytest.raises(ValueError, match="audio-wave has none"):
        e(masks().batch(waves(), SEEDS)[0])
