"""The encoder of plain numbers: contract, exact linear map, positions, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmrep import BadSampleError
from mmrep.config import ConfigError, component
from mmrep.features import Features
from mmrep.testing import check_encoder
from mmrep.views import View

ROWS = np.random.default_rng(0).normal(size=(5, 16))
DEEP = {"width": 32, "depth": 2, "heads": 2}


def build(**fields: Any) -> Features:
    torch.manual_seed(0)
    return component("encoders", "features", **fields).build().eval()


def run(encoder: Features, *raw: Any) -> Any:
    with torch.no_grad():
        return encoder(encoder.collate([encoder.prepare(r) for r in raw])).tokens


@pytest.mark.parametrize("fields", [
    {}, {"hidden": 24, "inputs": 3}, DEEP, {**DEEP, "class_token": True, "positions": "sincos", "hidden": 8},
    {**DEEP, "dropout": 0.1, "drop_path": 0.1}, {"inputs": 1, "positions": "sincos"},
], ids=str)  # fmt: skip
def test_contract(fields: dict[str, Any]):
    check_encoder(build(**fields), n=6)


def test_without_hidden_and_depth_it_is_a_linear_map():
    encoder = build()
    expected = F.linear(torch.tensor(ROWS).float(), encoder.map.weight, encoder.map.bias)
    torch.testing.assert_close(run(encoder, ROWS).values[0], expected)
    torch.testing.assert_close(run(encoder, ROWS[2]).values[0], expected[2:3])


def test_hidden_is_one_layer_of_gelu():
    encoder = build(hidden=8)
    first, _, last = encoder.map
    expected = last(F.gelu(first(torch.tensor(ROWS).float())))
    torch.testing.assert_close(run(encoder, ROWS).values[0], expected)


def test_rows_are_a_set_unless_they_have_positions():
    turned = ROWS[::-1].copy()
    plain, placed = build(**DEEP), build(**DEEP, positions="sincos")
    torch.testing.assert_close(run(plain, ROWS).values, run(plain, turned).values.flip(1), rtol=1e-4, atol=1e-5)
    assert (run(placed, ROWS).values - run(placed, turned).values.flip(1)).abs().max() > 0.01
    table = run(build(width=6, positions="sincos"), ROWS).values - run(build(width=6), ROWS).values
    expected = [[f(p / 10000 ** (2 * i / 6)) for f in (np.sin, np.cos) for i in range(3)] for p in range(5)]
    np.testing.assert_allclose(table[0], expected, atol=1e-5)


def test_what_an_instance_can_do_goes_by_its_depth():
    assert build().supports == {"tokens"}
    assert build(**DEEP).supports == {"tokens", "drop_tokens", "layers"}
    with pytest.raises(ValueError, match="drop_tokens"):
        build().encode(build().tokenize(build().collate([build().prepare(ROWS)])), keep=torch.zeros(1, 1).long())


@pytest.mark.parametrize("raw", [
    ROWS, ROWS.tolist(), torch.tensor(ROWS), ROWS.astype(object), tuple(map(tuple, ROWS)),
    torch.tensor(ROWS).requires_grad_(),
])  # fmt: skip
def test_every_form_gives_the_same_rows(raw: Any):
    rows = build().prepare(raw)["rows"]
    assert rows.dtype == torch.float32
    np.testing.assert_array_equal(rows, ROWS.astype(np.float32))


@pytest.mark.parametrize(("raw", "cause"), [
    (None, "not numbers"), ("path.npy", "not numbers"), (3.0, "not numbers"), (["1"] * 16, "not numbers"),
    ([None] * 16, "not numbers"), ([1j] * 16, "not numbers"), (np.array([{}] * 16), "not numbers"),
    ([[1], [1, 2]], "wrong shape"), (np.array(1.0), "wrong shape"), (ROWS[None], "wrong shape"),
    (ROWS[:, :15], "wrong width"), (ROWS.T, "wrong width"), ([], "empty"), (ROWS[:0], "empty"),
    (np.ones((11, 16)), "too long"), (ROWS * np.nan, "not finite"), (np.where(ROWS > 2, np.inf, ROWS), "not finite"),
    (ROWS * 1e16, "value range"), (ROWS * 1e200, "value range"),
])  # fmt: skip
def test_what_cannot_be_read_has_a_cause(raw: Any, cause: str):
    with pytest.raises(BadSampleError) as caught:
        build(max_rows=10).prepare(raw)
    assert caught.value.cause == cause


def test_a_wrong_width_names_both_and_a_turned_matrix():
    with pytest.raises(BadSampleError, match=r"rows of 5 numbers, where this encoder reads 16; .* transpose it"):
        build().prepare(ROWS.T)
    with pytest.raises(BadSampleError, match=r"rows of 15 numbers, where this encoder reads 16$"):
        build().prepare(ROWS[:, :15])


class Scaled(View):
    def sample(self, decoded: np.ndarray, seed: int) -> np.ndarray:
        assert decoded.shape == (1, 16)
        return decoded[:, ::-1] * seed


def test_a_view_of_one_sample_sees_the_rows():
    rows = build().prepare(ROWS[0], view=Scaled(None), seed=3)["rows"]
    np.testing.assert_allclose(rows[0], ROWS[0, ::-1] * 3, rtol=1e-6)


def test_the_preview_is_a_line():
    assert build().preview([1, 2.5]) == "[2] 1, 2.5"
    assert build().preview(np.ones((2, 4))) == "[2 x 4] 1, 1, 1, 1, 1, 1, …"


@pytest.mark.parametrize(("fields", "message"), [
    ({"class_token": True}, "never see a row"), ({**DEEP, "heads": 5}, "heads=5 does not divide width=32"),
    ({"width": 5, "positions": "sincos"}, "even width"), ({"inputs": 0}, "inputs"),
])  # fmt: skip
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        component("encoders", "features", **fields)
