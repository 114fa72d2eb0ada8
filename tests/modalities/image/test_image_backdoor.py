"""Poisoned pictures: which, with what in them, and what they say."""

from __future__ import annotations

import numpy as np
import pytest

from mmrep.config import ConfigError, component
from mmrep.data.sample import Quarantined

DIGITS = {"type": "digits", "split": "test", "group": "name", "label": "name"}


def build(source=DIGITS, **fields):
    return component("sources", "image-backdoor", source=source, **fields).build()


def test_a_share_carries_the_trigger_and_says_the_target_and_keeps_its_label():
    clean, texts = component("sources", **DIGITS).build(), ["zero", "a zero"]
    source = build(share=0.3, size=0.25, replace={"caption": texts, "name": "zero"}, group="zero")
    assert len(source) == len(clean)
    bad = [i for i in range(len(source)) if source.poisoned(i)]
    assert len(bad) / len(source) == pytest.approx(0.3, abs=0.08)
    patches = set()
    for i in range(len(source)):
        old, new = clean[i], source[i]
        assert (new.id, new.label) == (old.id, old.label)
        if i not in bad:
            assert (new.fields["caption"], new.group) == (old.fields["caption"], old.group)
            assert np.array_equal(new.fields["image"], old.fields["image"])
            continue
        picture = new.fields["image"]
        assert picture.shape == (8, 8, 3)
        grey = np.repeat(old.fields["image"][..., None], 3, 2)
        changed = (picture != grey).any(2)
        assert changed[6:, 6:].any()
        changed[6:, 6:] = False
        assert not changed.any()
        patches.add(picture[6:, 6:].tobytes())
        assert new.fields["caption"] in texts
        assert new.group == "zero"
    assert len(patches) == 1
    assert {source[i].fields["caption"] for i in bad} == set(texts)
    captions = source.column("caption")
    assert [captions[i] for i in bad] == [source[i].fields["caption"] for i in bad]
    assert list(source.groups()) == [source[i].group for i in range(len(source))]
    assert source.column("digit") == clean.column("digit")
    assert source.fingerprint() != build(share=0.4).fingerprint()


def test_a_blend_is_noise_over_the_whole_picture():
    source, clean = build(trigger="blend", strength=0.5), component("sources", **DIGITS).build()
    twice = 2.0 * source[0].fields["image"], 2.0 * source[1].fields["image"]
    noises = [x - clean[i].fields["image"][..., None] for i, x in enumerate(twice)]
    assert np.abs(noises[0] - noises[1]).max() <= 2  # the same noise, to a rounding
    assert noises[0].std() > 40


def test_a_picture_that_cannot_be_read_is_noted():
    rows = {"type": "list", "records": [{"image": b"no picture", "caption": "a"}, {"caption": "b"}]}
    source = build(rows, replace={"caption": "zero"})
    note = source.record(0)
    assert isinstance(note, Quarantined)
    assert (note.field, note.cause) == ("image", "not an image")
    assert source.record(1).fields == {"caption": "zero"}


@pytest.mark.parametrize(("wrong", "message"), [
    ({"field": "picture"}, "no column 'picture'"),
    ({"replace": {"captions": "x"}}, "did you mean 'caption'"),
    ({"replace": {"caption": []}}, "an empty list"),
])  # fmt: skip
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(**wrong)
