"""Augmentation: seeded per picture, neutral where told so, and torchvision's geometry."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from mmrep.config import ConfigError, component
from mmrep.modalities.image.views import ImageAugment
from mmrep.views import View

NEUTRAL = {"rotation": 0.0, "scale": (1.0, 1.0), "translate": 0.0, "shear": 0.0, "flip": 0.0, "brightness": 0.0,
           "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "erase": 0.0}  # fmt: skip
STRONG = {"rotation": 40.0, "scale": (0.6, 1.5), "translate": 0.2, "shear": 15.0, "flip": 0.5, "brightness": 0.5,
          "contrast": 0.5, "saturation": 0.5, "hue": 0.2, "grayscale": 0.2, "erase": 0.5}  # fmt: skip
SEEDS = torch.tensor([3, -(2**62), 5, 2**63 - 1, 11, 12, 13, 14])


def view(**fields) -> ImageAugment:
    return component("views", "image-augment", **{**NEUTRAL, **fields}).build()


def pictures(n: int = 8, height: int = 24, width: int = 32) -> torch.Tensor:
    """Smooth, so that resampling twins agree."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    return torch.stack(
        [torch.stack([0.5 + 0.4 * torch.sin(x * (i + 1) / 3 + y + c) for c in range(3)]) for i in range(n)]
    )


def change(v: ImageAugment, pixels: torch.Tensor, seeds: torch.Tensor = SEEDS):
    out, params = v.batch({"pixels": pixels}, seeds)
    return out["pixels"], params


def test_it_is_a_view_with_a_role():
    assert isinstance(view(), View)
    assert view(role="local").role == "local"
    with pytest.raises(ConfigError, match="lowest, 2"):
        view(scale=(2.0, 1.0))


@pytest.mark.parametrize("fill", [None, (1.0, 1.0, 1.0), (0.0, 0.5, 0.2)])
def test_neutral_ranges_change_nothing(fill):
    pixels = torch.randint(0, 256, (8, 3, 9, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out, _ = change(view(fill=fill), pixels)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, pixels / 255, atol=1e-5, rtol=0)


def test_a_picture_is_changed_alike_alone_and_in_any_batch():
    v, pixels = view(**STRONG), pictures()
    together, params = change(v, pixels)
    again, _ = change(v, pixels)
    assert torch.equal(together, again)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    turned, _ = change(v, pixels[order], SEEDS[order])
    torch.testing.assert_close(turned, together[order])
    for i in range(8):
        alone, own = change(v, pixels[i : i + 1], SEEDS[i : i + 1])
        torch.testing.assert_close(alone[0], together[i])
        for name, value in params.items():
            torch.testing.assert_close(own[name][0], value[i])
    other, _ = change(v, pixels, SEEDS + 1)
    assert ((other - together).abs().amax((1, 2, 3)) > 0.05).all()


def test_parameters_reproduce_the_change():
    v, pixels = view(**STRONG), pictures()
    out, params = change(v, pixels)
    torch.testing.assert_close(v.apply(pixels, params), out)
    assert all(len(value) == 8 for value in params.values())


@pytest.mark.parametrize("only", ["rotation", "scale", "translate", "shear", "all"])
def test_geometry_is_torchvisions(only: str):
    names = ("rotation", "scale", "translate", "shear") if only == "all" else (only,)
    v, pixels = view(**{name: STRONG[name] for name in names}, fill=(0.0, 0.0, 0.0)), pictures()
    out, p = change(v, pixels)
    for i in range(8):
        twin = TF.affine(
            pixels[i],
            angle=p["angle"][i].item(),
            translate=p["translate"][i].tolist(),
            scale=p["magnification"][i].item(),
            shear=p["shear"][i].tolist(),
            interpolation=InterpolationMode.BILINEAR,
        )
        torch.testing.assert_close(out[i], twin, atol=2e-5, rtol=0)
    assert (out - pixels).abs().mean() > 0.02


def test_flip_is_a_mirror_before_the_rest():
    out, params = change(view(flip=0.5), pictures())
    assert 0 < params["flip"].sum() < 8
    for i, flipped in enumerate(params["flip"]):
        torch.testing.assert_close(out[i], pictures()[i].flip(-1) if flipped else pictures()[i], atol=1e-5, rtol=0)
    both, params = change(view(flip=1.0, rotation=30.0), pictures())
    turned, other = change(view(rotation=30.0), pictures().flip(-1))
    assert torch.equal(params["angle"], other["angle"])
    torch.testing.assert_close(both, turned, atol=1e-5, rtol=0)


def test_ranges_hold_and_are_used():
    seeds = torch.arange(4000)
    _, p = change(view(**STRONG), torch.rand(4000, 3, 4, 8), seeds)
    for values, low, high in [
        (p["angle"], -40, 40),
        (p["magnification"], 0.6, 1.5),
        (p["translate"][:, 0], -1.6, 1.6),  # 0.2 of a width of 8
        (p["translate"][:, 1], -0.8, 0.8),
        (p["shear"], -15, 15),
    ]:
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
    assert abs(p["flip"].float().mean() - 0.5) < 0.03
    boxes = p["erase"][p["erase"].any(1)]
    assert abs(len(boxes) / 4000 - 0.5) < 0.03
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert 0.019 < area.min()
    assert area.max() < 0.201
    assert 0 <= boxes.min()
    assert boxes.max() <= 1
    draws = torch.stack([p["angle"], p["magnification"].log(), p["translate"][:, 0], p["shear"][:, 0]])
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.06


def test_brightness_and_contrast_and_saturation_are_the_usual_ones():
    """Against formulas: factor times the picture; blend with the mean luma; blend with each pixel's luma."""
    luma = torch.tensor([0.299, 0.587, 0.114])
    pixels = 0.4 + 0.2 * pictures()  # away from the clipping
    grey = torch.einsum("c,bchw->bhw", luma, pixels)[:, None]
    for name, base in [("brightness", 0.0), ("contrast", grey.mean((2, 3), keepdim=True)), ("saturation", grey)]:
        out, _ = change(view(**{name: 0.3}), pixels)
        rest = pixels - base
        factor = ((out - base) * rest).sum((1, 2, 3)) / (rest * rest).sum((1, 2, 3))
        torch.testing.assert_close(out, base + factor[:, None, None, None] * rest, atol=2e-4, rtol=0)
        assert ((factor - 1).abs() <= 0.3).all()
        assert factor.std() > 0.05


def test_hue_keeps_luma_and_strength_of_colour():
    luma = torch.tensor([0.299, 0.587, 0.114])
    pixels = 0.4 + 0.2 * pictures()
    out, params = change(view(hue=0.5), pixels)
    torch.testing.assert_close(
        torch.einsum("c,bchw->bhw", luma, out), torch.einsum("c,bchw->bhw", luma, pixels), atol=1e-4, rtol=0
    )
    grey = torch.full((8, 3, 4, 4), 0.3)
    torch.testing.assert_close(change(view(hue=0.5), grey)[0], grey, atol=1e-5, rtol=0)
    assert (out - pixels).abs().mean() > 0.02
    turns = params["color"][:, :, :3]
    torch.testing.assert_close(torch.linalg.det(turns), torch.ones(8))
    trace = turns.diagonal(dim1=1, dim2=2).sum(1)  # of a rotation about an axis: 1 + 2 cos
    assert ((trace - 1) / 2).abs().max() <= 1 + 1e-4


def test_grayscale_and_erase():
    out, _ = change(view(grayscale=1.0), pictures())
    torch.testing.assert_close(out[:, 0], out[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, 0], out[:, 2], atol=1e-5, rtol=0)
    out, params = change(view(erase=1.0, erase_area=(0.25, 0.25), fill=(1.0, 0.0, 0.5)), pictures())
    for i, (left, top, right, bottom) in enumerate((params["erase"] * torch.tensor([32, 24, 32, 24])).tolist()):
        inside = out[i][:, math.ceil(top) : int(bottom), math.ceil(left) : int(right)]
        assert (inside == torch.tensor([1.0, 0.0, 0.5])[:, None, None]).all()
        changed = ((out[i] - pictures()[i]).abs().amax(0) > 1e-4).float().mean()
        assert abs(changed - 0.25) < 0.08


def test_outside_is_filled():
    far = {"translate": 1.0}
    white, _ = change(view(**far, fill=(1.0, 1.0, 1.0)), pictures() * 0.5)
    assert (white == 1).any()
    border, _ = change(view(**far, fill=None), pictures() * 0.5)
    assert border.max() <= 0.5 + 1e-6


def test_params_are_float32_and_one_row_a_sample():
    out, params = change(view(**STRONG), pictures(1), SEEDS[:1])
    assert params["matrix"].shape == (1, 2, 3)
    assert params["color"].shape == (1, 3, 4)
    assert out.min() >= 0
    assert out.max() <= 1
