"""Modality dropout: a sample's fields go with their probability, by its seed alone, and something always stays."""

from __future__ import annotations

import pytest
from data_fakes import TinyImage, TinyText, png

from mmrep.config import ConfigError
from mmrep.data.reader import Item, Reader
from mmrep.data.sample import Sample

PICTURE = png()


def reader(**drop: float) -> Reader:
    return Reader({"image": TinyImage(), "caption": TinyText(), "title": TinyText()}, drop=drop, seed=1)


def items(built: Reader, n: int, epoch: int = 0, **absent: None) -> list[Item]:
    raw = {"image": PICTURE, "caption": "a", "title": "b"}
    found = [built.read(Sample(str(i), {k: v for k, v in raw.items() if k not in absent}), epoch) for i in range(n)]
    assert all(isinstance(item, Item) for item in found)
    return found


def present(built: Reader, found: list[Item]) -> dict[str, list[bool]]:
    return {field: values.tolist() for field, values in built.collate(found).present.items()}


def test_each_field_goes_with_its_probability():
    built = reader(image=0.3, caption=0.6)
    shown = present(built, items(built, 1000))
    assert sum(shown["image"]) / 1000 == pytest.approx(0.7, abs=0.05)
    assert sum(shown["caption"]) / 1000 == pytest.approx(0.4, abs=0.05)
    assert all(shown["title"])
    both = sum(a and b for a, b in zip(shown["image"], shown["caption"], strict=True)) / 1000
    assert both == pytest.approx(0.28, abs=0.05)  # independently of each other


def test_something_always_stays_and_what_was_missing_stays_missing():
    built = reader(image=0.99, caption=0.99, title=0.99)
    found = items(built, 200, title=None)
    shown = present(built, found)
    assert not any(shown["title"])
    assert all(sum(row) >= 1 for row in zip(shown["image"], shown["caption"], strict=True))
    assert 60 < sum(shown["image"]) < 140  # neither is favoured as the last


def test_what_a_guest_reads_is_never_dropped_and_does_not_count_as_what_stays():
    encoders = {"image": TinyImage(), "caption": TinyText(), "guest": TinyText()}
    built = Reader(encoders, drop={"image": 0.99, "caption": 0.99}, seed=1, columns={"guest": "caption"})
    shown = present(built, items(built, 200))
    assert all(shown["guest"])
    assert all(a or b for a, b in zip(shown["image"], shown["caption"], strict=True))
    assert sum(shown["image"]) < 150


def test_it_depends_on_the_sample_and_the_epoch_not_on_the_batch():
    built = reader(image=0.5)
    found = items(built, 40)
    together = present(built, found)["image"]
    assert [present(built, [item])["image"][0] for item in found] == together
    assert present(built, items(built, 40, epoch=1))["image"] != together
    again = [built.again(item, 1) for item in found]  # as a loader does that keeps what it read
    assert present(built, again)["image"] == present(built, items(built, 40, epoch=1))["image"]
    assert all("image" in item.inputs for item in found)  # the kept items are whole


def test_dropped_values_are_not_in_the_batch():
    built = reader(image=0.5)
    batch = built.collate(items(built, 20))
    assert len(batch.inputs["image"][0]["pixels"]) == int(batch.present["image"].sum()) < 20


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="no field 'imag'"):
        reader(imag=0.5)
    from mmrep.recipe import DataConfig

    with pytest.raises(ConfigError, match=r"data\.drop\.imag: unknown field; did you mean 'image'"):
        DataConfig(train=None, fields={"image": "image"}, drop={"imag": 0.5})  # type: ignore[arg-type]
