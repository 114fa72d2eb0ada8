"""Labelled series: the .ts format, official splits, classes in words."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from set_fakes import files

from mmrep.config import ConfigError, component
from mmrep.data.sets._aeon_classes import CLASSES, phrase
from mmrep.data.sets.aeon import Aeon, AeonConfig

HEAD = "# words\n% more\n@problemName x\n@timeStamps false\n@classLabel true 1 2\n@data\n"


@pytest.fixture
def package(tmp_path):
    data = "datasets/data"
    return files(tmp_path / "aeon", {
        f"{data}/GunPoint/GunPoint_TRAIN.ts": HEAD + "1,2.5,?:-1,NaN,3:1\n\n4,5:6,7,8:2\nx,1:1\nno colon\n1,,2:1\n",
        f"{data}/GunPoint/GunPoint_TEST.ts": HEAD + "1:2\n2:1\n",
        f"{data}/Odd/Odd_TRAIN.ts": HEAD + "1e-3:low\n",
        f"{data}/Odd/Odd_TEST.ts": HEAD + "2:high\n",
        f"{data}/Stamps/Stamps_TRAIN.ts": HEAD.replace("timeStamps false", "timestamps True") + "(a,1):1\n",
        f"{data}/Stamps/Stamps_TEST.ts": HEAD,
        f"{data}/Value/Value_TRAIN.ts": HEAD.replace("@classLabel true 1 2", "@targetlabel true") + "1:0.5\n",
        f"{data}/Value/Value_TEST.ts": HEAD,
        f"{data}/Half/Half_TRAIN.ts": HEAD,
    })  # fmt: skip


def build(package, dataset="GunPoint", **fields):
    return component("sources", "aeon", dataset=dataset, root=str(package), **fields).build()


def test_the_format(package):
    source = build(package)
    sample = source[0]
    np.testing.assert_array_equal(sample.fields["series"], np.float32([[1, -1], [2.5, np.nan], [np.nan, 3]]))
    assert sample.fields["series"].dtype == np.float32
    assert (sample.id, sample.label, sample.group) == (
        "GunPoint/train/0", "a hand draws a gun from a holster and aims", "GunPoint/1",
    )  # fmt: skip
    np.testing.assert_array_equal(source[1].fields["series"], np.float32([[4, 6], [5, 7], [np.nan, 8]]))
    assert [getattr(source.record(i), "cause", "ok") for i in range(5)] == ["ok", "ok", *["malformed series"] * 3]
    assert source.record(2).id == "GunPoint/train/2"
    assert source.column("length") == [3, 3, None, None, None]
    assert source.column("label")[:2] == ["1", "2"]


def test_official_splits(package):
    assert build(package, split="test")._ids == ["GunPoint/test/0", "GunPoint/test/1"]
    train, validation = (set(build(package, split=p, validation=0.5)._ids) for p in ("train", "validation"))
    everything = set(build(package, split="all")._ids)
    assert train | validation | {"GunPoint/test/0", "GunPoint/test/1"} == everything
    assert not train & validation
    assert len(everything) == 7
    assert len({tuple(build(package, split="validation", validation=0.7, seed=s)._ids) for s in range(6)}) > 1
    with pytest.raises(ConfigError, match="no series falls in 'validation'; raise `validation`"):
        build(package, split="validation")


def test_several_data_sets_say_what_is_measured(package):
    source = build(package, ["Odd", "GunPoint"], split="test")
    assert source.column("label_text") == [
        "Odd: class high",
        "position of a moving hand: a hand points with the index finger",
        "position of a moving hand: a hand draws a gun from a holster and aims",
    ]
    assert source.column("dataset") == ["Odd", "GunPoint", "GunPoint"]
    assert source.groups() == ["Odd/high", "GunPoint/2", "GunPoint/1"]


def test_classes_in_words():
    assert phrase("JapaneseVowels_eq", "3", with_topic=False) == "male speaker number 3"
    for dataset in CLASSES:
        words = [phrase(dataset, label, with_topic=True) for label in CLASSES[dataset][1]]
        assert len(set(words)) == len(words)


def test_what_is_no_classification_is_refused(package, tmp_path):
    for name, why in (("Stamps", "has time stamps"), ("Value", "has no classes"), ("Half", "no problem 'Half'"),
                      ("GunPont", "did you mean 'GunPoint'"), (["Odd", "Odd"], "'Odd' is named twice")):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            build(package, name)
    with pytest.raises(ConfigError, match="`pip install --no-deps aeon`"):
        build(tmp_path)


def test_the_fingerprint_follows_config_and_files(package):
    before = build(package).fingerprint()
    assert build(package).fingerprint() == before != build(package, split="test").fingerprint()
    files(package, {"datasets/data/GunPoint/GunPoint_TEST.ts": HEAD + "1:2\n"})
    assert build(package).fingerprint() != before


@pytest.mark.slow
def test_the_real_archive():
    # Counts, classes, channels and shortest and longest series as the archive documents them.
    expected = {
        "ACSF1": (100, 100, 10, 1, 1460, 1460), "ArrowHead": (36, 175, 3, 1, 251, 251),
        "BasicMotions": (40, 40, 4, 6, 100, 100), "GunPoint": (50, 150, 2, 1, 150, 150),
        "ItalyPowerDemand": (67, 1029, 2, 1, 24, 24), "JapaneseVowels": (270, 370, 9, 12, 7, 29),
        "OSULeaf": (200, 242, 6, 1, 427, 427), "PickupGestureWiimoteZ": (50, 50, 10, 1, 29, 361),
        "UnitTest": (20, 22, 2, 1, 24, 24),
    }  # fmt: skip
    try:
        for name, (train, test, classes, channels, shortest, longest) in expected.items():
            parts = [Aeon(AeonConfig(dataset=name, split=split)) for split in ("train", "test")]
            assert [len(part) for part in parts] == [train, test]
            both = Aeon(AeonConfig(dataset=name, split="all"))
            assert set(both.column("label")) == set(CLASSES[name][1])
            assert len(set(both.column("label_text"))) == classes
            assert {both[i].fields["series"].shape[1] for i in range(len(both))} == {channels}
            assert (min(both.column("length")), max(both.column("length"))) == (shortest, longest)
    except ConfigError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip("aeon is not installed")
    assert "aeon" not in sys.modules
    # Accuracies of the nearest training series, as the archive publishes them: no value is read wrong.
    published = {"ItalyPowerDemand": 0.9553, "GunPoint": 0.9133, "ArrowHead": 0.8, "OSULeaf": 0.5207}
    for name, accuracy in published.items():
        train, test = (Aeon(AeonConfig(dataset=name, split=split)) for split in ("train", "test"))
        near, far = (np.stack([part[i].fields["series"][:, 0] for i in range(len(part))]) for part in (train, test))
        nearest = ((far[:, None] - near[None]) ** 2).sum(axis=2).argmin(axis=1)
        found = np.mean(np.array(train.column("label"))[nearest] == np.array(test.column("label")))
        assert found == pytest.approx(accuracy, abs=5e-5)
    # Class 1 is winter: its evening peak comes before eight, that of summer after.
    power = Aeon(AeonConfig(dataset="ItalyPowerDemand", split="all"))
    labels = np.array(power.column("label"))
    series = np.stack([power[i].fields["series"][:, 0] for i in range(len(power))])
    evening = {label: series[labels == label, 17:].mean(axis=0) for label in "12"}
    assert evening["1"].argmax() < evening["2"].argmax()
