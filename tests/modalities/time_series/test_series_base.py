"""What all series encoders share: channels, length, padding, previews and views of one sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmrep import BadSampleError
from mmrep.config import component
from mmrep.modalities.time_series.decode import Series, decode
from mmrep.modalities.time_series.patch import SeriesPatch
from mmrep.views import View

SMALL = {"patch": 4, "width": 16, "depth": 1, "heads": 2}


def build(**fields: Any) -> SeriesPatch:
    torch.manual_seed(0)
    return component("encoders", "series-patch", **{**SMALL, **fields}).build().eval()


def test_prepare_tells_gaps_from_zeros_and_counts_times_from_the_start():
    item = build(channels=2).prepare({"values": [[0, None], [3, 4]], "times": [1.7e9, 1.7e9 + 0.5]})
    assert item["values"].tolist() == [[0, 0], [3, 4]]
    assert item["observed"].tolist() == [[True, False], [True, True]]
    assert item["times"].tolist() == [0, 0.5]
    assert item["values"].dtype == item["times"].dtype == torch.float32


def test_collate_pads_with_what_is_neither_valid_nor_observed():
    encoder = build(channels="any")
    batch = encoder.collate([encoder.prepare(np.ones((3, 1))), encoder.prepare(np.full((5, 2), 7))])
    assert batch["values"].shape == batch["observed"].shape == (2, 5, 2)
    assert batch["valid"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch["observed"][0].sum() == 3
    assert batch["values"][0].sum() == 3
    assert batch["times"][0].tolist() == [0, 1, 2, 0, 0]


@pytest.mark.parametrize(("channels", "shape", "words"), [
    (3, (10, 2), ["2 channels", "reads 3"]),
    (1, (1, 50), ["50 channels", "reads 1;", "transpose it"]),
    (3, (3, 50), ["50 channels", "reads 3;", "transpose it"]),
    ("any", (2, 500), ["500 channels", "at most 64", "transpose it"]),
])  # fmt: skip
def test_a_wrong_channel_count_names_both_and_says_when_to_transpose(channels: Any, shape: Any, words: list[str]):
    with pytest.raises(BadSampleError) as caught:
        build(channels=channels).prepare(np.ones(shape))
    assert caught.value.cause == "wrong channels"
    assert all(word in str(caught.value) for word in words)
    assert ("transpose" in str(caught.value)) == ("transpose it" in words)


def test_any_reads_a_wide_short_series_and_max_channels_is_the_limit():
    assert build(channels="any").prepare(np.ones((7, 12)))["values"].shape == (7, 12)
    with pytest.raises(BadSampleError, match="at most 8"):
        build(channels="any", max_channels=8).prepare(np.ones((70, 12)))


def test_a_long_series_is_refused_or_cut_at_either_end():
    series = {"values": np.arange(10.0), "times": np.arange(10) * 2}
    with pytest.raises(BadSampleError, match="max_length=4; raise it, or set cut"):
        build(max_length=4).prepare(series)
    start = build(max_length=4, cut="start").prepare(series)
    end = build(max_length=4, cut="end").prepare(series)
    assert start["values"][:, 0].tolist() == [0, 1, 2, 3]
    assert end["values"][:, 0].tolist() == [6, 7, 8, 9]
    assert start["times"].tolist() == end["times"].tolist() == [0, 2, 4, 6]


def test_a_cut_that_leaves_nothing_observed_is_a_bad_sample():
    series = np.where(np.arange(10) < 5, 1.0, np.nan)
    with pytest.raises(BadSampleError) as caught:
        build(max_length=4, cut="end").prepare(series)
    assert caught.value.cause == "all missing"


class Half(View):
    def sample(self, decoded: Series, seed: int) -> Series:
        assert isinstance(decoded, Series)
        return Series(decoded.values[seed::2] * 10, decoded.times[seed::2])


def test_a_view_of_one_sample_sees_the_decoded_series():
    item = build().prepare([1, 2, 3, 4, 5], view=Half(None), seed=1)
    assert item["values"][:, 0].tolist() == [20, 40]
    assert item["times"].tolist() == [0, 2]


def test_length_is_the_number_of_steps():
    encoder = build()
    assert [encoder.length(item) for item in map(encoder.prepare, ([1], [1, 2, 3]))] == [1, 3]


@pytest.mark.parametrize("channels", [1, 3, "any"])
def test_examples_are_ragged_and_have_gaps_and_irregular_times(channels: Any):
    encoder = build(channels=channels)
    items = [encoder.prepare(raw) for raw in encoder.examples(5, 0)]
    assert len({len(item["times"]) for item in items}) == 5
    assert any(not item["observed"].all() for item in items)
    assert any(len(item["times"].diff().unique()) > 1 for item in items)
    if channels == "any":
        assert len({item["values"].shape[1] for item in items}) > 1


@pytest.mark.parametrize("channels", [1, 2, "any"])
def test_oddities_are_read_or_refused_as_they_should_be(channels: Any):
    encoder = build(channels=channels)
    causes = {}
    for name, raw in encoder.oddities(0).items():
        try:
            item = encoder.prepare(raw)
        except BadSampleError as error:
            causes[name] = error.cause
        else:
            assert item["observed"].any()
            assert item["values"].isfinite().all()
    if channels == 1:
        assert causes.pop("one channel missing") == "all missing"
    elif channels == "any":
        assert "channels first" not in causes
        causes["channels first"] = causes["one channel too many"] = "wrong channels"
    assert causes == {
        "empty": "empty series", "all missing": "all missing", "one infinite": "not finite", "strings": "not numbers",
        "complex": "not numbers", "one channel too many": "wrong channels", "channels first": "wrong channels",
        "three axes": "wrong shape", "unsorted times": "unsorted times", "endless times": "bad times",
        "longer than max_length": "too long",
    }  # fmt: skip


def test_the_preview_draws_each_channel_breaks_at_gaps_and_shows_lone_points():
    encoder = build(channels=2)

    def dark(values: Any) -> np.ndarray:
        image = encoder.preview(values)
        assert image.size == (240, 120)
        return np.asarray(image).astype(int).min(2) < 200

    rising = np.arange(21.0)
    both = dark(np.stack([rising, -rising], 1))
    assert both[:60, :120].any()  # falling
    assert both[60:, :120].any()  # rising
    gap = dark(np.where((rising > 6) & (rising < 14), np.nan, rising))
    assert not gap[:, 90:150].any()
    assert gap[:, :70].any()
    lone = dark([1, None, 3, None, None, 5])
    assert len([run for run in np.split(lone.any(0), np.flatnonzero(np.diff(lone.any(0))) + 1) if run[0]]) == 3
    assert dark([[5.0, None]]).any()  # one step, one channel that is never observed
    assert dark([1e38, -1e38, 1e38]).any()
    irregular = dark({"values": [0, 1, 2], "times": [0, 1, 10]})
    assert irregular[60:, :30].any()  # the second point, at half height, lies at a tenth of the width
    assert not irregular[60:, 40:].any()


def test_decode_is_what_the_preview_reads():
    with pytest.raises(BadSampleError):
        build().preview(object())
    assert decode([1]).values.shape == (1, 1)
