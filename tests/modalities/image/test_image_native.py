"""Pictures at their own aspect ratio: sizes, patches, positions and coordinates; squares equal the square path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmrep.config import ConfigError, component
from mmrep.modalities.image._native import native_size
from mmrep.modalities.image.vit import ImageViT
from mmrep.testing import check_encoder

VIT = {"size": 16, "patch": 4, "width": 32, "depth": 2, "heads": 2}
FIVE = {"channels": 5, "mean": [0.2, 1000.0, -40.0, 0.0, 273.15], "std": [0.1, 300.0, 20.0, 1.0, 4.0]}


def vit(**fields) -> ImageViT:
    torch.manual_seed(0)
    return component("encoders", "image-vit", **{**VIT, "resize": "native", **fields}).build().eval()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def run(encoder: ImageViT, pictures: list):
    with torch.no_grad():
        return encoder(encoder.collate([encoder.prepare(p) for p in pictures]))


def patches(width: int, height: int, patch: int) -> int:
    return math.ceil(width / patch) * math.ceil(height / patch)


@pytest.mark.parametrize("fields", [
    {}, {"positions": "sincos", "registers": 2, "max_patches": 60}, {"class_token": False, "enlarge": True}, FIVE,
])  # fmt: skip
def test_contract(fields: dict):
    encoder = vit(**fields)
    shapes = {tuple(encoder.prepare(raw)["shape"].tolist()) for raw in encoder.examples(4, 0)}
    assert len(shapes) > 1, "the examples are not ragged"
    check_encoder(encoder)


@settings(deadline=None, max_examples=150)
@given(width=st.integers(1, 400), height=st.integers(1, 400), patch=st.integers(1, 16), most=st.integers(1, 80),
       enlarge=st.booleans())  # fmt: skip
def test_the_size_is_the_largest_of_that_ratio_that_fits(width: int, height: int, patch: int, most: int, enlarge: bool):
    wide, tall = native_size(width, height, patch=patch, max_patches=most, enlarge=enlarge)
    assert patches(wide, tall, patch) <= most
    assert enlarge or (wide <= width and tall <= height)
    longer = max(width, height)
    side = max(wide, tall)
    assert (wide, tall) == tuple(max(1, round(edge * side / longer)) for edge in (width, height))
    more = [max(1, round(edge * (side + 1) / longer)) for edge in (width, height)]
    assert patches(*more, patch) > most or (not enlarge and side == longer)


def test_sizes_by_hand():
    size = {"patch": 4, "max_patches": 16, "enlarge": False}
    assert native_size(16, 16, **size) == (16, 16)
    assert native_size(640, 640, **size) == (16, 16)
    assert native_size(64, 16, **size) == (32, 8)
    assert native_size(7, 3, **size) == (7, 3)
    assert native_size(1, 1, **size) == (1, 1)
    assert native_size(5000, 1, **size) == (64, 1)
    assert native_size(1, 1, patch=4, max_patches=16, enlarge=True) == (16, 16)
    assert native_size(2, 1, patch=4, max_patches=18, enlarge=True) == (24, 12)


@pytest.mark.parametrize("fields", [{}, FIVE, {"positions": "sincos", "registers": 1}])
@pytest.mark.parametrize("side", [16, 50, 333])
def test_a_square_is_what_the_square_path_makes_of_it(side: int, fields: dict):
    native, square = vit(**fields), vit(**fields, resize="crop")
    raw = picture(side, side) if "channels" not in fields else np.random.default_rng(0).normal(0, 1, (side, side, 5))
    pixels, item = square.prepare(raw)["pixels"], native.prepare(raw)
    cells = item["patches"].view(4, 4, -1, 4, 4).permute(2, 0, 3, 1, 4).reshape(pixels.shape)
    assert torch.equal(cells, pixels)
    ours, theirs = run(native, [raw, raw]), run(square, [raw, raw])
    torch.testing.assert_close(ours.tokens.values, theirs.tokens.values, rtol=1e-4, atol=1e-5)
    assert ours.tokens.grid.shape == (4, 4)
    assert torch.equal(ours.tokens.grid.coords, theirs.tokens.grid.coords)
    # The same beside a picture of another shape, where the batch is ragged.
    other = picture(40, 10) if "channels" not in fields else np.zeros((10, 40, 5))
    mixed = run(native, [other, raw]).tokens
    assert mixed.grid.shape is None
    torch.testing.assert_close(mixed.values[1], theirs.tokens.values[1], rtol=1e-4, atol=1e-5)


def test_patches_are_cells_of_the_resized_picture_filled_up_with_the_background():
    encoder = vit(background=(10, 20, 30), max_patches=100)
    image = picture(13, 6)
    item = encoder.prepare(image)
    assert item["shape"].tolist() == [2, 4]
    assert encoder.length(item) == 8
    whole = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].repeat(1, 8, 16)
    whole[:, :6, :13] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for row in range(2):
        for column in range(4):
            cell = whole[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            assert torch.equal(item["patches"][row * 4 + column], cell.flatten())
    bands = vit(**FIVE, max_patches=100).prepare(np.random.default_rng(0).normal(0, 1, (6, 13, 5)))
    assert (bands["patches"].view(2, 4, 5, 4, 4)[1, :, :, 2:] == 0).all(), "the mean of each band"
    large = encoder.prepare(picture(100, 30).resize((1000, 300)))
    assert large["shape"].prod() <= 100
    assert large["shape"].prod() > 80


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_positions_and_coordinates_are_each_pictures_own(positions: str):
    encoder = vit(positions=positions, max_patches=24)
    sizes = [(24, 16), (8, 40), (24, 16), (3, 3), (16, 16)]
    flat = [Image.new("RGB", size, (90, 90, 90)) for size in sizes]
    tokens = encoder.tokenize(encoder.collate([encoder.prepare(image) for image in flat]))
    plain = encoder.normalize(torch.full((1, 3, 4, 4), 90, dtype=torch.uint8))
    for row, (width, height) in enumerate(sizes):
        rows, columns = math.ceil(height / 4), math.ceil(width / 4)
        assert int(tokens.grid.valid[row].sum()) == 1 + rows * columns
        assert tokens.grid.special[row].tolist() == [True] + [False] * 24
        want = torch.tensor([[r, c] for r in range(rows) for c in range(columns)]).float()
        assert torch.equal(tokens.grid.coords[row, 1 : 1 + rows * columns], want)
        assert (tokens.grid.coords[row, 0] == 0).all()
        if width % 4 == 0:
            got = tokens.values[row, 1 : 1 + rows * columns] - encoder.patches(plain)[0, :, 0, 0]
            torch.testing.assert_close(got, encoder._positions(rows, columns)[0], rtol=1e-4, atol=1e-5)


def test_a_crop_that_chooses_its_size_is_that_square():
    encoder = vit()
    crop = component("views", "image-crop", size=8).build()
    assert encoder.prepare(picture(90, 30), view=crop, seed=1)["shape"].tolist() == [2, 2]
    large = component("views", "image-crop", size=24).build()
    assert encoder.prepare(picture(90, 30), view=large, seed=1)["shape"].tolist() == [6, 6]  # more than max_patches
    free = component("views", "image-crop").build()
    assert encoder.prepare(picture(90, 30), view=free, seed=1)["shape"].tolist() == [4, 4]


def test_a_photograph_is_decoded_whole(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr("mmrep.modalities.image._base.decode", lambda raw, at_least, **_: asked.append(at_least) or raw)
    vit().prepare(picture(30, 20))
    assert asked == [None]


def test_what_has_no_meaning_is_refused():
    for fields in ({"max_patches": 9}, {"enlarge": True}):
        with pytest.raises(ConfigError, match="only with resize: native"):
            component("encoders", "image-vit", **VIT, **fields)
    with pytest.raises(ConfigError, match="resize"):
        component("encoders", "image-cnn", resize="native")
    with pytest.raises(ValueError, match=r"not patches: use image-crop"):
        component("views", "image-augment").build().batch(
            vit().collate([vit().prepare(picture(9, 9))]), torch.tensor([1])
        )
