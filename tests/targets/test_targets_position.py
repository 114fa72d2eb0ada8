"""DropPos: which place a patch had, when nothing says where it is."""

from __future__ import annotations

import math

import pytest
import torch

from mmrep.config import ConfigError, component
from mmrep.schedules import Clock
from mmrep.targets.position import smoothed
from mmrep.tokens import Grid, indicator
from tests.targets.targets_steps import batch, masked, root, step

HOW = {
    "input": "unplaced",
    "mask": {"type": "random", "ratio": 0.5, "dropped": 0.25},
    "predictor": {"type": "tokenwise"},
    "target": {"type": "position"},
}


def test_smoothing_is_the_formula():
    coords = Grid.regular(1, (3, 4)).coords[0]
    found = smoothed(coords, 0.7)
    for k in range(12):
        weights = [math.exp(-math.dist(divmod(k, 4), divmod(j, 4)) / 0.49) for j in range(12)]
        for j in range(12):
            assert float(found[k, j]) == pytest.approx(weights[j] / sum(weights), rel=1e-5)


def test_the_loss_is_a_loop_over_the_tokens_that_lost_their_position():
    built = root(**HOW)
    s = step(built, batch(built), Clock(step=50, total=100))
    objective, encoder = masked(built), built.model.tower("image").encoder
    tokens, seen, masks = s.tokens("x"), [], []
    inner, draw = encoder.encode, objective.masker
    encoder.encode = lambda *args: (seen.append(args), inner(*args))[1]
    objective.masker = lambda *args: (masks.append(draw(*args)), masks[0])[1]
    loss = objective(s)["loss"]
    (given, shown), mask = seen[0], masks[0]
    losses = []
    for i in range(4):
        visible, lost = mask.visible[i, 0].tolist(), mask.target[i, 0].tolist()
        assert (len(visible), len(lost), len({*visible, *lost})) == (4, 8, 12)
        plain = tokens.values[i] - tokens.positions[i]
        rows = [tokens.values[i, 0], *tokens.values[i, visible], *(plain[lost] + objective.token)]
        out = encoder.norm(encoder.transformer(torch.stack(rows)[None], None)[0])[0, 5:]
        logits = objective.predictor.layers(out)
        for row, token in zip(logits, lost, strict=True):
            weights = torch.tensor([math.exp(-math.dist(divmod(token - 1, 4), divmod(j, 4)) / 0.25) for j in range(16)])
            losses.append(-(weights / weights.sum() * row.log_softmax(0)).sum())
    torch.testing.assert_close(loss, torch.stack(losses).mean())  # smoothing has come down from 1 to 0.5
    assert shown.shape == (4, 12)
    hidden = indicator(mask.target[:, 0], 17)
    assert torch.equal(given.values[~hidden], tokens.values[~hidden])
    loss.backward()
    assert objective.token.grad.any()


def test_at_the_end_the_place_alone_is_right():
    built = root(**HOW)
    s = step(built, batch(built), Clock(step=100, total=100))
    content = masked(built).target(s, "x")
    assert content.vocabulary == 16
    assert torch.equal(content.values[:, 1:], torch.arange(16).expand(4, -1))


def test_a_token_without_its_position_is_the_same_anywhere():
    """The trap: whatever tells the place, a rest of the position or the order of tokens, makes the task trivial."""
    built = root(encoder={"class_token": False, "positions": "sincos"}, **HOW)
    objective, encoder = masked(built), built.model.tower("image").encoder
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    moved = pixels.clone()
    moved[:, :, :4, :4], moved[:, :, 12:, 12:] = pixels[:, :, 12:, 12:], pixels[:, :, :4, :4]
    outs = []
    for picture in (pixels, moved):
        tokens = encoder.tokenize({"pixels": picture}).unplace(torch.tensor([[0, 15]]), objective.token)
        outs.append(encoder.encode(tokens, torch.tensor([[0, 3, 9, 15]])).tokens.values[0])
    torch.testing.assert_close(outs[0][[0, 3]], outs[1][[3, 0]])
    torch.testing.assert_close(outs[0][[1, 2]], outs[1][[1, 2]])


def test_dropped_tokens_are_neither_and_every_token_can_be():
    mask = component("masks", "random", ratio=0.5, dropped=0.25).build()(Grid.regular(300, (4, 4)), torch.arange(300))
    visible, target = (indicator(index[:, 0], 16) for index in (mask.visible, mask.target))
    assert set(target.sum(1).tolist()) == {8}
    assert set(visible.sum(1).tolist()) == {4}
    assert not (visible & target).any()
    shares = (~visible & ~target).double().mean(0)
    assert ((shares - 0.25).abs() < 4 * math.sqrt(0.25 * 0.75 / 300)).all()
    with pytest.raises(ConfigError, match="leave nothing visible"):
        component("masks", "random", ratio=0.75, dropped=0.25)


@pytest.mark.parametrize(("fields", "message"), [
    ({"predictor": {"type": "transformer"}}, "is told where tokens are, which input: unplaced hides"),
    ({"everywhere": True}, "visible tokens have their positions"),
])  # fmt: skip
def test_what_would_give_the_place_away_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        root(**{**HOW, **fields})


def test_another_grid_is_refused():
    built = root(**HOW)
    given = batch(built)
    given.inputs["x"][0] = {"pixels": given.inputs["x"][0]["pixels"][..., :8, :]}
    with pytest.raises(ValueError, match=r"knows a grid of \(4, 4\), and these tokens lie on \(2, 4\)"):
        masked(built)(step(built, given))
