"""The timm adapter against timm's own calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from mmrep.config import ConfigError, component
from mmrep.modalities.image.timm import TimmEncoder
from mmrep.tokens import keep_special

MODELS = {
    "test_vit": {"img_size": 32},
    "test_vit2": {"img_size": 32},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "depth": 2},
    "vit_base_patch16_siglip_224": {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 2},
    "vit_base_patch16_clip_224": {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 2},
    "eva02_tiny_patch14_224": {"img_size": 42, "depth": 2},
    "vit_small_patch16_rope_mixed_224": {"img_size": 48, "depth": 2},
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": [1, 1, 1, 1], "embed_dim": 24},
}
VITS = [name for name in MODELS if ("vit" in name and "swin" not in name) or "eva" in name or "deit" in name]


def pair(name: str) -> tuple[TimmEncoder, torch.nn.Module]:
    """Our encoder, and timm's model with the same weights."""
    torch.manual_seed(0)
    encoder = component("encoders", "timm", model=name, options=MODELS[name]).build().eval()
    model = timm.create_model(name, num_classes=0, **MODELS[name]).eval()
    with torch.no_grad():  # past the initial state, where some positions and scales are zero
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    encoder.trunk.model.load_state_dict(model.state_dict())
    return encoder, model


def batch(encoder: TimmEncoder, n: int = 2) -> torch.Tensor:
    return torch.rand(
        n, 3, encoder.preprocess.size, encoder.preprocess.size, generator=torch.Generator().manual_seed(1)
    )


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_pooled_are_timms(name: str):
    encoder, model = pair(name)
    pixels = batch(encoder)
    out = encoder({"pixels": pixels})
    normal = (pixels - torch.tensor(encoder.preprocess.mean)[:, None, None]) / torch.tensor(encoder.preprocess.std)[
        :, None, None
    ]
    features = model.forward_features(normal)
    pooled = model.forward_head(features, pre_logits=True)
    if features.ndim == 4 and getattr(model, "output_fmt", "NCHW") != "NHWC":
        features = features.permute(0, 2, 3, 1)
    torch.testing.assert_close(out.tokens.values, features.reshape(2, -1, features.shape[-1]))
    torch.testing.assert_close(out.pooled, pooled)
    assert (encoder.width, encoder.pooled_width) == (features.shape[-1], pooled.shape[-1])
    prefix = getattr(model, "num_prefix_tokens", 0)
    assert out.tokens.grid.special.sum(1).tolist() == [prefix, prefix]
    assert ("drop_tokens" in encoder.supports) == (name in VITS)


@torch.no_grad()
@pytest.mark.parametrize("name", VITS)
def test_layers_are_timms_intermediates(name: str):
    encoder, model = pair(name)
    pixels = batch(encoder)
    layers = encoder.encode(encoder.tokenize({"pixels": pixels}), layers=[2, 1]).layers
    theirs = model.forward_intermediates(encoder.normalize(pixels), [0, 1], output_fmt="NLC", intermediates_only=True)
    for ours, twin in zip(layers, theirs[::-1], strict=True):
        torch.testing.assert_close(ours[:, model.num_prefix_tokens :], twin)


@torch.no_grad()
@pytest.mark.parametrize("name", VITS)
def test_dropping_is_attention_among_the_kept(name: str, monkeypatch: pytest.MonkeyPatch):
    """The twin masks the dropped tokens out of attention instead of removing them."""
    encoder, model = pair(name)
    pixels = batch(encoder)
    tokens = encoder.tokenize({"pixels": pixels})
    count = tokens.values.shape[1]
    keep = torch.tensor([[count - 1, count - 3], [count - 2, count - 1]])
    ours = encoder.encode(tokens, keep)
    index = keep_special(keep, tokens.grid)
    seen = torch.zeros(2, count, dtype=torch.bool).scatter(1, index, True)
    mask = seen[:, None, None, :].expand(-1, 1, count, -1)
    theirs = model.forward_features(encoder.normalize(pixels), attn_mask=mask)
    want = theirs.gather(1, index[..., None].expand(-1, -1, theirs.shape[-1]))
    torch.testing.assert_close(ours.tokens.values, want, atol=2e-5, rtol=1e-4)


def test_preprocessing_is_the_models_own():
    encoder, model = pair("test_efficientnet")
    twin = create_transform(**resolve_model_data_config(model), is_training=False)
    for raw in encoder.examples(3, 0)[::2]:
        if raw.mode == "RGBA":
            raw = Image.alpha_composite(Image.new("RGBA", raw.size, "white"), raw).convert("RGB")
        ours = encoder.normalize(encoder.prepare(raw)["pixels"][None])[0]
        torch.testing.assert_close(ours, twin(raw))


def test_a_size_is_passed_to_models_that_need_it_and_overrides_the_rest():
    vit = component(
        "encoders", "timm", model="test_vit", size=48, mean=[0.1, 0.2, 0.3], interpolation="bilinear"
    ).build()
    assert vit.tokenize({"pixels": torch.zeros(1, 3, 48, 48)}).grid.shape == (3, 3)
    assert (vit.preprocess.size, vit.preprocess.mean, vit.preprocess.crop_share) == (48, (0.1, 0.2, 0.3), 0.95)
    cnn = component("encoders", "timm", model="test_resnet", size=64).build()
    assert cnn.prepare(cnn.examples(1, 0)[0])["pixels"].shape == (3, 64, 64)


def test_checkpoint(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    save_file(model.state_dict(), path)
    encoder = component("encoders", "timm", model="test_vit", size=32, checkpoint=str(path)).build()
    torch.testing.assert_close(encoder.trunk.model.patch_embed.proj.weight, model.patch_embed.proj.weight)
    bigger = component("encoders", "timm", model="test_vit", size=64, checkpoint=str(path)).build()  # positions resized
    assert bigger.trunk.model.pos_embed.shape[1] == 17
    save_file({key: value for key, value in model.state_dict().items() if "blocks.1" not in key}, path)
    with pytest.raises(ValueError, match=r"does not fit; missing: .*blocks.1"):
        component("encoders", "timm", model="test_vit", size=32, checkpoint=str(path)).build()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        component("encoders", "timm", model="test_vit", size=32, checkpoint=str(path)).build()
    with pytest.raises(ValueError, match="there is no file"):
        component("encoders", "timm", model="test_vit", checkpoint=str(tmp_path / "no.safetensors")).build()


def test_what_is_refused():
    with pytest.raises(ConfigError, match="pickle"):
        component("encoders", "timm", checkpoint="weights.pth")
    with pytest.raises(ConfigError, match="not both"):
        component("encoders", "timm", checkpoint="weights.safetensors", pretrained=True)
    with pytest.raises(ConfigError, match="dropped by an objective"):
        component("encoders", "timm", options={"patch_drop_rate": 0.5})
    with pytest.raises(ValueError, match=r"no model 'test_vitt'.*'test_vit'"):
        component("encoders", "timm", model="test_vitt").build()


def test_a_folder_of_a_model_with_own_arguments(tmp_path: Path):
    model = timm.create_model("test_vit", img_size=32, depth=1, num_classes=0)
    timm.models.save_for_hf(model, tmp_path / "hub", model_args={"img_size": 32, "depth": 1}, safe_serialization=True)
    encoder = component("encoders", "timm", model=f"local-dir:{tmp_path / 'hub'}", pretrained=True).build()
    assert encoder.depth == 1
    torch.testing.assert_close(encoder.trunk.model.norm.weight, model.norm.weight)
    (tmp_path / "files").mkdir()
    encoder.save_files(tmp_path / "files")
    (tmp_path / "hub" / "config.json").unlink()
    again = TimmEncoder(encoder.config, files=tmp_path / "files")
    again.load_state_dict(encoder.state_dict())
    assert again.preprocess == encoder.preprocess
