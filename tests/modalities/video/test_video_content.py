"""What a video's tokens are made from: the pixels of tubelets; and what is left of a hidden one: its place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmrep.config import component
from mmrep.tokens import index_set


def small(**fields):
    torch.manual_seed(0)
    how = {"size": 16, "frames": 4, "tubelet": 2, "patch": 8, "width": 32, "depth": 2, "heads": 2, **fields}
    return component("encoders", "video-transformer", **how).build().eval()


def batch(encoder, n: int = 4):
    return encoder.collate([encoder.prepare(raw) for raw in encoder.examples(n, 0)])


def unfold_back(tubelets: Tensor, times: int, side: int) -> Tensor:
    """[B, N, 3 * 2 * 8 * 8] to frames [B, 2 * times, 3, 8 * side, 8 * side], by copying one after the other."""
    frames = tubelets.new_zeros(len(tubelets), 2 * times, 3, 8 * side, 8 * side)
    for n in range(tubelets.shape[1]):
        t, row, column = n // side**2, n // side % side, n % side
        block = tubelets[:, n].view(-1, 3, 2, 8, 8).transpose(1, 2)
        frames[:, 2 * t : 2 * t + 2, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = block
    return frames


@pytest.mark.parametrize("class_token", [False, True])
def test_tubelets_put_together_are_the_frames(class_token: bool):
    encoder = small(class_token=class_token)
    inputs = batch(encoder)
    inputs["valid"][1, 3:] = inputs["valid"][2, 1:] = False  # clips shorter than the others
    content = encoder.content(inputs)
    back, seen = (unfold_back(part[:, class_token:].float(), 2, 2) for part in (content.values, content.observed))
    frames, valid = encoder.normalize(inputs["frames"]), inputs["valid"]
    T = frames.shape[1]
    assert torch.equal(back[:, :T][valid], frames[valid])
    assert torch.equal(seen[:, :T].bool(), valid[..., None, None, None].expand_as(frames))
    assert not seen[:, T:].any()
    assert torch.equal(back[2, 1], frames[2, 0])  # what a tubelet is short of repeats its last frame


def test_the_kernel_applied_to_the_content_is_the_token():
    encoder = small(class_token=True)
    inputs = batch(encoder)
    tokens = encoder.tokenize(inputs)
    mapped = torch.nn.functional.linear(
        encoder.content(inputs).values, encoder.tubelets.weight.flatten(1), encoder.tubelets.bias
    )
    plain = tokens.grid.valid & ~tokens.grid.special
    torch.testing.assert_close((mapped + tokens.positions)[plain], tokens.values[plain])
    assert torch.equal(tokens.positions[:, 0], encoder.special[0].expand(4, -1))


def test_several_clips_stand_side_by_side():
    encoder = small(clips=2, class_token=True)
    inputs = batch(encoder)
    content, tokens = encoder.content(inputs), encoder.tokenize(inputs)
    assert content.values.shape[:2] == tokens.values.shape[:2]
    for clip in range(2):
        rows = {key: inputs[key][:, clip] for key in ("frames", "valid", "times")}
        own = torch.cat([torch.tensor([True]), (tokens.grid.coords[0, 1:, 0] == clip)])
        assert torch.equal(content.values[:, own][:, 1:], encoder.content(rows).values[:, 1:])
        assert torch.equal(tokens.positions[:, own], encoder.tokenize(rows).positions)


def test_hidden_tubelets_leave_no_trace():
    encoder, token = small(), torch.randn(32)
    inputs = batch(encoder)
    hidden = torch.tensor([[0, 3]] * 4)
    other = {**inputs, "frames": inputs["frames"].clone()}
    other["frames"][:, :2, :, :8, :8] += 9  # of tubelet 0
    other["frames"][:, :2, :, 8:, 8:] += 9  # of tubelet 3
    one, two = encoder.tokenize(inputs), encoder.tokenize(other)
    assert not torch.equal(one.values, two.values)
    a, b = (encoder.encode(tokens.hide(hidden, token)).tokens.values for tokens in (one, two))
    plain = one.grid.valid
    assert torch.equal(a[plain], b[plain])
    shown = encoder.encode(two.hide(hidden[:, :1], token)).tokens.values
    assert not torch.allclose(a[plain], shown[plain])
    assert index_set(plain).shape == (4, 8)
