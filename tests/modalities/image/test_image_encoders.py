"""Every registered image encoder keeps the contract; and what is special to our own two."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from mmrep.config import ConfigError, component
from mmrep.encoder import BadSampleError
from mmrep.modalities.image.cnn import ImageCNN
from mmrep.modalities.image.vit import ImageViT, sincos_2d
from mmrep.registry import encoders
from mmrep.testing import check_encoder
from mmrep.tokens import Tokens

NO_EMPTY = {"empty_batch": "timm reshapes to (0, -1, …), which torch cannot resolve; a Step never asks for it"}
VIT = {"patch": 4, "width": 32, "depth": 2, "heads": 2}
CASES = [
    ("image-vit", {"size": 16, **VIT}, {}),
    ("image-vit", {"size": 16, **VIT, "registers": 3, "positions": "sincos", "layer_scale": 1e-4}, {}),
    ("image-vit", {"size": 8, **VIT, "class_token": False, "dropout": 0.1, "drop_path": 0.1}, {}),
    ("image-cnn", {"size": 16, "widths": [16, 32], "depths": [1, 2]}, {}),
    ("image-cnn", {"size": 16, "widths": [16, 32], "depths": [1, 1], "norm": "group", "stem_stride": 2}, {}),
    ("image-cnn", {"size": 16, "widths": [8, 16], "depths": [1, 2], "block": "plain", "stem_stride": 2}, {}),
    ("image-cnn", {"size": 16, "widths": [8, 8], "depths": [1, 1], "block": "convnext", "norm": "layer",
                   "stem_stride": 4, "final_norm": True, "activation": "silu"}, {}),
    ("image-sparse-cnn", {"size": 16, "widths": [8, 16], "depths": [1, 2], "stem": 2, "kernel": 3}, {}),
    ("image-scale-vit", {"size": 16, "cell": 2, "grid": 4, "width": 16, "depth": 2, "heads": 2}, {}),
    ("timm", {"model": "test_vit", "size": 32}, NO_EMPTY),
    ("timm", {"model": "test_vit2", "size": 32}, NO_EMPTY),
    ("timm", {"model": "eva02_tiny_patch14_224", "size": 42, "options": {"depth": 2}}, NO_EMPTY),
    ("timm", {"model": "test_resnet", "size": 32}, NO_EMPTY),
    ("timm", {"model": "test_efficientnet", "size": 32}, NO_EMPTY),
    ("timm", {"model": "swin_tiny_patch4_window7_224", "size": 56,
              "options": {"depths": [1, 1, 1, 1], "embed_dim": 24}}, NO_EMPTY),
    ("open-clip-image", {"model": "tiny-vit"}, {}),
    ("open-clip-image", {"model": "tiny-vit-avg"}, {}),
    ("open-clip-image", {"model": "tiny-resnet"}, {}),
    ("open-clip-image", {"model": "tiny-timm"}, NO_EMPTY),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "failures"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_contract(name: str, fields: dict, failures: dict, tiny_clip: None):
    torch.manual_seed(0)
    check_encoder(component("encoders", name, **fields).build(), expected_failures=failures)


def test_every_registered_image_encoder_is_among_the_cases():
    registered = {name for name, cls in encoders.load_all().items() if getattr(cls, "modality", "") == "image"}
    assert registered == {name for name, _, _ in CASES} | {"hf-image"}  # its own file has its cases


def vit(**fields) -> ImageViT:
    torch.manual_seed(0)
    return ImageViT(ImageViT.Config(**{"size": 16, **VIT, **fields})).eval()


def test_sincos_positions_are_those_of_the_formula():
    table = sincos_2d(3, 5, 8)[0].numpy()
    for row in range(3):
        for column in range(5):
            want = []
            for place in (row, column):
                want += [np.sin(place / 10000 ** (i / 2)) for i in range(2)] + [
                    np.cos(place / 10000 ** (i / 2)) for i in range(2)
                ]
            np.testing.assert_allclose(table[row * 5 + column], want, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_positions_are_added_before_tokens_are_dropped(positions: str):
    encoder = vit(positions=positions)
    flat = {"pixels": torch.full((1, 3, 16, 16), 0.5)}
    tokens = encoder.tokenize(flat)
    assert tokens.grid.shape == (4, 4)
    assert tokens.grid.coords[0, 1 + 6].tolist() == [1, 2]
    patches = tokens.values[0, 1:]
    assert (torch.pdist(patches) > 1e-3).all(), "equal patches at different places have equal tokens"
    kept = encoder.encode(tokens, keep=torch.tensor([[12, 3]])).tokens
    assert kept.grid.coords[0].tolist() == [[0, 0], [2, 3], [0, 2]]
    assert kept.grid.shape is None


def test_special_tokens_come_first_and_are_marked():
    encoder = vit(registers=2)
    grid = encoder.tokenize({"pixels": torch.zeros(2, 3, 16, 16)}).grid
    assert grid.special.sum(1).tolist() == [3, 3]
    assert grid.special[:, :3].all()
    assert encoder.no_weight_decay() == {"positions", "special"}
    assert vit(class_token=False, positions="sincos").no_weight_decay() == set()


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_a_crop_of_another_size_is_read(positions: str):
    encoder = vit(positions=positions)
    small = encoder({"pixels": torch.rand(2, 3, 8, 12)})
    assert small.tokens.grid.shape == (2, 3)
    with pytest.raises(ValueError, match="10 x 12 cannot be cut into patches of 4"):
        encoder({"pixels": torch.rand(2, 3, 10, 12)})


def test_interpolated_positions_follow_the_picture():
    encoder = vit(size=32)
    rows = torch.arange(8.0)
    with torch.no_grad():
        encoder.positions.copy_((rows[:, None] + 10 * rows).reshape(1, 64, 1).expand(1, 64, 32))
    table = encoder._positions(4, 4)[0].view(4, 4, 32)
    assert (table[1:-1, 1, 0].diff() - 2).abs().max() < 0.3  # half as many rows: twice the step
    assert (table[1, 1:-1, 0].diff() - 20).abs().max() < 3


def test_wrong_configs_say_what_is_wrong():
    for fields, message in [
        ({"size": 30, "patch": 4}, "patch=4 does not divide size=30"),
        ({"width": 50, "heads": 3}, "heads=3 does not divide width=50"),
        ({"width": 18, "heads": 3, "positions": "sincos"}, "multiple of 4, got 18"),
        ({"interpolation": "bicubical"}, "did you mean 'bicubic'"),
        ({"std": [0.5, 0.0, 0.5]}, "greater than 0"),
        ({"sise": 32}, "did you mean 'size'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            component("encoders", "image-vit", **fields)
    with pytest.raises(ConfigError, match="same length"):
        component("encoders", "image-cnn", widths=[8, 16], depths=[1])


def test_refusals_name_encoders_that_can():
    encoder = ImageCNN(ImageCNN.Config(size=8, widths=(4,), depths=(1,)))
    tokens = encoder.tokenize({"pixels": torch.zeros(1, 3, 8, 8)})
    with pytest.raises(ValueError, match=r"ImageCNN does not support 'drop_tokens'.*image-vit"):
        encoder.encode(tokens, keep=torch.tensor([[0]]))


def test_cnn_stages_halve_the_map_and_layers_are_stages():
    encoder = ImageCNN(ImageCNN.Config(size=16, widths=(4, 8, 12), depths=(1, 1, 1), stem_stride=1)).eval()
    tokens = encoder.tokenize({"pixels": torch.rand(2, 3, 15, 9)})
    assert tokens.values.shape == (2, 15 * 9, 4)
    out = encoder.encode(tokens, layers=[1, 2, 3])
    assert [tuple(layer.shape) for layer in out.layers] == [(2, 135, 4), (2, 8 * 5, 8), (2, 4 * 3, 12)]
    assert out.tokens.grid.shape == (4, 3)
    torch.testing.assert_close(out.layers[2], out.tokens.values)


def test_cnn_tokens_are_cells_in_raster_order():
    encoder = ImageCNN(ImageCNN.Config(size=8, widths=(4,), depths=(1,), norm="layer", stem_stride=1)).eval()
    pixels = torch.rand(1, 3, 6, 8)
    tokens = encoder.tokenize({"pixels": pixels})
    maps = encoder.stem(encoder.normalize(pixels))
    for index, (row, column) in enumerate(tokens.grid.coords[0].int().tolist()):
        torch.testing.assert_close(tokens.values[0, index], maps[0, :, row, column])
    shuffled = Tokens(tokens.values, tokens.grid)
    torch.testing.assert_close(encoder.encode(shuffled).tokens.values[0, 9], encoder.stages[0](maps)[0, :, 1, 1])


def test_examples_are_the_same_on_every_machine():
    encoder = vit()
    first, second = (encoder.prepare(raw)["pixels"] for raw in encoder.examples(2, 0))
    assert np.asarray(encoder.examples(1, 0)[0])[3, 5].tolist() == EXAMPLE_PIXEL
    assert first.float().std() > 20
    assert second.float().std() > 20
    kinds = {
        type(raw).__name__ + str(getattr(raw, "mode", getattr(raw, "dtype", ""))) for raw in encoder.examples(6, 0)
    }
    assert len(kinds) == 6


# By hand: x=5, y=3, channel c: step 3 + 7c % 11, phase 61c; ramp = 5 step + 3 (14 - step) + phase.
EXAMPLE_PIXEL = [5 * 3 + 3 * 11, 5 * 10 + 3 * 4 + 61, 5 * 6 + 3 * 8 + 122]


@pytest.mark.slow
def test_dropped_tokens_cost_nothing():
    encoder = ImageViT(ImageViT.Config(size=128, patch=8, width=192, depth=6, heads=3)).train()
    inputs = {"pixels": torch.rand(8, 3, 128, 128)}
    keep = torch.stack([torch.randperm(256)[:64] + 1 for _ in range(8)])

    def seconds(keep) -> float:
        start = time.process_time()
        encoder.encode(encoder.tokenize(inputs), keep).tokens.values.sum().backward()
        return time.process_time() - start

    seconds(None), seconds(keep)
    full, quarter = (min(seconds(k) for _ in range(5)) for k in (None, keep))
    assert quarter / full < 0.4, f"a quarter of the tokens costs {quarter / full:.2f} of all"


def test_oddities_are_read_or_refused_for_their_own_cause():
    causes: dict[str, set[str]] = {}
    for name, raw in vit().oddities(0).items():
        try:
            vit().prepare(raw)
        except BadSampleError as error:
            causes.setdefault(error.cause, set()).add(name)
    assert causes == {
        "empty image": {"no rows", "no columns"},
        "unsupported pixels": {"a vector", "four axes", "five channels", "channels first", "int32", "complex",
                               "objects"},
        "not finite": {"NaN", "infinity"},
        "value range": {"the largest float", "negative", "bytes as floats"},
        "truncated image": {"half of a PNG", "half of a JPEG", "a header alone"},
        "damaged image": {"a PNG with a damaged middle"},
        "not an image": {"a number", "no bytes", "zeros", "text", "an empty dict", "nothing", "a list"},
        "missing file": {"a string that is no path", "no file"},
    }  # fmt: skip
