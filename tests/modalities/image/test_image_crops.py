"""Random crops: torchvision's operations, boxes that say where the crop was, and sizes that win over the encoder's."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mmrep.config import ConfigError, component
from mmrep.data.reader import Reader
from mmrep.data.sample import Sample
from mmrep.modalities.image.cnn import ImageCNN
from mmrep.modalities.image.crops import ImageCrop
from mmrep.modalities.image.vit import ImageViT

STILL = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}
COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}


def view(**fields) -> ImageCrop:
    return component("views", "image-crop", **fields).build()


def picture(width: int = 90, height: int = 60) -> Image.Image:
    """Red tells the column, green the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8))


def cnn(size: int = 16, **fields) -> ImageCNN:
    return ImageCNN(ImageCNN.Config(size=size, widths=(4,), depths=(1,), norm="layer", **fields)).eval()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["picture", "bands"])
def test_the_crop_is_torchvisions_at_the_box_that_is_told(interpolation: str, kind: str):
    crop, image = view(size=16, flip=0.5, interpolation=interpolation), picture()
    decoded = image if kind == "picture" else torch.rand(5, 60, 90)
    flips = []
    for seed in range(30):
        told = crop.parameters(decoded, seed)
        left, top, right, bottom = (told["box"] * torch.tensor([90, 60, 90, 60])).round().int().tolist()
        assert 0 <= left < right <= 90
        assert 0 <= top < bottom <= 60
        twin = F.resized_crop(
            decoded, top, left, bottom - top, right - left, [16, 16], F.InterpolationMode(interpolation)
        )
        twin = F.horizontal_flip(twin) if told["flip"] else twin
        np.testing.assert_array_equal(np.asarray(crop.sample(decoded, seed)), np.asarray(twin))
        flips.append(bool(told["flip"]))
    assert 5 < sum(flips) < 25


def test_boxes_are_distributed_as_torchvisions():
    """Area and ratio of the crop, and where it lies: the quantiles of 3000 draws of each."""
    torch.manual_seed(0)
    # A crop of ratio 1 or more of a picture of 1 : 2 cannot be large, so the draws of both must be tried again often.
    for size, scale, ratio in [((90, 60), (0.08, 1.0), (0.75, 1.33)), ((40, 80), (0.3, 0.9), (0.9, 2.0))]:
        image = picture(*size)
        crop = view(size=8, scale=scale, ratio=ratio)
        ours = torch.stack([crop.parameters(image, seed * 7919)["box"] for seed in range(3000)])
        twin = v2.RandomResizedCrop(8, scale, ratio)
        drawn = [twin.make_params([image]) for _ in range(3000)]
        theirs = torch.tensor([[d["left"], d["top"], d["left"] + d["width"], d["top"] + d["height"]] for d in drawn])
        theirs = theirs / torch.tensor([*size, *size])
        for measure in (
            lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
            lambda b: (b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1]),
            lambda b: b[:, 0],
            lambda b: b[:, 1],
            lambda b: b[:, 2],
        ):
            steps = torch.linspace(0.05, 0.95, 10)
            a, b = measure(ours).quantile(steps), measure(theirs.float()).quantile(steps)
            assert ((a - b).abs() < 0.05 * (1 + b.abs())).all(), (a, b)


def test_where_a_crop_lies_is_drawn_independently_and_its_sides_are_rounded():
    crop = view(size=8, scale=(0.2, 0.2), ratio=(1.0, 1.0))
    boxes = torch.stack([crop.parameters(picture(), seed)["box"] for seed in range(1000)])
    side = round((0.2 * 90 * 60) ** 0.5)  # 32.86
    torch.testing.assert_close(boxes[:, 2:] - boxes[:, :2], torch.tensor([side / 90, side / 60]).expand(1000, 2))
    assert torch.corrcoef(boxes[:, :2].T)[0, 1].abs() < 0.1


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 100)])
def test_any_picture_has_a_crop(size: tuple[int, int]):
    crop = view(size=8)
    for seed in range(20):
        box = crop.parameters(picture(*size), seed)["box"]
        assert (box[2:] > box[:2]).all()
        assert crop.sample(picture(*size), seed).size == (8, 8)


def test_a_thin_picture_falls_back_to_the_largest_central_crop_of_a_fair_ratio():
    wide, high = view(size=8).parameters(picture(400, 20), 0), view(size=8).parameters(picture(20, 400), 0)
    width, height = round(20 * 4 / 3), round(20 / (3 / 4))
    left, top = (400 - width) // 2, (400 - height) // 2
    torch.testing.assert_close(wide["box"], torch.tensor([left / 400, 0, (left + width) / 400, 1]))
    torch.testing.assert_close(high["box"], torch.tensor([0, top / 400, 1, (top + height) / 400]))


def test_a_picture_is_cropped_alike_for_the_same_seed_only():
    crop, image = view(size=16, **COLOURS, blur=0.5, solarize=0.2, grayscale=0.2), picture()
    same = [np.asarray(crop.sample(image, 5)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert (np.asarray(crop.sample(image, 6)) != same[0]).any()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    crop.sample(image, 7)
    assert torch.equal(torch.get_rng_state(), state), "it draws from the global generator"


def test_colours_are_torchvisions_in_the_drawn_order():
    crop, image = view(size=16, **STILL, **COLOURS), picture(60, 60)
    orders = set()
    for seed in range(12):
        told = crop.parameters(image, seed)
        twin = F.resize(image, [16, 16], F.InterpolationMode.BICUBIC)
        for number in told["order"].tolist():
            change = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[number]
            twin = change(twin, told["jitter"][number].item())
        np.testing.assert_array_equal(np.asarray(crop.sample(image, seed)), np.asarray(twin))
        reach = torch.tensor(list(COLOURS.values()))
        assert ((told["jitter"] - torch.tensor([1.0, 1.0, 1.0, 0.0])).abs() <= reach).all()
        orders.add(tuple(told["order"].tolist()))
    assert len(orders) > 4
    drawn = torch.stack([crop.parameters(image, seed)["jitter"] for seed in range(500)])
    torch.testing.assert_close(drawn.mean(0), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), reach / 3**0.5, atol=0.02, rtol=0)  # uniform over both sides


def test_grayscale_blur_and_solarize_are_torchvisions():
    image = picture(60, 60)
    plain = F.resize(image, [16, 16], F.InterpolationMode.BICUBIC)
    for fields, twin in [
        ({"grayscale": 1.0}, lambda p: F.rgb_to_grayscale(plain, 3)),
        ({"solarize": 1.0}, lambda p: F.solarize(plain, 128)),
        ({"blur": 1.0}, lambda p: _blurred(plain, float(p["blur"]))),
    ]:
        crop = view(size=16, **STILL, **fields)
        changed = 0
        for seed in range(8):
            out = np.asarray(crop.sample(image, seed))
            np.testing.assert_array_equal(out, np.asarray(twin(crop.parameters(image, seed))))
            changed += int((out != np.asarray(plain)).any())
        assert changed > 5
        off = view(size=16, **STILL, **{name: 1e-9 for name in fields})
        np.testing.assert_array_equal(np.asarray(off.sample(image, 3)), np.asarray(plain))
    sigmas = torch.stack([view(size=16, blur=1.0).parameters(image, s)["blur"] for s in range(300)])
    assert 0.1 <= sigmas.min() < 0.2
    assert 1.9 < sigmas.max() <= 2.0
    assert view(size=2, blur=1.0, blur_sigma=[2.0, 2.0]).sample(image, 0).size == (2, 2)


def _blurred(image: Image.Image, sigma: float) -> Image.Image:
    side = 2 * min(int(np.ceil(3 * sigma)), 15) + 1
    return F.gaussian_blur(image, [side, side], [sigma, sigma])


def test_probabilities_hold_and_are_independent():
    crop = view(size=8, flip=0.3, jitter=0.6, brightness=0.4, grayscale=0.2, blur=0.5, solarize=0.1)
    told = [crop.parameters(picture(), seed) for seed in range(4000)]
    happened = torch.stack([
        torch.stack([p["flip"].float(), (p["jitter"] != torch.tensor([1.0, 1, 1, 0])).any().float(),
                     p["grayscale"].float(), (p["blur"] > 0).float(), p["solarize"].float()])
        for p in told
    ])  # fmt: skip
    assert (happened.mean(0) - torch.tensor([0.3, 0.6, 0.2, 0.5, 0.1])).abs().max() < 0.03
    assert (torch.corrcoef(happened.T) - torch.eye(5)).abs().max() < 0.06


def test_parameters_reproduce_the_crop_on_another_picture_of_that_size():
    crop, image = view(size=16, **COLOURS, blur=0.5), picture()
    told = crop.parameters(image, 4)
    np.testing.assert_array_equal(np.asarray(crop.apply(image, told)), np.asarray(crop.sample(image, 4)))


def test_a_views_size_wins_and_without_one_it_is_the_encoders():
    encoder, image = cnn(16, crop_share=0.5), picture()
    assert encoder.prepare(image, view=view(size=24), seed=1)["pixels"].shape == (3, 24, 24)
    crop = view(scale=(0.2, 0.2), ratio=(2.0, 2.0), flip=0.0)
    pixels = encoder.prepare(image, view=crop, seed=1)["pixels"]
    assert pixels.shape == (3, 16, 16)
    left, top, right, bottom = crop.parameters(image, 1)["box"].tolist()
    # Nothing more is cut off: red and green at the borders are those of the box.
    assert abs(pixels[0, 8, 0] / 255 - left) < 0.04
    assert abs(pixels[0, 8, -1] / 255 - right) < 0.04
    assert abs(pixels[1, 0, 8] / 255 - top) < 0.04
    assert abs(pixels[1, -1, 8] / 255 - bottom) < 0.04


def test_local_crops_are_cut_from_the_full_resolution():
    x = np.mgrid[:512, :512][1]
    stripes = ((x // 2 % 2) * 255).astype(np.uint8)  # a period of 4 pixels, lost in any smaller copy
    data = io.BytesIO()
    Image.fromarray(stripes).save(data, "JPEG", quality=95)
    crop = view(size=16, scale=(16 * 16 / 512**2, 16 * 16 / 512**2), ratio=(1.0, 1.0))
    pixels = cnn(16).prepare(data.getvalue(), view=crop, seed=2)["pixels"].float()
    assert pixels.std() > 80


@pytest.mark.parametrize("encoder", ["cnn", "vit"])
def test_multi_crop_batches_reach_the_encoder_with_their_boxes(encoder: str):
    torch.manual_seed(0)
    made = cnn() if encoder == "cnn" else ImageViT(ImageViT.Config(size=16, patch=4, width=16, depth=1, heads=2)).eval()
    views = [view(size=16, scale=(0.4, 1.0)), view(size=8, scale=(0.05, 0.4), role="local")]
    reader = Reader({"image": made}, {"image": views})
    items = [reader.read(Sample(str(i), {"image": picture(50 + i, 70)}), 0) for i in range(3)]
    batch = reader.collate(items)
    whole, part = (made(inputs).tokens.grid.shape for inputs in batch.inputs["image"])
    assert (whole, part) == (((8, 8), (4, 4)) if encoder == "cnn" else ((4, 4), (2, 2)))
    assert batch.params["image"][1]["box"].shape == (3, 4)
    areas = [(p["box"][:, 2:] - p["box"][:, :2]).prod(1) for p in batch.params["image"]]
    assert areas[0].min() > 0.35
    assert areas[1].max() < 0.45
    assert views[1].role == "local"


def test_wrong_configs_say_what_is_wrong():
    for fields, message in [
        ({"scale": [0.5, 0.1]}, "lowest, 0.5, is above the highest, 0.1"),
        ({"scale": [0.0, 1.0]}, "greater than 0"),
        ({"blur": 0.5}, "give its `size`"),
        ({"size": 0}, "greater than or equal to 1"),
        ({"role": "lokal"}, "did you mean 'local'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            view(**fields)
    with pytest.raises(ValueError, match=r"hue, solarize: these change colours"):
        view(hue=0.1, solarize=0.1).sample(torch.rand(5, 8, 8), 0)
