"""Segments of the teacher's tokens, and the encoder's own tokens as targets, against loops."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrep.targets.segments import segment
from mmrep.tokens import Grid, Tokens
from tests.targets.targets_steps import batch, masked, root, step

SEGMENTS = {"type": "segments", "threshold": 0.3, "norm": "instance"}
SELFIE = {"target": {"type": "embedding"}, "negatives": "all", "temperature": 0.5,
          "mask": {"type": "random", "ratio": 0.5}}  # fmt: skip


def slow(values, among, threshold):
    """Segments of one sample as lists of places."""
    found, last = [], None
    for n in range(len(values)):
        if not among[n]:
            last = None
            continue
        if last is not None and F.cosine_similarity(values[n], values[last].mean(0), dim=0) >= threshold:
            last.append(n)
        else:
            last = [n]
            found.append(last)
    return found


def test_greedy_segments_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 5, generator=generator)
    kinds = torch.randint(0, 4, (6, 20), generator=generator).sort(1).values
    values = centres[kinds] + 0.5 * torch.randn(6, 20, 5, generator=generator)
    among = torch.rand(6, 20, generator=generator) > 0.1
    among[0], among[1] = True, False
    counts = []
    for threshold in (0.9, 0.5, -0.5):
        number = segment(values, among, threshold)
        for b in range(6):
            twin = torch.full((20,), -1)
            for k, places in enumerate(slow(values[b], among[b], threshold)):
                twin[places] = k
            assert number[b].tolist() == twin.tolist()
        counts.append(int(number.max()) + 1)
    assert counts[0] > counts[1] > counts[2] > 1
    assert segment(values[:0], among[:0], 0.5).shape == (0, 20)


def line(built, s):
    """The tokens of pictures, as if they stood in a line."""
    tokens = s.tokens("x")
    grid = tokens.grid
    places = torch.arange(grid.valid.shape[1]).float().expand(grid.valid.shape)[..., None]
    s._tokens["x", 0] = Tokens(tokens.values, Grid(places, grid.valid, grid.special), tokens.positions)
    return s


@pytest.mark.parametrize("quiet", [0.0, 0.9])
def test_a_token_s_target_is_the_mean_of_its_segment(quiet):
    built = root(target={**SEGMENTS, "quiet": quiet})
    for p in built.teacher.parameters():
        p.data.mul_(1.3)
    s = line(built, step(built, batch(built)))
    target = masked(built).target
    found = target(s, "x").values
    taught, segments, silent = s.taught("x").tokens.values, 0, 0
    for b in range(4):
        x = taught[b, 1:]
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        loud = x.norm(dim=1) >= quiet * x.norm(dim=1).mean()
        silent += int((~loud).sum())
        twin = torch.zeros_like(x)
        for places in slow(x, loud, 0.3):
            twin[places] = x[places].mean(0)
            segments += 1
        torch.testing.assert_close(found[b, 1:], twin)
    assert float(target.parts()["segments"]) == pytest.approx(segments / 4)
    assert 4 * 1 < segments < 4 * 16
    assert bool(silent) == bool(quiet)
    assert not found.requires_grad


def test_tokens_that_are_no_sequence_are_refused():
    built = root(target=SEGMENTS)
    with pytest.raises(ValueError, match="takes a sequence"):
        masked(built).target(step(built, batch(built)), "x")


def test_the_right_patch_is_told_from_all_other_hidden_ones():
    built = root(**SELFIE)
    objective = masked(built)
    s = step(built, batch(built))
    encoder, predictions = built.model.tower("image").encoder, []
    predict = objective.predict

    def spy(*arguments):
        out = predict(*arguments)
        predictions.append(out)
        return out

    objective.predict = spy
    loss = objective(s)["loss"]
    predicted, target = predictions[0]
    bare = F.linear(s.content("x").values, encoder.patches.weight.flatten(1), encoder.patches.bias)  # no position
    total = torch.zeros(())
    for b in range(4):
        t = bare[b, target[b]]
        scores = F.cosine_similarity(predicted[b][:, None], t[None], dim=-1) / 0.5
        total = total + F.cross_entropy(scores, torch.arange(len(t))) / 4
    torch.testing.assert_close(loss, total)
    (mine,) = torch.autograd.grad(loss, encoder.patches.weight, retain_graph=True)
    (his,) = torch.autograd.grad(total, encoder.patches.weight)
    torch.testing.assert_close(mine, his)
    assert target.shape == (4, 8)
