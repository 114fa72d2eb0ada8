"""Targets made from the pixels of patches, against scikit-image or loops."""

from __future__ import annotations

import math

import pytest
import torch

from mmrep.modalities.image.gradients import ratio_gradient
from mmrep.modalities.image.hog import hog
from tests.targets.targets_steps import batch, masked, root, step


def pictures(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("bins", "cell"), [(9, 8), (6, 4)])
def test_histograms_equal_scikit_image(bins, cell):
    feature = pytest.importorskip("skimage.feature")
    pixels = pictures(2, 3, 16, 24)
    pixels[0, 1, :8, :8] = 0.25  # a cell without any gradient
    pixels[1] *= 1e-4  # so faint that the norm's epsilon matters
    out = hog(pixels, bins, cell)
    assert out.shape == (2, 3, bins, 16 // cell, 24 // cell)
    for b in range(2):
        for c in range(3):
            theirs = feature.hog(
                pixels[b, c].numpy(), orientations=bins, pixels_per_cell=(cell, cell), cells_per_block=(1, 1),
                block_norm="L2", feature_vector=False,
            )[:, :, 0, 0]  # fmt: skip
            # It adds up in float32.
            twin = torch.from_numpy(theirs).float()
            torch.testing.assert_close(out[b, c].permute(1, 2, 0).float(), twin, atol=1e-7, rtol=1.3e-6)


@pytest.mark.parametrize("cell", [None, 2])
def test_hog_gives_the_cells_of_each_patch(cell):
    built = root(target={"type": "image-hog", "cell": cell})
    s = step(built, batch(built))
    target, encoder = masked(built).target, built.model.tower("image").encoder
    content = target(s, "x")
    side = 4 // (cell or 4)
    everything = hog(encoder.normalize(s.inputs("x")["pixels"]), 9, cell or 4)
    for token in (1, 6, 16):
        r, c = divmod(token - 1, 4)
        cells = [everything[:, :, :, r * side + i, c * side + j].flatten(1) for i in range(side) for j in range(side)]
        torch.testing.assert_close(content.values[:, token], torch.cat(cells, 1))
    assert content.values.shape == (4, 17, target.width)
    assert masked(built)(s)["loss"].isfinite()
    for p in masked(built).predictor.parameters():
        p.grad = None
    built(batch(built))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in masked(built).predictor.parameters())


def test_ratio_gradients_equal_a_loop_over_windows():
    image = pictures(1, 1, 6, 7)
    for kernel in (3, 5, 9):
        out, r = ratio_gradient(image, kernel, 0.01)[0, 0], kernel // 2

        def mean(rows, columns):
            clip = [image[0, 0, min(max(i, 0), 5), min(max(j, 0), 6)] for i in rows for j in columns]
            return float(sum(clip)) / len(clip) + 0.01

        for i in range(6):
            for j in range(7):
                whole = range(i - r, i + r + 1), range(j - r, j + r + 1)
                x = math.log(mean(whole[0], range(j - r, j)) / mean(whole[0], range(j + 1, j + r + 1)))
                y = math.log(mean(range(i - r, i), whole[1]) / mean(range(i + 1, i + r + 1), whole[1]))
                assert float(out[i, j]) == pytest.approx(math.hypot(x, y), rel=1e-9, abs=1e-12)


def test_speckle_scales_the_picture_and_not_its_ratio_gradients():
    image = pictures(1, 1, 8, 8) + 0.5
    torch.testing.assert_close(ratio_gradient(image, 5, 1e-9), ratio_gradient(image * 0.1, 5, 1e-9))


def test_gradients_give_the_pixels_of_each_patch_at_all_scales():
    built = root(target={"type": "image-gradients", "kernels": [5, 9]})
    s = step(built, batch(built))
    target = masked(built).target
    content = target(s, "x")
    grey = s.inputs("x")["pixels"].float().mean(1, keepdim=True) / 255
    scales = torch.cat([ratio_gradient(grey, kernel, 0.01) for kernel in (5, 9)], 1)
    for token in (1, 7, 16):
        r, c = divmod(token - 1, 4)
        patch = scales[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
        torch.testing.assert_close(content.values[:, token], patch.permute(0, 2, 3, 1).flatten(1), atol=1e-4, rtol=1e-4)
    assert content.values.shape == (4, 17, target.width)
    assert masked(built)(s)["loss"].isfinite()


@pytest.mark.parametrize("name", ["image-hog", "image-gradients"])
def test_what_cannot_be_is_refused(name):
    with pytest.raises(ValueError, match="needs whole pictures"):
        root(encoder={"resize": "native", "max_patches": 12}, target={"type": name})
    if name == "image-hog":
        with pytest.raises(ValueError, match="cell=3 does not divide the patches of 4 pixels"):
            root(target={"type": name, "cell": 3})
    else:
        with pytest.raises(ValueError, match="odd sides"):
            root(target={"type": name, "kernels": [4]})
