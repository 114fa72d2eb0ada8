"""Positions with noise (StoP): their covariance, the matrix that they share with the context, and rest in eval mode."""

from __future__ import annotations

import torch

from mmrep.config import component
from mmrep.tokens import Grid, Tokens

D, WIDTH = 6, 8


def asked(predictor, n: int):
    """What the transformer is given at n hidden places of as many samples."""
    seen = []
    predictor.transformer.forward = lambda values, valid: (seen.append(values), (values, ()))[1]
    grid = Grid.regular(n, (2, 2))
    tokens = Tokens(torch.zeros(n, 4, D), grid)
    index, target = torch.tensor([[0]]).expand(n, -1), torch.tensor([[3, 1]]).expand(n, -1)
    predictor(tokens.keep(index), index, tokens, target)
    return seen[0][:, -2:]


def build(**fields):
    torch.manual_seed(0)
    how = {"width": WIDTH, "depth": 1, "heads": 2, **fields}
    return component("predictors", "transformer", **how).build(width=D, out=3, axes=2)


def test_positions_have_the_covariance_of_the_paper():
    predictor = build(noise=0.25)
    still = asked(build().eval(), 1)[0]
    torch.manual_seed(1)
    n = 40_000
    drawn = asked(predictor.train(), n) - still
    matrix = predictor.embed.weight.detach()
    wanted = 0.25 * matrix @ matrix.T
    for hidden in range(2):
        found = torch.cov(drawn[:, hidden].detach().T)
        error = (wanted.diag()[:, None] * wanted.diag() + wanted.square()).div(n).sqrt()  # of a sample covariance
        assert ((found - wanted).abs() < 5 * error).all()
        assert (drawn[:, hidden].mean(0).abs() < 5 * (wanted.diag() / n).sqrt()).all()
    across = drawn[:, 0].detach().T @ drawn[:, 1].detach() / n  # each token has noise of its own
    assert across.abs().max() < 0.02 * wanted.diag().max()


def test_the_noise_trains_the_matrix_of_the_context_and_rests_in_eval_mode():
    predictor = build(noise=0.25).train()
    (asked(predictor, 5)[:, 0].square().sum()).backward()
    assert predictor.embed.weight.grad.any()
    assert predictor.embed.bias.grad is None or not predictor.embed.bias.grad.any()
    predictor.eval()
    assert torch.equal(asked(predictor, 5), asked(predictor, 5))
    torch.testing.assert_close(asked(predictor, 1), asked(build().eval(), 1))
