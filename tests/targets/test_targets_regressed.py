"""CAE: a regressed latent, aligned with the encoder's own of the hidden patches alone, and a decoder behind it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrep.config import ConfigError
from mmrep.predictors.predictor import sincos
from mmrep.targets.content import standardize
from mmrep.tokens import Grid, Tokens
from tests.targets.targets_steps import WIDTH, batch, masked, root, step

CROSS = {"type": "cross-attention", "width": 16, "depth": 1, "heads": 2, "attend": "all"}


def build(of, mask=None, **fields):
    target = {"type": "regressed", "of": of, "heads": 2, **fields}
    return root(mask=mask or {"type": "random", "ratio": 0.5}, predictor=CROSS, target=target)


def test_the_loss_is_that_of_the_decoder_and_of_the_alignment():
    built = build({"type": "content", "normalize": True}, alignment=1.5)
    s = step(built, batch(built))
    objective, encoder = masked(built), built.model.tower("image").encoder
    seen = []
    inner = objective.predictor.forward
    objective.predictor.forward = lambda *args: (seen.append(args), inner(*args))[1]
    out = objective(s)
    objective.predictor.forward = inner
    target = seen[0][3]
    tokens, content = s.tokens("x"), s.content("x").values
    expected = []
    for i in range(4):
        hidden = target[i]
        z = objective.predictor(*(part if part is None else _row(part, i) for part in seen[0]))[0]
        alone = torch.cat([tokens.values[i, :1], tokens.values[i, hidden]])[None]  # class token and hidden ones only
        latent = encoder.norm(encoder.transformer(alone, None)[0])[0, 1:].detach()
        decoder = objective.target
        read, _ = decoder.decoder((z + sincos(tokens.grid.coords[i, hidden], WIDTH))[None], None)
        said = decoder.head(decoder.norm(read))[0]
        expected.append(F.mse_loss(said, standardize(content[i, hidden])) + 1.5 * F.mse_loss(z, latent))
    expected = torch.stack(expected).mean()
    torch.testing.assert_close(out["loss"], expected)
    named = [p for p in built.parameters() if p.requires_grad]
    found = [torch.autograd.grad(x, named, allow_unused=True, retain_graph=True) for x in (out["loss"], expected)]
    for ours, theirs in zip(*found, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert float(out["alignment"]) * 1.5 + float(out["decoding"]) == pytest.approx(out["loss"].item(), rel=1e-5)


def _row(part, i):
    if isinstance(part, torch.Tensor):
        return part[i : i + 1]
    grid = Grid(coords=part.grid.coords[i : i + 1], valid=part.grid.valid[i : i + 1],
                special=part.grid.special[i : i + 1], shape=part.grid.shape)  # fmt: skip
    positions = None if part.positions is None else part.positions[i : i + 1]
    return Tokens(part.values[i : i + 1], grid, positions)


def test_codes_and_several_masks_of_ragged_sizes():
    mask = {"type": "multi-block", "targets": 3, "scale": [0.1, 0.3]}
    built = build({"type": "online-codes", "layers": "content", "codes": 5}, mask=mask)
    loss = built(batch(built))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in masked(built).parameters())
    alone = built.eval()(batch(built, 4))["loss"]  # empty slots, which differ from batch to batch, say nothing
    parts = []
    for i in range(4):
        given = batch(built, 4)
        given.inputs["x"][0] = {"pixels": given.inputs["x"][0]["pixels"][i : i + 1]}
        given.present["x"], given.seeds, given.ids = given.present["x"][:1], given.seeds[i : i + 1], ["0"]
        parts.append(built(given)["loss"])
    torch.testing.assert_close(torch.stack(parts).mean(), alone, atol=1e-5, rtol=1e-4)


def test_a_loss_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="loss 'chamfer' does not fit 'content'; losses: mse, l1"):
        build({"type": "content"}, loss="chamfer")
    with pytest.raises(ConfigError, match="heads=3 does not divide"):
        build({"type": "content"}, heads=3)
