"""Targets that are learned: a tiny model learns to predict them, and their codes stay alive."""

from __future__ import annotations

import math

import pytest
import torch

from mmrep.data.batch import Batch
from mmrep.schedules import Clock
from mmrep.targets._codebook import Codebook
from mmrep.tokens import Tokens
from mmrep.world import LocalWorld
from tests.targets.targets_steps import PATCH, SIZE, batch, masked, root, step

SIDE, KINDS, STEPS = SIZE // PATCH, 8, 120
CODES = 16
GUMBEL = {"type": "gumbel-codes", "groups": 2, "codes": CODES, "dim": 16, "width": 16}


def pictures(n: int, seed: int) -> torch.Tensor:
    """Pictures of one of two layouts of eight kinds of patches, and some noise: uint8 [n, 3, SIZE, SIZE]."""
    fixed = torch.Generator().manual_seed(0)
    kinds = torch.randint(30, 226, (KINDS, 3, PATCH, PATCH), generator=fixed)
    layouts = torch.randint(0, KINDS, (2, SIDE, SIDE), generator=fixed)
    own = torch.Generator().manual_seed(seed)
    patches = kinds[layouts[torch.randint(0, 2, (n,), generator=own)]]  # [n, rows, columns, 3, P, P]
    whole = patches.permute(0, 3, 1, 4, 2, 5).reshape(n, 3, SIZE, SIZE)
    return (whole + torch.randint(-20, 21, whole.shape, generator=own)).clamp(0, 255).to(torch.uint8)


def trained(**objective):
    """What the last step reports, of a model that was trained on such pictures."""
    built = root(**{"encoder": {"width": 32, "depth": 2}, "input": "mask-token", "predictor": {"type": "tokenwise"},
                    "mask": {"type": "random", "ratio": 0.5}, **objective})  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=3e-3)
    first, out = None, {}
    for number in range(STEPS):
        built.clock = Clock(step=number, total=STEPS)
        whole = Batch(
            ids=[str(i) for i in range(16)], inputs={"x": [{"pixels": pictures(16, number)}]},
            present={"x": torch.ones(16, dtype=torch.bool)}, seeds=torch.arange(16) * 7919 + number * 104729,
        )  # fmt: skip
        out = built(whole)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        built.after_optimizer_step()
        first = out if first is None else first
    return first, {name.removeprefix("masked/"): float(value.detach()) for name, value in out.items()}


def test_gumbel_codes_learn_and_stay_alive():
    first, last = trained(target=GUMBEL, negatives=20)
    assert float(first["loss"].detach()) > 0.9 * math.log(21)
    assert last["loss"] < 0.5 * math.log(21)
    assert last["perplexity"] > 4


def test_online_codes_of_the_teacher_learn_and_stay_alive():
    first, last = trained(target={"type": "online-codes", "codes": CODES, "layers": 2})
    assert float(first["loss"].detach()) > 0.9 * math.log(CODES)
    assert last["loss"] < 0.5 * math.log(CODES)
    assert last["perplexity"] > 6


def test_codes_do_not_depend_on_the_scale_of_tokens():
    """Of tokens near zero the Gumbel noise would draw the codes, whatever is in them, and there is nothing to learn."""
    built = root(target={**GUMBEL, "norm": "layer"}, input="mask-token", predictor={"type": "tokenwise"})
    target, s = masked(built).target, step(built, batch(built))
    tokens = s.tokens("x")
    before = target(s, "x").values
    small = (tokens.values - tokens.positions) * 0.1
    s._tokens["x", 0] = Tokens(small + tokens.positions, tokens.grid, tokens.positions)
    assert tokens.values.std() > 0.05
    torch.testing.assert_close(target(s, "x").values, before, atol=1e-3, rtol=1e-3)


def test_what_tokens_have_in_common_does_not_choose_their_codes():
    used = {}
    for norm in ("layer", "instance"):
        built = root(target={**GUMBEL, "norm": norm}, input="mask-token", predictor={"type": "tokenwise"})
        target, s = masked(built).target, step(built, batch(built))
        tokens = s.tokens("x")
        s._tokens["x", 0] = Tokens(tokens.values + 5 * torch.randn(4, 1, 16), tokens.grid, tokens.positions)
        target.eval()(s, "x")
        used[norm] = float(target.parts()["perplexity"])
        codes = target.chosen
        x = (tokens.values - tokens.positions)[:, 1:]
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        twin = target.logits(x).view(4, 16, 2, CODES).argmax(-1)
        assert torch.equal(codes[:, 1:], twin) == (norm == "instance")
    assert used["instance"] > 2 * used["layer"]


def test_a_codebook_that_died_says_so():
    book = Codebook(8, 2, 0.9)
    many = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        book(many, LocalWorld())
        book.update(LocalWorld())
    assert book.used > 5
    for _ in range(3):  # everything is one point, and the other codes keep their weight
        book(many[:1].expand(64, 2), LocalWorld())
        book.update(LocalWorld())
    assert float(book.used) == pytest.approx(1)
