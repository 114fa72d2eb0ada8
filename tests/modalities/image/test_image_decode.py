"""Every form and fault of a picture, against values worked out by hand."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from mmrep.encoder import BadSampleError
from mmrep.modalities.image.decode import decode


def picture(height: int = 5, width: int = 7) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 30, y * 40, (x + y) * 20], -1).astype(np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def cause(raw, **options) -> str:
    with pytest.raises(BadSampleError) as caught:
        decode(raw, **options)
    return caught.value.cause


def pixels(raw, **options) -> np.ndarray:
    image = decode(raw, **options)
    assert image.mode == options.get("mode", "RGB")
    return np.asarray(image)


def test_every_source_gives_the_same_picture(tmp_path: Path):
    want = picture()
    image = Image.fromarray(want)
    data = encoded(image)
    path = tmp_path / "a b.png"
    path.write_bytes(data)
    sources = [
        path, str(path), path.as_uri(), data, bytearray(data), io.BytesIO(data), image, want, want.copy(order="F"),
        torch.from_numpy(want).permute(2, 0, 1), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)},
        "data:image/png;base64," + base64.b64encode(data).decode(),
    ]  # fmt: skip
    for source in sources:
        np.testing.assert_array_equal(pixels(source), want)
    with path.open("rb") as stream:
        stream.seek(10)
        np.testing.assert_array_equal(pixels(stream), want)


ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],  # shown a quarter turn clockwise
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("opened", [False, True])
def test_exif_orientation_is_applied(orientation: int, opened: bool):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(picture()), exif=exif)
    raw = Image.open(io.BytesIO(data)) if opened else data
    np.testing.assert_array_equal(pixels(raw), ORIENTED[orientation](picture()))


def test_a_pil_image_of_the_caller_is_not_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(Image.fromarray(picture()), exif=exif)))
    decode(image)
    assert image.size == (7, 5)


def test_transparency_shows_the_background_and_not_the_colour_below():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]  # opaque red; invisible red; black, a fifth opaque
    want = np.array([[(255, 0, 0), (255, 255, 255), (204, 204, 204)]], np.uint8)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(rgba))), want)
    np.testing.assert_array_equal(pixels(rgba), want)
    over_green = pixels(rgba, background=(0, 100, 0))
    np.testing.assert_array_equal(over_green, [[(255, 0, 0), (0, 100, 0), (0, 80, 0)]])
    la = np.array([[(0, 255), (0, 0)]], np.uint8)
    np.testing.assert_array_equal(pixels(la), [[(0, 0, 0), (255, 255, 255)]])
    premultiplied = Image.fromarray(la).convert("La")
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0])
    palette.putalpha(Image.fromarray(la[..., 1]))
    assert (premultiplied.mode, palette.mode) == ("La", "PA")
    for image in (premultiplied, palette):
        np.testing.assert_array_equal(pixels(image), [[(0, 0, 0), (255, 255, 255)]])


def test_palette_with_a_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(encoded(image)), [[(10, 20, 30), (200, 0, 0)]])
    np.testing.assert_array_equal(pixels(encoded(image, transparency=1)), [[(10, 20, 30), (255, 255, 255)]])
    np.testing.assert_array_equal(pixels(encoded(image, "GIF", transparency=1)), [[(10, 20, 30), (255, 255, 255)]])


def test_transparent_colour_key_of_rgb_and_grey():
    rgb = Image.fromarray(np.array([[(1, 2, 3), (4, 5, 6)]], np.uint8))
    np.testing.assert_array_equal(pixels(encoded(rgb, transparency=(4, 5, 6))), [[(1, 2, 3), (255, 255, 255)]])
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    np.testing.assert_array_equal(pixels(encoded(grey, transparency=9)), [[(7, 7, 7), (255, 255, 255)]])


SIXTEEN = np.array([[0, 128, 200, 257, 32768, 65535]], np.uint16)
EIGHT = np.array([0, 0, 1, 1, 128, 255], np.uint8)  # nearest of value / 257; clipping would give 255 from 257 on


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(format: str):
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(SIXTEEN), format))[0, :, 0], EIGHT)
    np.testing.assert_array_equal(pixels(Image.fromarray(SIXTEEN), mode="L")[0], EIGHT)
    np.testing.assert_array_equal(pixels(Image.fromarray(SIXTEEN.astype(np.int32)))[0, :, 1], EIGHT)
    np.testing.assert_array_equal(pixels(SIXTEEN)[0, :, 2], EIGHT)
    np.testing.assert_array_equal(pixels(SIXTEEN.astype(">u2"))[0, :, 2], EIGHT)
    np.testing.assert_array_equal(pixels(torch.from_numpy(SIXTEEN))[0, :, 0], EIGHT)


def test_other_depths_and_colour_spaces():
    bits = np.array([[True, False]])
    for raw in (bits, Image.fromarray(bits), encoded(Image.fromarray(bits))):
        np.testing.assert_array_equal(pixels(raw), [[(255, 255, 255), (0, 0, 0)]])
    grey = np.array([[3, 200]], np.uint8)
    for raw in (grey, grey[..., None], encoded(Image.fromarray(grey))):
        np.testing.assert_array_equal(pixels(raw), [[(3, 3, 3), (200, 200, 200)]])
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(pixels(encoded(cmyk, "JPEG")).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_zero_to_one(dtype: torch.dtype):
    grey = torch.tensor([[0.0, 0.5, 1.0]], dtype=dtype)
    np.testing.assert_array_equal(pixels(grey, mode="L"), [[0, 128, 255]])
    chw = torch.stack([grey, 1 - grey, grey * 0])
    np.testing.assert_array_equal(pixels(chw), [[(0, 255, 0), (128, 128, 0), (255, 0, 0)]])
    np.testing.assert_array_equal(pixels(Image.fromarray(grey.float().numpy()), mode="L"), [[0, 128, 255]])


def test_values_that_stand_for_nothing_are_refused():
    assert cause(np.array([[0.0, np.nan]])) == "not finite"
    assert cause(np.array([[0.0, 254.0]])) == "value range"
    assert cause(np.array([[-1.0, 1.0]])) == "value range"
    assert cause(np.array([[0, 70000]], np.int32)) == "unsupported pixels"
    assert cause(Image.fromarray(np.array([[0, 70000]], np.int32))) == "value range"
    assert cause(np.zeros((3, 8, 8), np.uint8)) == "unsupported pixels"
    assert cause(np.zeros((2, 4, 4, 3), np.uint8)) == "unsupported pixels"
    assert cause(np.zeros((0, 4, 3), np.uint8)) == "empty image"
    assert cause(Image.new("RGB", (0, 3))) == "empty image"
    assert cause(17) == cause(None) == "not an image"


def test_what_is_not_there_or_not_a_picture(tmp_path: Path):
    assert cause(tmp_path / "none.png") == "missing file"
    assert cause({"bytes": None, "path": str(tmp_path / "none.png")}) == "missing file"
    assert cause(str(tmp_path)) == "unreadable file"
    assert cause("a\0b.png") == "unreadable file"
    (tmp_path / "text.png").write_text("no picture")
    assert cause(tmp_path / "text.png") == "not an image"
    assert cause(b"") == "not an image"
    assert cause(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n") == "not an image"
    assert cause("https://example.org/cat.jpg") == "url"
    assert cause("data:image/png;base64,###") == "url"


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(9000, 9000), (12000, 12000), (60000, 60000)])
def test_too_many_pixels_are_refused_before_decoding(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    assert cause(bomb(*size)) == "too many pixels"
    assert cause(encoded(Image.new("RGB", (20, 10))), max_pixels=199) == "too many pixels"


def test_the_cap_is_inclusive():
    assert decode(encoded(Image.new("RGB", (20, 10))), max_pixels=200).size == (20, 10)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_cut_file_is_a_bad_sample_at_whatever_length(format: str):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(noise), format)
    causes = set()
    for length in range(0, len(data) * 9 // 10, max(1, len(data) // 60)):
        try:
            decode(data[:length])  # a decoder may fill in what is missing, but raises nothing else
        except BadSampleError as error:
            causes.add(error.cause)
    assert causes <= {"truncated image", "damaged image", "not an image"}
    if format in ("PNG", "JPEG"):
        assert cause(data[: len(data) * 6 // 10]) == "truncated image"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
def test_flipped_bytes_raise_nothing_else():
    noise = np.random.default_rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    generator = np.random.default_rng(2)
    for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"):
        data = encoded(Image.fromarray(noise), format)
        for _ in range(60):
            damaged = bytearray(data)
            for place in generator.integers(0, len(data), 3):
                damaged[place] = generator.integers(0, 256)
            try:
                decode(bytes(damaged))
            except BadSampleError:
                pass


def test_at_least_shrinks_jpegs_alone_and_only_so_far():
    image = Image.new("RGB", (800, 600))
    jpeg = encoded(image, "JPEG")
    assert [decode(jpeg, at_least=n).size for n in (None, 601, 300, 299, 150, 75)] == [
        (800, 600), (800, 600), (400, 300), (400, 300), (200, 150), (100, 75)
    ]  # fmt: skip
    assert decode(encoded(image), at_least=75).size == (800, 600)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_unreadable_exif_does_not_cost_the_picture():
    data = encoded(Image.fromarray(picture()), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff", quality=95)
    assert decode(data).size == (7, 5)
