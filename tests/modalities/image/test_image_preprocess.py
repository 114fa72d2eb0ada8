"""Resizing, cropping and normalising, against torchvision."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from mmrep.encoder import BadSampleError
from mmrep.modalities.image._preprocess import Preprocess, fit_square
from mmrep.modalities.image.cnn import ImageCNN
from mmrep.views import View

SIZES = [(40, 40), (97, 51), (51, 98), (20, 33), (32, 32), (32, 75), (301, 32)]


def picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / 7 + i) * np.cos(y / 5 - i) for i in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_share", [1.0, 0.875])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_resizing_is_torchvisions(resize: str, crop_share: float, interpolation: str):
    how = Preprocess(size=32, resize=resize, crop_share=crop_share, interpolation=interpolation, fast_resize=False)
    side = int(32 / crop_share)
    twin = v2.Compose(
        [v2.Resize(side if resize == "crop" else (side, side), v2.InterpolationMode(interpolation)), v2.CenterCrop(32)]
    )
    for width, height in SIZES:
        image = picture(width, height)
        np.testing.assert_array_equal(np.asarray(fit_square(image, how)), np.asarray(twin(image)), str((width, height)))


def test_a_picture_of_the_right_size_is_untouched():
    image = picture(32, 32)
    assert fit_square(image, Preprocess(size=32)) is image


def test_a_hair_of_a_picture_is_a_bad_sample_not_a_lack_of_memory():
    with pytest.raises(BadSampleError, match="extreme shape"):
        fit_square(Image.new("L", (1_000_000, 1)), Preprocess(size=224))


def test_fast_resize_is_visually_equal_and_skips_the_full_decode():
    image = picture(200, 150).resize((800, 600), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=92)
    slow, fast = (
        ImageCNN(ImageCNN.Config(size=64, widths=(4,), depths=(1,), fast_resize=quick)) for quick in (False, True)
    )
    a, b = (e.prepare(data.getvalue())["pixels"].float() for e in (slow, fast))
    assert not torch.equal(a, b), "nothing was sped up"
    assert (a - b).abs().mean() < 1
    assert (a - b).abs().max() < 4


def test_fast_resize_keeps_twice_the_size_it_needs(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def spy(raw, *, at_least, **_):
        asked.append(at_least)
        return raw

    monkeypatch.setattr("mmrep.modalities.image._base.decode", spy)
    for fields in ({"size": 56}, {"size": 56, "crop_share": 0.875}, {"size": 56, "fast_resize": False}):
        ImageCNN(ImageCNN.Config(widths=(4,), depths=(1,), **fields)).prepare(picture(56, 56))
    assert asked == [112, 128, None]


class Spy(View):
    def sample(self, decoded, seed):
        self.seen = decoded.size, seed
        return decoded.rotate(90, expand=True)


def test_a_view_sees_the_whole_decoded_picture_before_the_resize():
    data = io.BytesIO()
    picture(400, 240).save(data, "JPEG")
    encoder, view = ImageCNN(ImageCNN.Config(size=16, widths=(4,), depths=(1,))), Spy(None)
    plain = encoder.prepare(data.getvalue())["pixels"]
    seen = encoder.prepare(data.getvalue(), view=view, seed=5)["pixels"]
    assert view.seen == ((400, 240), 5)
    assert seen.shape == plain.shape == (3, 16, 16)
    assert seen.dtype == torch.uint8
    assert (seen.float() - torch.rot90(plain, 1, (1, 2)).float()).abs().mean() < 3


def test_normalize_takes_bytes_and_unit_floats():
    mean, std = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
    encoder = ImageCNN(ImageCNN.Config(size=8, widths=(4,), depths=(1,), mean=mean, std=std))
    pixels = torch.arange(2 * 3 * 64, dtype=torch.uint8).view(2, 3, 8, 8)
    twin = v2.Normalize(mean, std)(pixels / 255)
    torch.testing.assert_close(encoder.normalize(pixels), twin)
    torch.testing.assert_close(encoder.normalize(pixels / 255), twin)
    assert encoder.bfloat16().normalize(pixels).dtype == torch.bfloat16
    assert not {"mean", "std"} & set(encoder.state_dict())


def test_background_reaches_the_network():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    encoder = ImageCNN(ImageCNN.Config(size=8, widths=(4,), depths=(1,), background=(0, 128, 255)))
    assert encoder.prepare(clear)["pixels"][:, 0, 0].tolist() == [0, 128, 255]


def test_the_preview_is_the_decoded_picture_at_its_own_size():
    raw = io.BytesIO()
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(raw, "PNG")
    from mmrep.modalities.image.cnn import ImageCNN

    seen = ImageCNN(ImageCNN.Config(size=16)).preview(raw.getvalue())
    assert seen.size == (40, 20)
    assert seen.getpixel((3, 3)) == (255, 255, 255), "transparency shows the background"
