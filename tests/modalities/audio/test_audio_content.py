"""What a clip's tokens are made from: parts of its spectrogram or of its samples; and hidden ones keep their place."""

from __future__ import annotations

import pytest
import torch

from mmrep.config import component

SMALL = {"width": 32, "depth": 2, "heads": 2}


def build(name: str, **fields):
    torch.manual_seed(0)
    return component("encoders", name, **SMALL, **fields).build().eval()


def batch(encoder, n: int = 4):
    return encoder.collate([encoder.prepare(raw) for raw in encoder.examples(n, 0)])


@pytest.mark.parametrize("class_token", [False, True])
def test_patches_put_together_are_the_spectrogram(class_token: bool):
    encoder = build("audio-spectrogram", class_token=class_token)
    inputs = batch(encoder)
    content, (mel, counts) = encoder.content(inputs), encoder.spectrogram(inputs)
    long, high = encoder.patch
    B, C, F, M = mel.shape
    back = content.values[:, class_token:].view(B, -1, encoder.bands, C, long, high)
    seen = content.observed[:, class_token:].view(B, -1, encoder.bands, C, long, high)
    back, seen = (part.permute(0, 3, 1, 4, 2, 5).reshape(B, C, -1, M) for part in (back, seen))
    assert torch.equal(back[:, :, :F], mel)
    real = torch.arange(back.shape[2]) < counts[:, None]
    assert torch.equal(seen, real[:, None, :, None].expand_as(seen))
    assert len(set(counts.tolist())) > 1


def test_the_kernel_applied_to_a_patch_is_its_token():
    encoder = build("audio-spectrogram", frequency="learned")
    inputs = batch(encoder)
    tokens = encoder.tokenize(inputs)
    kernel = encoder.patches.weight.flatten(1)
    mapped = torch.nn.functional.linear(encoder.content(inputs).values, kernel, encoder.patches.bias)
    plain = tokens.grid.valid & ~tokens.grid.special
    torch.testing.assert_close((mapped + tokens.positions)[plain], tokens.values[plain])
    assert torch.equal(tokens.positions[:, 0], encoder.special[0].expand(4, -1))


@pytest.mark.parametrize("class_token", [False, True])
def test_the_samples_of_frames_follow_one_another(class_token: bool):
    encoder = build("audio-wave", conv_width=16, class_token=class_token)
    inputs = batch(encoder)
    content, grid = encoder.content(inputs), encoder.tokenize(inputs).grid
    values, seen = content.values[:, class_token:], content.observed[:, class_token:]
    first = (encoder.field - encoder.stride) // 2
    N = values.shape[1]
    joined = values.flatten(1)
    wave = inputs["wave"][:, 0]
    whole = torch.nn.functional.pad(wave, (0, N * encoder.stride + first))
    assert values.shape[2] == encoder.stride
    assert torch.equal(joined, whole[:, first : first + N * encoder.stride])
    at = first + torch.arange(N * encoder.stride)
    assert torch.equal(seen.flatten(1), at < inputs["lengths"][:, None])
    # The samples lie around the frame's centre, to within the half sample that an even difference leaves.
    middle = (first + torch.arange(N) * encoder.stride + (encoder.stride - 1) / 2) / encoder.config.sampling_rate
    assert (grid.coords[0, class_token:, 0] - middle).abs().max() <= 0.5 / encoder.config.sampling_rate + 1e-6


def test_a_clip_shorter_than_a_frame_is_observed_in_part():
    encoder = build("audio-wave", conv_width=16, class_token=False)
    n = encoder.field // 2
    content = encoder.content({"wave": torch.ones(1, 1, n), "lengths": torch.tensor([n])})
    first = (encoder.field - encoder.stride) // 2
    assert content.values.shape == (1, 1, encoder.stride)
    assert int(content.observed.sum()) == n - first
    assert torch.equal(content.values, content.observed.float())


@pytest.mark.parametrize(("name", "fields"), [("audio-spectrogram", {}), ("audio-wave", {"conv_width": 16})])
def test_hidden_frames_leave_no_trace(name: str, fields: dict):
    encoder, token = build(name, **fields), torch.randn(32)
    inputs = batch(encoder)
    tokens = encoder.tokenize(inputs)
    louder = encoder.tokenize({**inputs, "wave": 0.3 * inputs["wave"].flip(2)})
    plain = tokens.grid.valid & ~tokens.grid.special
    everything = torch.arange(plain.shape[1]).expand_as(plain).masked_fill(~plain, -1)
    assert not torch.allclose(tokens.values[plain], louder.values[plain])
    a, b = (encoder.encode(t.hide(everything, token)).tokens.values for t in (tokens, louder))
    assert torch.equal(a[tokens.grid.valid], b[tokens.grid.valid])
