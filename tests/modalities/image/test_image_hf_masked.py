"""Vision models that were pretrained by masking, read whole: ViT-MAE, Hiera, data2vec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_tiny_hf import save
from test_image_hf import CLOSE, ODD, build, in_order, inputs_of, picture

import mmrep
from mmrep.modalities.image.hf import HFImage
from mmrep.testing import check_encoder


def vision(model: Any) -> Any:
    return getattr(model, "vit", getattr(model, "hiera", model))


@torch.no_grad()
def unmasked(model: Any, **inputs: Any) -> Any:
    """The library's own call of MAE with nothing masked; its noise orders the patches."""
    model = vision(model)
    model.config.mask_ratio = 0.0
    H, W = inputs["pixel_values"].shape[2:]
    noise = torch.arange((H // 4) * (W // 4)).float().expand(len(inputs["pixel_values"]), -1)
    return model(**inputs, noise=noise, output_hidden_states=True)


@pytest.mark.parametrize("kind", ["mae", "mae-pretraining"])
def test_mae_reads_every_patch_in_order(kind: str, tmp_path: Path):
    model, processor = save(kind, tmp_path)
    encoder = build(tmp_path)
    assert encoder.hf_config.mask_ratio == 0.75, "what is saved is the checkpoint's"
    want = unmasked(model, **processor(images=ODD, return_tensors="pt"))
    with torch.no_grad():
        got = encoder.encode(encoder.tokenize(inputs_of(encoder, ODD)), layers=(1,))
    assert got.tokens.values.shape == (4, 17, 16)
    torch.testing.assert_close(got.tokens.values, want.last_hidden_state, **CLOSE)
    torch.testing.assert_close(got.layers[0], want.hidden_states[1], **CLOSE)
    assert mmrep.load(tmp_path).encode([ODD[0]])[0] == pytest.approx(want.last_hidden_state[0, 0].numpy(), abs=1e-4)
    pixels = torch.rand(2, 3, 28, 20, generator=torch.Generator().manual_seed(0))
    want = unmasked(model, pixel_values=encoder.normalize(pixels), interpolate_pos_encoding=True)
    torch.testing.assert_close(encoder({"pixels": pixels}).tokens.values, want.last_hidden_state, **CLOSE)


def test_dropping_patches_is_maes_own_masking(tmp_path: Path):
    model, processor = save("mae", tmp_path)
    encoder = build(tmp_path)
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    keep = noise.argsort(1)[:, :4] + 1
    with torch.no_grad():
        want = model(**processor(images=ODD, return_tensors="pt"), noise=noise).last_hidden_state
        got = encoder.encode(encoder.tokenize(inputs_of(encoder, ODD)), keep=keep).tokens.values
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("kind", ["hiera", "hiera-pretraining"])
def test_hiera_is_the_librarys(kind: str, tmp_path: Path):
    model, processor = save(kind, tmp_path)
    encoder = build(tmp_path)
    network = vision(model)
    network.embeddings.is_mae = network.embeddings.patch_embeddings.is_mae = False
    with torch.no_grad():
        want = network(**processor(images=ODD, return_tensors="pt"))
        got = encoder(inputs_of(encoder, ODD))
    torch.testing.assert_close(got.tokens.values, in_order(want.last_hidden_state), **CLOSE)
    pooled = want.last_hidden_state.mean(1) if kind == "hiera-pretraining" else want.pooler_output
    torch.testing.assert_close(got.pooled, pooled, **CLOSE)
    assert got.tokens.grid.shape == (4, 4)
    pixels = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = network(pixel_values=encoder.normalize(pixels), interpolate_pos_encoding=True)
    got = encoder({"pixels": pixels})
    torch.testing.assert_close(got.tokens.values, want.last_hidden_state, **CLOSE)
    assert got.tokens.grid.shape == (6, 5)
    with pytest.raises(ValueError, match="multiples of 8"):
        encoder({"pixels": pixels[..., :36]})


def test_cells_of_hiera_are_where_the_grid_says(tmp_path: Path):
    """The library's own rerolling, which it does for hidden states, finds the tokens where they are."""
    model, processor = save("hiera", tmp_path)
    encoder = build(tmp_path)
    with torch.no_grad():
        own = model(**processor(images=ODD, return_tensors="pt"), output_hidden_states=True).reshaped_hidden_states[-1]
    torch.testing.assert_close(encoder(inputs_of(encoder, ODD)).tokens.values, own.flatten(1, 2), **CLOSE)


@pytest.mark.parametrize("kind", ["mae", "hiera", "hiera-pretraining"])
def test_contract_and_saving(kind: str, tmp_path: Path):
    save(kind, tmp_path / "source")
    encoder = build(tmp_path / "source")
    check_encoder(encoder)
    (tmp_path / "files").mkdir()
    encoder.save_files(tmp_path / "files")
    again = HFImage(encoder.config, files=tmp_path / "files").eval()
    again.load_state_dict(encoder.state_dict())
    batch = inputs_of(encoder, [picture(30, 40)])
    one, other = encoder(batch), again(batch)
    assert torch.equal(one.tokens.values, other.tokens.values)
    assert (one.pooled is None) == (other.pooled is None)


def test_a_hiera_that_does_not_pool_at_every_stage_is_refused(tmp_path: Path):
    model, _ = save("hiera", tmp_path)
    model.config.num_query_pool = 1
    type(model)(model.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="order that is not known"):
        build(tmp_path)
