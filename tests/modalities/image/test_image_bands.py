"""Pictures with any number of channels: files, layouts, learned normalisation, and every encoder that takes them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import v2

from mmrep.config import ConfigError, component
from mmrep.encoder import BadSampleError
from mmrep.modalities.image._bands import read_bands
from mmrep.modalities.image._normalization import FILE
from mmrep.modalities.image._preprocess import Preprocess, fit_bands
from mmrep.testing import check_encoder

FIVE = {"channels": 5, "mean": [0.2, 1000.0, -40.0, 0.0, 273.15], "std": [0.1, 300.0, 20.0, 1.0, 4.0]}
VIT = {"size": 16, "patch": 4, "width": 32, "depth": 2, "heads": 2}
CNN = {"size": 16, "widths": [8, 16], "depths": [1, 1]}
NO_EMPTY = {"empty_batch": "timm reshapes to (0, -1, …), which torch cannot resolve; a Step never asks for it"}


def bands(height: int = 12, width: int = 17, channels: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(50, 20, (height, width, channels)).astype(np.float32)


def cause(raw, channels: int = 5, **options) -> str:
    with pytest.raises(BadSampleError) as caught:
        read_bands(raw, channels, **options)
    return caught.value.cause


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


@pytest.mark.parametrize(("name", "fields", "failures"), [
    ("image-vit", {**VIT, **FIVE}, {}),
    ("image-vit", {**VIT, "channels": 1, "mean": [0.0], "std": [1.0]}, {}),
    ("image-cnn", {**CNN, **FIVE, "resize": "squash"}, {}),
    ("image-cnn", {**CNN, "bands": True, "mean": [1.0, 2.0, 3.0], "std": [1.0, 1.0, 9.0], "crop_share": 0.8}, {}),
    ("timm", {"model": "test_vit", "size": 32, **FIVE}, NO_EMPTY),
    ("timm", {"model": "test_resnet", "size": 32, "channels": 1, "mean": [0.0], "std": [1.0]}, NO_EMPTY),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_contract(name: str, fields: dict, failures: dict):
    torch.manual_seed(0)
    check_encoder(component("encoders", name, **fields).build(), expected_failures=failures)


def test_every_form_of_a_picture_is_read_to_the_same_numbers(tmp_path: Path):
    array = bands()
    want = torch.from_numpy(array).permute(2, 0, 1)
    path = tmp_path / "a.npy"
    path.write_bytes(npy(array))
    for raw in (
        array, array.transpose(2, 0, 1), np.asfortranarray(array), array.astype(">f4"), array.astype(np.float64),
        want, torch.from_numpy(array), npy(array), npy(array.transpose(2, 0, 1)), str(path), path.as_uri(),
        {"bytes": None, "path": str(path)}, io.BytesIO(npy(array)),
        tiff(array, planarconfig="contig", photometric="minisblack"),
        tiff(array.transpose(2, 0, 1), planarconfig="separate", photometric="minisblack"),
        tiff(array.transpose(2, 0, 1), photometric="minisblack"),  # a page a band
        tiff(array.transpose(2, 0, 1), photometric="minisblack", compression="zlib", bigtiff=True, byteorder=">"),
        tiff(array.transpose(2, 0, 1)[:, None, None], photometric="minisblack"),
    ):  # fmt: skip
        out = read_bands(raw, 5)
        assert out.dtype == torch.float32
        assert out.is_contiguous()
        assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "uint16", "int16", "float16", "float32", "float64"])
def test_numbers_are_not_scaled_by_their_dtype(dtype: str):
    array = (bands() * (100 if "16" in dtype else 1) - (30 if dtype.startswith("int") else 0)).astype(dtype)
    assert torch.equal(read_bands(array, 5), torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1))


def test_pictures_of_pil_keep_the_channels_they_store():
    rgba = (bands(channels=4) % 256).astype(np.uint8)
    for raw in (Image.fromarray(rgba), rgba, npy(rgba)):
        assert torch.equal(read_bands(raw, 4), torch.from_numpy(rgba).permute(2, 0, 1).float())
    deep = Image.fromarray(rgba[:, :, 0].astype(np.uint16) * 200)
    file = io.BytesIO()
    deep.save(file, "PNG")
    want = torch.from_numpy(rgba[:, :, 0].astype(np.float32) * 200)[None]
    for raw in (deep, file.getvalue(), deep.convert("I"), np.asarray(deep)):
        assert torch.equal(read_bands(raw, 1), want)
    assert read_bands(deep.point(lambda v: v / 256).convert("L").quantize(4), 3).shape == (3, 12, 17)
    assert cause(Image.fromarray(np.full((4, 4), -5, np.int32)), 1) == "value range"


def test_a_wrong_number_of_channels_names_both():
    for raw in (bands(channels=4), npy(bands(channels=4)), torch.zeros(4, 9, 9), Image.new("RGBA", (9, 9))):
        with pytest.raises(BadSampleError, match=r"wrong channels: .*\b4 channels.* reads 5"):
            read_bands(raw, 5)
    assert cause(bands()[:, :, 0]) == "wrong channels"
    # Where both ends could be channels, the usual one counts.
    square = bands(5, 9, 5)
    want = torch.from_numpy(square).permute(2, 0, 1)
    last = tiff(square, planarconfig="contig", photometric="minisblack")
    first = tiff(square.transpose(2, 0, 1), planarconfig="separate", photometric="minisblack")
    for raw in (square, want, last, first):
        assert torch.equal(read_bands(raw, 5), want)


def test_files_are_closed_and_large_ones_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import tifffile

    import mmrep.modalities.image._bands as module

    opened = []
    whole = module.raw_stream
    monkeypatch.setattr(module, "raw_stream", lambda *a: opened.append(whole(*a)) or opened[-1])
    (tmp_path / "a.npy").write_bytes(npy(bands()))
    (tmp_path / "b.npy").write_bytes(b"broken")
    read_bands(tmp_path / "a.npy", 5)
    assert cause(tmp_path / "b.npy") == "not an image"
    mine = io.BytesIO(npy(bands()))
    read_bands(mine, 5)
    assert [stream.closed for stream in opened] == [True, True, False]
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", lambda *_: pytest.fail("it was decoded"))
    assert cause(tiff(bands().transpose(2, 0, 1)), max_pixels=100) == "too many pixels"


def test_what_cannot_be_read_says_why():
    assert cause(bands(), max_pixels=100) == "too many pixels"
    assert cause(npy(bands()), max_pixels=100) == "too many pixels"
    assert cause(tiff(bands().transpose(2, 0, 1)), max_pixels=100) == "too many pixels"
    assert cause(np.zeros((0, 4, 5))) == "empty image"
    assert cause(np.zeros((1, 2, 4, 5))) == "unsupported pixels"
    assert cause(bands().astype(np.int32)) == "unsupported pixels"
    assert cause(np.full((2, 2, 5), np.nan)) == "not finite"
    assert cause(np.full((2, 2, 5), 1e300)) == "not finite"
    assert cause(npy(bands())[:-4]) == "truncated image"
    assert cause(npy(bands()).replace(b"(12, 17", b"(99, 99")) == "truncated image"
    assert cause(npy(bands()).replace(b"'<f4',", b"'|O', ")) == "unsupported pixels"
    assert cause(npy(bands())[:20]) == "damaged image"
    assert cause(tiff(bands().transpose(2, 0, 1))[:60]) == "damaged image"
    assert cause(tiff(np.zeros((2, 3, 12, 17), np.float32), photometric="minisblack")) == "unsupported pixels"
    assert cause(b"no picture") == "not an image"
    assert cause(b"") == "not an image"
    assert cause(object()) == "not an image"


def test_tiff_needs_a_package_and_says_which(monkeypatch: pytest.MonkeyPatch):
    data = tiff(bands().transpose(2, 0, 1))
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ImportError, match=r'pip install "mmrep\[tiff\]"'):
        read_bands(data, 5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize(("resize", "crop_share"), [("crop", 1.0), ("crop", 0.875), ("squash", 1.0)])
def test_resizing_is_torchvisions(resize: str, crop_share: float, interpolation: str):
    how = Preprocess(size=16, resize=resize, crop_share=crop_share, interpolation=interpolation, channels=4)
    side, mode = int(16 / crop_share), v2.InterpolationMode(interpolation)
    twin = v2.Compose([v2.Resize(side if resize == "crop" else (side, side), mode, antialias=True), v2.CenterCrop(16)])
    for height, width in [(12, 17), (40, 33), (16, 16), (64, 18), (18, 300)]:
        values = torch.from_numpy(bands(height, width, 4)).permute(2, 0, 1)
        assert torch.equal(fit_bands(values, how), twin(values))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    folder = tmp_path_factory.mktemp("normalization")
    pictures = [bands(5 + i, 9, 3, seed=i) * [1, 1000, 1e-3] + [0, 1e5, 0] for i in range(4)]
    chosen = component("encoders", "image-cnn", channels=3, bands=True, **CNN)
    chosen.cls.fit(chosen.config, [pictures[0], None, b"broken", np.zeros((4, 4, 7)), *pictures[1:]], folder)
    return folder, pictures


def test_statistics_are_those_of_all_training_pixels(learned: tuple[Path, list[np.ndarray]]):
    folder, pictures = learned
    pixels = np.concatenate([p.astype(np.float32).reshape(-1, 3) for p in pictures]).astype(np.float64)
    saved = json.loads((folder / FILE).read_text())
    np.testing.assert_allclose(saved["mean"], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(saved["std"], pixels.std(0), rtol=1e-9)


@pytest.mark.parametrize(("name", "fields"), [
    ("image-cnn", CNN), ("image-vit", VIT), ("timm", {"model": "test_vit", "size": 16})
])  # fmt: skip
def test_learned_statistics_standardise_and_are_saved(name: str, fields: dict, learned, tmp_path: Path):
    folder, pictures = learned
    chosen = component("encoders", name, channels=3, bands=True, **fields)
    encoder = chosen.build(files=folder).eval()
    saved = json.loads((folder / FILE).read_text())
    assert encoder.preprocess.mean == tuple(saved["mean"])
    pixels = torch.stack([encoder.prepare(p)["pixels"] for p in pictures])
    twin = fit_bands(torch.from_numpy(pictures[2].astype(np.float32)).permute(2, 0, 1), encoder.preprocess)
    twin = (twin - torch.tensor(saved["mean"])[:, None, None]) / torch.tensor(saved["std"])[:, None, None]
    assert torch.equal(pixels[2], twin)
    assert torch.equal(encoder.normalize(pixels), pixels)
    encoder.save_files(tmp_path)
    again = chosen.build(files=tmp_path).eval()
    assert again.preprocess == encoder.preprocess
    check_encoder(encoder, only=["weights_round_trip", "odd_input"])


def test_statistics_are_neither_learned_nor_saved_where_they_are_given(tmp_path: Path):
    chosen = component("encoders", "image-cnn", **CNN, **FIVE)
    chosen.cls.fit(chosen.config, [bands()], tmp_path)
    chosen.build().save_files(tmp_path)
    component("encoders", "image-cnn").cls.fit(component("encoders", "image-cnn").config, [object()], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_channel_that_never_changes_is_only_centred(tmp_path: Path):
    chosen = component("encoders", "image-cnn", channels=2, **CNN)
    array = np.stack([np.full((9, 9), 0.1), np.arange(81.0).reshape(9, 9)], -1)
    chosen.cls.fit(chosen.config, [array], tmp_path)
    assert chosen.build(files=tmp_path).preprocess.std[0] == 1.0


def test_missing_statistics_say_what_to_do(tmp_path: Path):
    chosen = component("encoders", "image-vit", channels=4, **VIT)
    for files in (None, tmp_path):
        with pytest.raises(ValueError, match=r"4 bands are learned.*or set mean and std"):
            chosen.build(files=files)
    with pytest.raises(ValueError, match=r"no training picture with 4 channels.*wrong channels: 5"):
        chosen.cls.fit(chosen.config, [bands()], tmp_path)
    with pytest.raises(ValueError, match="there are none"):
        chosen.cls.fit(chosen.config, [None], tmp_path)


def test_a_mark_for_missing_data_is_a_bad_sample():
    encoder = component("encoders", "image-cnn", channels=1, mean=[0.2], std=[0.1], **CNN).build()
    array = np.full((16, 16), 0.2)
    encoder.prepare(array)
    array[3, 3] = -3.4e38
    with pytest.raises(BadSampleError, match=r"value range.*missing data"):
        encoder.prepare(array)


def test_timm_repeats_pretrained_filters_over_the_channels(tmp_path: Path):
    model = timm.create_model("test_vit", num_classes=0, img_size=32)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    fields = {"model": "test_vit", "size": 32, "checkpoint": str(tmp_path / "w.safetensors")}
    weight = model.patch_embed.proj.weight
    five = component("encoders", "timm", **fields, **FIVE).build()
    torch.testing.assert_close(five.trunk.model.patch_embed.proj.weight, weight[:, [0, 1, 2, 0, 1]] * 3 / 5)
    torch.testing.assert_close(five.trunk.model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    one = component("encoders", "timm", channels=1, mean=[0.0], std=[1.0], **fields).build()
    torch.testing.assert_close(one.trunk.model.patch_embed.proj.weight, weight.sum(1, keepdim=True))
    assert five.preprocess.mean == tuple(FIVE["mean"])
    assert five.preprocess.interpolation == component("encoders", "timm", **fields).build().preprocess.interpolation


def test_crops_and_previews_of_bands():
    encoder = component("encoders", "image-vit", **VIT, **FIVE).build()
    crop = component("views", "image-crop", size=8, flip=0.0, scale=(0.2, 0.4)).build()
    picture = encoder.examples(1, 0)[0]
    pixels = encoder.prepare(picture, view=crop, seed=3)["pixels"]
    assert pixels.shape == (5, 8, 8)
    cut = crop.sample(read_bands(picture, 5), 3)
    mean, std = (torch.tensor(v)[:, None, None] for v in encoder.statistics)
    torch.testing.assert_close(pixels, (cut - mean) / std)
    for channels in (1, 2, 5):
        given = {"channels": channels, "mean": [0.0] * channels, "std": [1.0] * channels}
        shown = component("encoders", "image-cnn", **CNN, **given).build().preview(bands(30, 40, channels))
        assert shown.mode == "RGB"
        assert np.asarray(shown).std() > 40
        assert (len(set(np.asarray(shown)[3, 3].tolist())) == 1) == (channels < 3)
    with pytest.raises(ValueError, match=r"this field has 5 channels: use image-crop"):
        component("views", "image-augment").build().batch({"pixels": torch.zeros(1, 5, 8, 8)}, torch.tensor([1]))


def test_wrong_configs_say_what_is_wrong():
    for name, fields, message in [
        ("image-vit", {"channels": 4, "mean": [0.0] * 3, "std": [1.0] * 3}, "mean: 3 values for channels=4"),
        ("image-cnn", {"channels": 4, "std": [1.0] * 4}, "give both, or neither"),
        ("image-cnn", {"mean": [0.0] * 4}, "mean: 4 values for channels=3"),
        ("image-cnn", {"channels": 4, "bands": False}, "has 3 channels, and channels=4"),
        ("image-cnn", {"channels": 4, "interpolation": "lanczos"}, "bilinear, bicubic and nearest"),
        ("image-cnn", {"channels": 0}, "greater than or equal to 1"),
        ("open-clip-image", {"channels": 4}, r"read RGB pictures alone.*timm, channels"),
        ("open-clip-image", {"bands": True}, "read RGB pictures alone"),
        ("timm", {"options": {"in_chans": 4}}, "say `channels`"),
        ("timm", {"channels": 4, "mean": [0.0] * 4}, "give both, or neither"),
    ]:
        with pytest.raises(ConfigError, match=message):
            component("encoders", name, **fields)
