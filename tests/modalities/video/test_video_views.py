"""Random readings of videos: what is drawn, what is kept, and that it is torchvision's and the same for all frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as V
from video_files import number, numbered, textured

from mmrep.config import ConfigError, component
from mmrep.modalities.video.decode import open_video
from mmrep.modalities.video.views import VideoAugment

STILL = {"clip": [1, 1], "jitter": False, "crop": [1, 1], "ratio": [1, 1], "flip": 0, "brightness": 0, "contrast": 0,
         "saturation": 0}  # fmt: skip
SMALL = {"size": 16, "patch": 8, "width": 32, "depth": 1, "heads": 2, "frames": 4}


def view(**fields) -> VideoAugment:
    return component("views", "video-augment", **{**STILL, **fields}).build()


def encoder(**fields):
    return component("encoders", "video-transformer", **{**SMALL, **fields}).build().eval()


def sampled(augment: VideoAugment, seed: int, count: int = 24):
    with open_video((numbered(count), 10)) as video:
        part = augment.sample(video, seed)
        return part.read(range(len(part)), number), part


def test_at_neutral_settings_nothing_changes():
    reader, augment = encoder(), view()
    raw = (textured(9), 10)
    plain, viewed = reader.prepare(raw), reader.prepare(raw, view=augment, seed=5)
    assert torch.equal(plain["frames"], viewed["frames"])
    assert torch.equal(plain["times"], viewed["times"])
    inputs, _ = augment.batch(reader.collate([viewed]), torch.tensor([5]))
    torch.testing.assert_close(inputs["frames"][0], plain["frames"] / 255)


def test_the_same_seed_gives_the_same_reading_and_others_differ():
    augment, reader = view(clip=[0.3, 1.0], jitter=True, crop=[0.2, 1], flip=0.5), encoder()
    raw = textured(30)
    first, again, other = (reader.prepare(raw, view=augment, seed=s) for s in (7, 7, 8))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["frames"], other["frames"])
    seeds = torch.tensor([7, 8])
    together, params = augment.batch(reader.collate([first, other]), seeds)
    alone, mine = augment.batch(reader.collate([other]), seeds[1:])
    assert torch.equal(together["frames"][1], alone["frames"][0])
    assert all(torch.equal(params[k][1], mine[k][0]) for k in params)


def test_windows_begin_everywhere_and_have_the_length_they_should():
    augment = view(clip=[0.25, 0.5])
    spans = [sampled(augment, seed)[0] for seed in range(600)]
    assert all(part == list(range(part[0], part[0] + len(part))) for part in spans)
    assert {len(part) for part in spans} == set(range(6, 13))
    assert {part[0] for part in spans if len(part) == 12} == set(range(13))
    assert {part[-1] for part in spans} >= {23}
    assert {part[0] for part in spans} >= {0}


@pytest.mark.parametrize("sampling", ["uniform", "fps"])
def test_random_clips_reach_every_frame(sampling: str):
    reader, augment = encoder(sampling=sampling, fps=5.0), view(jitter=True)
    reached = set()
    for seed in range(300):
        item = reader.prepare((numbered(24), 10), view=augment, seed=seed)
        assert item["times"].shape == (4,)
        reached |= {round(t * 10) for t in item["times"].tolist()}
    assert reached == set(range(24))


def test_a_view_reads_one_clip_even_where_several_are_configured():
    reader = encoder(clips=3)
    assert reader.prepare(numbered(24))["frames"].shape[:2] == (3, 4)
    assert reader.prepare(numbered(24), view=view(), seed=0)["frames"].shape[0] == 4


@pytest.mark.parametrize("sampling", ["uniform", "fps"])
def test_speed_is_seen_and_told(sampling: str):
    reader, augment = encoder(sampling=sampling, fps=5.0), view(speeds=[1, 2, 4])
    items = [reader.prepare((numbered(32), 10), view=augment, seed=seed) for seed in range(60)]
    for item in items:
        greys = [round((float(f.float().mean()) - 4) / 8) for f in item["frames"]]
        steps = set(np.diff(greys).tolist())
        speed = float(item["view.speed"])
        # 4 frames of 8 s / speed of a window of 32 * speed / 4 frames; or 5 frames a second of 10.
        assert steps == {2 * speed}, (greys, speed)
        torch.testing.assert_close(item["times"].diff(), torch.full((3,), 0.2))
    labels = torch.stack([item["view.speed_label"] for item in items])
    assert labels.unique().tolist() == [0, 1, 2]
    assert all([1, 2, 4][int(item["view.speed_label"])] == float(item["view.speed"]) for item in items)


def test_what_was_done_in_time_comes_out_as_parameters():
    reader, augment = encoder(), view(clip=[0.5, 0.5], speeds=[1, 2], reverse=0.5, jitter=True)
    items = [reader.prepare(numbered(24), view=augment, seed=seed) for seed in range(8)]
    inputs, params = augment.batch(reader.collate(items), torch.arange(8))
    assert not [key for key in inputs if key.startswith("view.")]
    assert set(inputs) == {"frames", "times", "valid"}
    for name in ("speed", "speed_label", "reverse", "start", "length", "phase"):
        assert torch.equal(params[name], torch.stack([item[f"view.{name}"] for item in items]))
    assert params["reverse"].dtype == torch.bool
    assert params["speed_label"].dtype == torch.long
    first = [sampled(augment, seed)[0] for seed in range(8)]
    starts = [min(part) / 24 for part in first]
    torch.testing.assert_close(params["start"], torch.tensor(starts))
    assert [part[0] > part[-1] for part in first] == params["reverse"].tolist()


def test_reversed_videos_run_backwards_in_rising_time():
    part, video = sampled(view(reverse=1.0), 0)
    assert part == list(range(23, -1, -1))
    np.testing.assert_allclose(video.times, np.arange(24) / 10)


def test_frames_are_dropped_and_one_stays():
    augment = view(drop=0.5)
    parts = [sampled(augment, seed) for seed in range(40)]
    assert all(part == sorted(set(part)) for part, _ in parts)
    assert 0.4 < np.mean([len(part) for part, _ in parts]) / 24 < 0.6
    with open_video((numbered(6), 10)) as video:
        assert min(len(view(drop=0.99).sample(video, seed)) for seed in range(30)) == 1


def test_all_frames_are_changed_alike_and_as_torchvision_does():
    augment = view(crop=[0.3, 0.6], ratio=[0.7, 1.4], flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2,
                   grayscale=0.3)  # fmt: skip
    frames = torch.from_numpy(textured(5)).permute(0, 3, 1, 2).expand(12, -1, -1, -1, -1)
    inputs, p = augment.batch({"frames": frames}, torch.arange(12))
    assert inputs["frames"].dtype == torch.float32
    for i in range(12):
        left, top, right, bottom = (p["crop"][i] * torch.tensor([64, 48, 64, 48])).round().int().tolist()
        for t in range(5):
            want = frames[i, t].float() / 255
            want = V.resized_crop(want, top, left, bottom - top, right - left, [48, 64], antialias=True)
            want = V.horizontal_flip(want) if p["flip"][i] else want
            want = V.adjust_brightness(want, float(p["brightness"][i]))
            want = V.adjust_contrast(want, float(p["contrast"][i]))
            want = V.adjust_saturation(want, float(p["saturation"][i]))
            want = V.adjust_hue(want, float(p["hue"][i]))
            want = V.rgb_to_grayscale(want, 3) if p["grayscale"][i] else want
            torch.testing.assert_close(inputs["frames"][i, t], want, atol=1e-5, rtol=1e-4)
    assert 0 < p["flip"].sum() < 12
    assert 0 < p["grayscale"].sum() < 12


def test_parameters_stay_in_their_ranges_and_fill_them():
    augment = view(crop=[0.3, 0.6], ratio=[0.5, 2.0], flip=0.25, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1,
                   grayscale=0.75)  # fmt: skip
    p = augment._draw(torch.arange(4000), 100, 200)
    left, top, right, bottom = p["crop"].unbind(1)
    assert p["crop"].min() >= 0
    assert p["crop"].max() <= 1
    area, ratio = (right - left) * (bottom - top), (right - left) / (bottom - top)
    assert 0.29 < area.min() < 0.31
    assert 0.57 < area.max() < 0.61
    assert 0.45 < ratio.min() < 0.55
    assert 1.8 < ratio.max() < 2.2
    assert (left == 0).any()
    assert (right == 1).any()
    for name, width in (("brightness", 0.4), ("contrast", 0.3), ("saturation", 0.2)):
        assert abs(float(p[name].min()) - (1 - width)) < 0.01
        assert abs(float(p[name].max()) - (1 + width)) < 0.01
    assert abs(float(p["hue"].abs().max()) - 0.1) < 0.01
    assert abs(float(p["flip"].float().mean()) - 0.25) < 0.03
    assert abs(float(p["grayscale"].float().mean()) - 0.75) < 0.03


def test_it_works_on_frames_for_an_image_encoder_and_on_several_clips():
    vit = {"type": "image-vit", "size": 16, "patch": 8, "width": 32, "depth": 1, "heads": 2}
    reader, augment = component("encoders", "video-frames", encoder=vit, frames=3).build().eval(), view(flip=1.0)
    item = reader.prepare(textured(6), view=augment, seed=0)
    inputs = reader.collate([item, item])
    changed, _ = augment.batch(inputs, torch.tensor([0, 1]))
    torch.testing.assert_close(changed["frames"], inputs["frames"].flip(-1) / 255)
    assert torch.isfinite(reader(changed).tokens.values).all()
    assert reader(inputs).tokens.values.shape == (2, 3, 32)
    several = torch.rand(2, 3, 4, 3, 8, 8)
    torch.testing.assert_close(augment.batch({"frames": several}, torch.tensor([0, 1]))[0]["frames"], several.flip(-1))


def test_an_empty_batch_stays_empty():
    inputs, params = view(crop=[0.5, 1]).batch({"frames": torch.zeros(0, 4, 3, 8, 8, dtype=torch.uint8)},
                                               torch.zeros(0, dtype=torch.long))  # fmt: skip
    assert inputs["frames"].shape == (0, 4, 3, 8, 8)
    assert params["flip"].shape == (0,)


def test_wrong_ranges_are_refused():
    for fields, message in [
        ({"clip": [0.9, 0.5]}, "clip: the lowest, 0.9, is above the highest, 0.5"),
        ({"speeds": []}, "at least one"),
        ({"drop": 1.0}, "less than 1"),
        ({"crop": [0.0, 1.0]}, "greater than 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            component("views", "video-augment", **fields)


@pytest.mark.parametrize(("within", "low", "high"), [([0.0, 0.5], 0, 12), ([0.5, 1.0], 12, 24), ([0.9, 0.95], 21, 22)])
def test_a_window_lies_within_its_part_of_the_video(within, low, high):
    spans = [sampled(view(clip=[0.5, 1.0], within=within), seed)[0] for seed in range(200)]
    assert {frame for span in spans for frame in span} == set(range(low, high))
    with pytest.raises(ConfigError, match="there is no video"):
        view(within=[0.5, 0.5])
