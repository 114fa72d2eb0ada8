"""The open_clip image tower against open_clip itself."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from mmrep.config import component
from mmrep.modalities.image.open_clip import OpenClipImage

MODELS = ["tiny-vit", "tiny-vit-avg", "tiny-resnet", "tiny-timm"]  # made in conftest.py
pytestmark = pytest.mark.usefixtures("tiny_clip")


def theirs(name: str) -> torch.nn.Module:
    torch.manual_seed(3)
    return open_clip.create_model(name).eval()


def ours(name: str, tmp_path: Path, **fields) -> tuple[OpenClipImage, torch.nn.Module]:
    model = theirs(name)
    path = tmp_path / "clip.safetensors"
    save_file({key: value.clone() for key, value in model.state_dict().items()}, path)
    return component("encoders", "open-clip-image", model=name, checkpoint=str(path), **fields).build().eval(), model


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_pooled_is_encode_image(name: str, tmp_path: Path):
    encoder, model = ours(name, tmp_path)
    pixels = torch.rand(2, 3, encoder.preprocess.size, encoder.preprocess.size)
    out = encoder({"pixels": pixels})
    torch.testing.assert_close(out.pooled, model.encode_image(encoder.normalize(pixels)))
    assert encoder.pooled_width == 24


@torch.no_grad()
def test_tokens_and_layers_are_open_clips(tmp_path: Path):
    encoder, model = ours("tiny-vit", tmp_path)
    pixels = torch.rand(2, 3, 32, 32)
    out = encoder.encode(encoder.tokenize({"pixels": pixels}), layers=[1, 2])
    model.visual.output_tokens = True
    _, tokens = model.visual(encoder.normalize(pixels))
    torch.testing.assert_close(out.tokens.values[:, 1:], tokens)
    middle = model.visual.forward_intermediates(encoder.normalize(pixels), [0, 1], output_fmt="NLC")[
        "image_intermediates"
    ]
    for mine, twin in zip(out.layers, middle, strict=True):
        torch.testing.assert_close(mine[:, 1:], twin)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_preprocessing_is_open_clips(resize_mode: str, tmp_path: Path):
    encoder, _ = ours("tiny-vit", tmp_path, resize={"shortest": "crop", "squash": "squash"}[resize_mode])
    twin = image_transform_v2(PreprocessCfg(size=32, resize_mode=resize_mode), is_train=False)
    for raw in encoder.examples(12, 0)[::6]:
        assert isinstance(raw, Image.Image)
        torch.testing.assert_close(encoder.normalize(encoder.prepare(raw)["pixels"][None])[0], twin(raw))


def test_a_published_tag_brings_its_preprocessing_and_activation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """SigLIP squashes to mean 0.5; OpenAI's weights need QuickGELU although the model's name does not say so."""
    from mmrep.modalities.image.open_clip import _resolve

    _, siglip = _resolve(OpenClipImage.Config(model="ViT-B-16-SigLIP", pretrained="webli"))
    assert (siglip["resize"], tuple(siglip["mean"]), siglip["size"]) == ("squash", (0.5, 0.5, 0.5), 224)
    made, openai = _resolve(OpenClipImage.Config(model="ViT-B-32", pretrained="openai"))
    assert made["quick_gelu"] is True
    assert (openai["resize"], list(openai["mean"])) == ("crop", [0.48145466, 0.4578275, 0.40821073])
    made, _ = _resolve(OpenClipImage.Config(model="ViT-B-32", pretrained="laion2b_s34b_b79k"))
    assert made["quick_gelu"] is False


@torch.no_grad()
def test_quick_gelu_is_part_of_the_saved_model(tmp_path: Path):
    encoder, _ = ours("tiny-vit", tmp_path, quick_gelu=True)
    plain, _ = ours("tiny-vit", tmp_path)
    pixels = {"pixels": torch.rand(1, 3, 32, 32)}
    assert not torch.allclose(encoder(pixels).pooled, plain(pixels).pooled)
    (tmp_path / "files").mkdir()
    encoder.save_files(tmp_path / "files")
    again = OpenClipImage(plain.config, files=tmp_path / "files").eval()
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(again(pixels).pooled, encoder(pixels).pooled)


def test_another_size(tmp_path: Path):
    encoder = component("encoders", "open-clip-image", model="tiny-vit", size=48).build()
    assert encoder.tokenize({"pixels": torch.zeros(1, 3, 48, 48)}).grid.shape == (6, 6)
    timm = component("encoders", "open-clip-image", model="tiny-timm", size=64).build()
    assert timm.tokenize({"pixels": torch.zeros(1, 3, 64, 64)}).grid.shape == (4, 4)
    assert timm.trunk.model.pos_embed.shape[1] == 1 + 16, "positions stay those of another size, resampled at each call"


def test_what_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no model 'ViT-B-33'; did you mean 'ViT-B-32'"):
        component("encoders", "open-clip-image", model="ViT-B-33").build()
    with pytest.raises(ValueError, match=r"no pretrained 'laion2b'.*it has: openai"):
        component("encoders", "open-clip-image", model="ViT-B-32", pretrained="laion2b").build()
    with pytest.raises(ValueError, match="pickle"):
        component("encoders", "open-clip-image", checkpoint="open_clip_pytorch_model.bin")
    path = tmp_path / "x.safetensors"
    save_file({"visual.proj": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        component("encoders", "open-clip-image", model="tiny-vit", checkpoint=str(path)).build()
