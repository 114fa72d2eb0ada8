"""The synthetic world holds exactly the information that it says, by counting."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from mmrep.config import ConfigError, component
from mmrep.data.synthetic import Synthetic, SyntheticConfig, label_information, mutual_information
from mmrep.features import Features

NONE = {"shared": 0, "pairwise": 0, "unique": 0, "synergy": 0, "label": None}
SHARED, FIRST = [1, 0, 0, 0], [0.03356, -1.166656, 2.113219, -1.401269]  # as first computed


def build(**fields: Any) -> Synthetic:
    return component("sources", "synthetic", **fields).build()


def entropy(bits: np.ndarray) -> float:
    """Of the rows of a table of bits, in bits, by counting, with the Miller-Madow correction of the bias."""
    counts = np.unique(bits.astype(np.int64) @ (1 << np.arange(bits.shape[1])), return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + (len(counts) - 1) / (2 * counts.sum() * np.log(2))


def counted(source: Synthetic, a: Collection[int], b: Collection[int]) -> float:
    left, right = (np.concatenate([source.latents(f) for f in side], 1) for side in (a, b))
    return entropy(left) + entropy(right) - entropy(np.concatenate([left, right], 1))


def sides(n: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every two disjoint non-empty sets of fields."""
    sets = [s for size in range(1, n) for s in combinations(range(n), size)]
    return [(a, b) for a in sets for b in sets if not set(a) & set(b)]


@pytest.mark.parametrize("fields", [
    {**NONE, "shared": 2}, {**NONE, "pairwise": 1}, {**NONE, "unique": 2}, {**NONE, "synergy": 1},
    {**NONE, "synergy": 2, "fields": 4, "triple": [3, 1, 0]}, {**NONE, "synergy": 1, "fields": 2},
    {**NONE, "pairwise": 1, "fields": 4}, {"shared": 1, "pairwise": 1, "unique": 1, "synergy": 1},
], ids=str)  # fmt: skip
def test_mutual_information_is_what_counting_finds(fields: dict[str, Any]):
    source = build(**{"size": 60_000, "noise": 0.0, "width": 8, **fields})
    for a, b in sides(source.config.fields):
        stated = mutual_information(source.config, a, b)
        assert stated["total"] == pytest.approx(counted(source, a, b), abs=0.01), (a, b)
        assert stated["total"] == sum(value for key, value in stated.items() if key != "total")
        assert stated == mutual_information(source.config, b, a)


def test_every_part_is_stated_under_its_name():
    config = SyntheticConfig(shared=4, pairwise=1, unique=2, synergy=3, fields=4)
    assert mutual_information(config, [0], [1]) == {"shared": 4, "pairwise": 1, "unique": 0, "synergy": 0, "total": 5}
    assert mutual_information(config, [0, 1], [2]) == {
        "shared": 4,
        "pairwise": 2,
        "unique": 0,
        "synergy": 3,
        "total": 9,
    }
    assert mutual_information(config, [0, 3], [1, 2])["synergy"] == 3
    assert mutual_information(config, [0, 1], [3])["synergy"] == 0
    assert mutual_information(config, [0, 1, 2], [3])["synergy"] == 0
    assert mutual_information(config, [], [3])["total"] == 0


@pytest.mark.parametrize("fields", [
    {"shared": 1, "pairwise": 1, "unique": 1, "synergy": 1}, {"fields": 2, "synergy": 2, "shared": 2, "unique": 0},
    {"fields": 4, "triple": [3, 0, 2], "pairwise": 0, "shared": 1},
], ids=str)  # fmt: skip
def test_label_information_is_what_counting_finds(fields: dict[str, Any]):
    source = build(**{"size": 60_000, "noise": 0.0, "width": 8, "label": None, **fields})
    labels = [name for name in source.columns if not name.startswith("m")]
    assert labels
    for label in labels:
        answers = np.array(source.column(label))[:, None] >> np.arange(16) & 1
        for size in range(1, source.config.fields + 1):
            for known in combinations(range(source.config.fields), size):
                bits = np.concatenate([source.latents(f) for f in known], 1)
                found = entropy(bits) + entropy(answers) - entropy(np.concatenate([bits, answers], 1))
                assert label_information(source.config, known, label) == pytest.approx(found, abs=0.01), (label, known)


def test_the_parity_is_known_to_no_pair_of_its_fields_but_to_the_third_from_both():
    config = SyntheticConfig(**{**NONE, "synergy": 1})
    assert [mutual_information(config, [i], [j])["total"] for i, j in combinations(range(3), 2)] == [0, 0, 0]
    assert mutual_information(config, [0, 1], [2])["total"] == 1
    assert [label_information(config, known, "synergy") for known in ([0], [1], [2], [0, 1], [])] == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("map", ["linear", "nonlinear"])
def test_a_vector_is_a_one_to_one_map_of_its_bits_the_same_in_every_split(map: str):
    seen: dict[bytes, bytes] = {}
    train, test = (build(split=split, map=map, noise=0.0, size=2000, width=16) for split in ("train", "test"))
    for source in (train, test):
        for field in range(3):
            for bits, vector in zip(source.latents(field), source.column(f"m{field}"), strict=True):
                key = bytes([field]) + bits.tobytes()
                assert seen.setdefault(key, vector.tobytes()) == vector.tobytes()
    assert len(set(seen.values())) == len(seen)
    assert len(seen) > 1000


@pytest.mark.parametrize("map", ["linear", "nonlinear"])
def test_the_signals_mean_square_is_one_and_the_noise_is_what_the_config_says(map: str):
    clean, noisy = (np.stack(build(map=map, noise=noise).column("m1")) for noise in (0.0, 0.5))
    assert np.mean(clean.astype(np.float64) ** 2) == pytest.approx(1, abs=0.01)
    noise = (noisy - clean).astype(np.float64)
    assert noise.std() == pytest.approx(0.5, abs=0.005)
    assert abs(noise.mean()) < 0.005
    assert np.abs(np.corrcoef(noise.T) - np.eye(32)).max() < 0.1
    assert abs(np.mean(noise[1:] * noise[:-1])) < 0.005
    other = np.stack(build(map=map, noise=0.5).column("m2")) - np.stack(build(map=map, noise=0.0).column("m2"))
    assert abs(np.mean(noise * other)) < 0.005


def readable(train: Synthetic, test: Synthetic, field: int) -> float:
    """Share of a field's bits that a linear reader, fitted on train, gets right on test."""
    x, y = (np.stack(s.column(f"m{field}")) for s in (train, test))
    x, y = (np.concatenate([v, np.ones((len(v), 1))], 1) for v in (x, y))
    weights = np.linalg.lstsq(x, 2.0 * train.latents(field) - 1, rcond=None)[0]
    return float(((y @ weights > 0) == test.latents(field)).mean())


def test_a_linear_reader_recovers_every_bit_of_a_linear_map_and_not_of_the_other():
    for field in range(3):
        assert readable(build(), build(split="test"), field) == 1
    fields = {"map": "nonlinear", "width": 11}
    assert 0.6 < readable(build(**fields), build(split="test", **fields), 0) < 0.9999


def test_labels_are_the_bits_of_their_part():
    source = build(label="synergy")
    bits = source.latents
    sample = source[7]
    assert sample.label == sample.fields["synergy"]
    places = {
        "shared": (0, 0), "pair_0_1": (4, 0), "pair_0_2": (5, 0), "unique_0": (6, 0), "pair_1_2": (5, 1),
        "unique_1": (6, 1), "unique_2": (6, 2), "synergy": (8, 2),
    }  # fmt: skip
    assert set(places) == set(source.columns) - {"m0", "m1", "m2"}
    for part, (start, field) in places.items():
        width = {"shared": 4, "unique": 2, "synergy": 2}.get(part.split("_")[0], 1)
        packed = sum((bits(field)[:, start + b].astype(int) << b) for b in range(width))
        assert source.column(part) == packed.tolist()
        assert sample.fields[part] == packed[7]
    assert np.array_equal(bits(0)[:, 8:] ^ bits(1)[:, 8:], bits(2)[:, 8:])


def test_bits_are_fair():
    source = build(size=20_000)
    for field in range(3):
        bits = source.latents(field)
        assert np.abs(bits.mean(0) - 0.5).max() < 0.02
        correlation = np.corrcoef(bits.T.astype(float))
        assert np.abs(correlation - np.eye(len(correlation))).max() < 0.03


def test_splits_are_disjoint_and_seeds_are_other_worlds():
    sources = {split: build(split=split, size=500) for split in ("train", "validation", "test")}
    vectors = [v.tobytes() for source in sources.values() for v in source.column("m0")]
    assert len(set(vectors)) == len(vectors)
    ids = [source[i].id for source in sources.values() for i in range(500)]
    assert len(set(ids)) == len(ids)
    assert ids[0] == "train/0"
    again, other = build(size=500), build(size=500, seed=1)
    assert all(np.array_equal(again[i].fields["m1"], sources["train"][i].fields["m1"]) for i in range(500))
    signs = [2.0 * s.latents(0) - 1 for s in (again, other)]
    maps = [
        np.linalg.lstsq(z, np.stack(s.column("m0")), rcond=None)[0] for z, s in zip(signs, (again, other), strict=True)
    ]
    assert np.abs(maps[0] - maps[1]).max() > 0.3
    assert not np.array_equal(again.latents(0), other.latents(0))


def test_a_longer_set_begins_with_the_shorter_one():
    short, long = build(size=10), build(size=100)
    assert all(np.array_equal(short[i].fields["m2"], long[i].fields["m2"]) for i in range(10))


def test_the_same_numbers_on_every_machine():
    source = build(size=4, width=12, noise=0.0, shared=1, unique=1)
    assert source.column("shared") == SHARED
    np.testing.assert_allclose(source[0].fields["m0"][:4], FIRST, atol=1e-5)


@pytest.mark.parametrize("missing", [0.3, [0.0, 0.9, 0.5]])
def test_fields_are_missing_at_their_rate_but_never_all(missing: Any):
    source = build(size=5000, missing=missing)
    rates = np.broadcast_to(missing, 3)
    absent = np.array([[v is None for v in source.column(f"m{i}")] for i in range(3)])
    # All three at once would happen with the product of the rates; one of them is there instead.
    slack = float(np.prod(rates)) + 0.02
    assert (absent.mean(1) <= rates + 0.02).all()
    assert (absent.mean(1) >= rates - slack).all()
    assert not absent.all(0).any()
    assert [f"m{i}" in source[3].fields for i in range(3)] == (~absent[:, 3]).tolist()
    assert {"shared", "synergy"} <= source[3].fields.keys()


def test_samples_are_read_by_the_features_encoder():
    source = build(size=4)
    encoder = Features(Features.Config(inputs=32))
    batch = encoder.collate([encoder.prepare(source[i].fields["m0"]) for i in range(4)])
    with torch.no_grad():
        assert encoder(batch).tokens.values.shape == (4, 1, 64)


@pytest.mark.parametrize(("fields", "message"), [
    ({"width": 8}, "width=8 is less than the 10 bits"), ({**NONE}, "nothing to tell"),
    ({"triple": [0, 1, 3]}, "triple: three different fields of 0 to 2"), ({"triple": [0, 1, 1]}, "triple"),
    ({"missing": [0.1, 0.2]}, "2 probabilities for 3 fields"), ({"missing": 1.0}, "missing"),
    ({"fields": 1}, "fields"), ({"fields": 2, "triple": [0, 1, 2]}, "triple"),
])  # fmt: skip
def test_impossible_worlds_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        component("sources", "synthetic", **fields)


def test_wrong_names_and_numbers_are_refused():
    config = SyntheticConfig()
    with pytest.raises(ConfigError, match="'unique_3'"):
        build(label="unique_3")
    with pytest.raises(ValueError, match="on both sides"):
        mutual_information(config, [0, 1], [1])
    with pytest.raises(ValueError, match="there is no field 3; fields are 0 to 2"):
        mutual_information(config, [0], [3])
    with pytest.raises(ValueError, match="'shard' is none of shared, pair_0_1"):
        label_information(config, [0], "shard")
