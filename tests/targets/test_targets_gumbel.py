"""The quantiser and the contrastive loss of wav2vec 2.0 against transformers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrep.data.sample import stable_hash
from mmrep.losses.token_contrast import contrast
from mmrep.schedules import Clock
from mmrep.views.view import uniform
from tests.targets.targets_steps import batch, masked, root, step

SMALL = {"type": "gumbel-codes", "norm": "layer", "groups": 2, "codes": 6, "dim": 8, "width": 5}
WAV2VEC = {
    "target": SMALL,
    "input": "mask-token",
    "predictor": {"type": "tokenwise"},
    "mask": {"type": "random", "ratio": 0.5},
}
INSIDE = slice(1, None)


def quantizer(target):
    """The quantiser of transformers with the weights of ours."""
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer

    theirs = Wav2Vec2GumbelVectorQuantizer(
        Wav2Vec2Config(num_codevector_groups=2, num_codevectors_per_group=6, codevector_dim=8, conv_dim=(16,) * 7)
    )
    theirs.weight_proj.load_state_dict(target.logits.state_dict())
    theirs.codevectors.data = target.codebook.detach().reshape(1, 12, 4)
    return theirs


def features(s):
    """What is quantised: patches without their positions, layer-normed as `Wav2Vec2FeatureProjection` does."""
    tokens = s.tokens("x")
    values = tokens.values - tokens.positions
    deviation = (values.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (values - values.mean(-1, keepdim=True)) / deviation


def test_hard_codes_and_diversity_equal_transformers():
    built = root(**WAV2VEC)
    target = masked(built).target
    s = step(built, batch(built))
    theirs = quantizer(target)
    vectors, _ = theirs.eval()(features(s))
    torch.testing.assert_close(target.eval()(s, "x").values, target.project(vectors))
    _, perplexity = theirs.train()(features(s)[:, INSIDE])
    parts = target.parts()
    twin = (12 - perplexity) / 12
    torch.testing.assert_close(parts["diversity"], twin.detach())
    torch.testing.assert_close(parts["perplexity"], perplexity.detach() / 2)  # of a group
    torch.testing.assert_close(parts["loss"], 0.1 * twin)
    (mine,) = torch.autograd.grad(parts["loss"], target.logits.weight)
    (his,) = torch.autograd.grad(0.1 * twin, theirs.weight_proj.weight)
    torch.testing.assert_close(mine, his)


def test_soft_codes_are_a_straight_through_gumbel_softmax():
    built = root(**WAV2VEC)
    target = masked(built).target
    s = step(built, batch(built), clock=Clock(step=5, total=10))
    out = target(s, "x").values
    u = uniform(s.batch.seeds + stable_hash("x", 0, "gumbel"), 17 * 12).view(4, 17, 2, 6)
    noise = -(-u.log()).log()
    soft = ((target.logits(features(s)).view(4, 17, 2, 6) + noise) / 1.25).softmax(-1)  # half the way from 2 to 0.5
    hard = F.one_hot(soft.argmax(-1), 6).float()
    vectors = torch.cat([hard[:, :, g] @ target.codebook[g] for g in range(2)], -1)
    torch.testing.assert_close(out, target.project(vectors))
    # Its gradient is that of the soft choice.
    twin = target.project(torch.cat([soft[:, :, g] @ target.codebook[g].detach() for g in range(2)], -1))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (mine,) = torch.autograd.grad((out * weights).sum(), target.logits.weight, retain_graph=True)
    (his,) = torch.autograd.grad((twin * weights).sum(), target.logits.weight)
    torch.testing.assert_close(mine, his)


def theirs(predicted, target, negatives, temperature):
    """The loss of one token, from the pieces of transformers: [M, D] negatives."""
    from transformers import Wav2Vec2ForPreTraining

    logits = Wav2Vec2ForPreTraining.compute_contrastive_logits(
        target[None], negatives, predicted, temperature
    )  # [1 + M]
    same = torch.isclose(target, negatives, rtol=0, atol=1e-5).all(-1)  # one code, rounded twice
    logits = torch.cat([logits[:1], logits[1:].masked_fill(same, -torch.inf)])
    return F.cross_entropy(logits[None], torch.zeros(1, dtype=torch.long))


def chosen(valid, noise):
    """Which distractors each token of a row has, one by one."""
    places = [i for i, v in enumerate(valid.tolist()) if v]
    found = []
    for t in range(len(valid)):
        others = [i for i in places if i != t]
        found.append([others[int(u * len(others))] for u in noise[t].tolist()] if valid[t] and others else [])
    return found


def formula(predicted, target, negatives, temperature):
    """The same in the dtype of the vectors, by the paper."""
    kept = [n for n in negatives if not torch.equal(n, target)]
    scores = torch.stack([F.cosine_similarity(predicted, x, dim=0) / temperature for x in (target, *kept)])
    return scores.logsumexp(0) - scores[0]


@pytest.mark.parametrize(("twin_of", "dtype"), [(theirs, torch.float32), (formula, torch.float64)])
def test_the_contrastive_loss_equals_transformers_and_the_paper(twin_of, dtype):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(3, 6, 4, generator=generator, dtype=dtype, requires_grad=True)
    t = torch.randn(3, 6, 4, generator=generator, dtype=dtype)
    t[0, 3] = t[0, 1]  # the same code twice
    t.requires_grad_()
    valid = torch.tensor([[True] * 6, [True, False, True, True, False, False], [False, True] + [False] * 4])
    noise = torch.rand(3, 6, 7, generator=generator)
    out = contrast(p, t, valid, noise, 0.1)
    twin = torch.zeros_like(out)
    for r in range(3):
        for at, negatives in enumerate(chosen(valid[r], noise[r])):
            if negatives:
                twin[r, at] = twin_of(p[r, at], t[r, at], t[r, negatives], 0.1)
    torch.testing.assert_close(out, twin)
    assert out[2].abs().max() == 0
    assert out[0].min() > 0
    for leaf in (p, t):
        (mine,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
        (his,) = torch.autograd.grad(twin.sum(), leaf, retain_graph=True)
        torch.testing.assert_close(mine, his)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(contrast(p, t, valid, noise, 0.1), out)


def test_all_other_valid_tokens_are_distractors_once_if_none_are_drawn():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    t[0, 3], t[0, 4] = t[0, 1], 0.0  # the same twice; and one that is nothing, which is not its own distractor
    t.requires_grad_()
    valid = torch.tensor([[True] * 6, [True, False, True, True, False, False], [False, True] + [False] * 4])
    out = contrast(p, t, valid, None, 0.2)
    twin = torch.zeros_like(out)
    for r in range(3):
        for at in range(6):
            others = [i for i in range(6) if i != at and valid[r, i]]
            if valid[r, at]:
                twin[r, at] = formula(p[r, at], t[r, at], t[r, others], 0.2)
    torch.testing.assert_close(out, twin)
    (mine,) = torch.autograd.grad(out.sum(), p, retain_graph=True)
    (his,) = torch.autograd.grad(twin.sum(), p)
    torch.testing.assert_close(mine, his)
    assert contrast(p[:, :0], t[:, :0], valid[:, :0], None, 0.2).shape == (3, 0)


def test_distractors_are_all_other_valid_tokens_and_no_others():
    valid = torch.tensor([[True, False, True, True, True]])
    t = torch.eye(5)[None]
    noise = torch.linspace(0, 1 - 2**-24, 90).expand(1, 5, -1)
    seen = set()
    for token in (0, 2, 3, 4):
        for k, m in enumerate(chosen(valid[0], noise[0])[token]):
            seen.add((token, m))
            one = contrast(t.double(), t.double(), valid, noise[:, :, k : k + 1], 1.0)
            # The right answer has cosine 1, a distractor 0; the token itself as one would be left out, with loss 0.
            assert float(one[0, token]) == pytest.approx(float(torch.tensor([1.0, 0.0]).logsumexp(0)) - 1)
    assert seen == {(a, b) for a in (0, 2, 3, 4) for b in (0, 2, 3, 4) if a != b}


def test_equal_vectors_but_for_rounding_are_no_distractors():
    t = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    t[0, 1] = t[0, 0] * (1 + 1e-7)
    t[0, 2] = t[0, 0]
    out = contrast(torch.randn(1, 3, 16), t, torch.ones(1, 3, dtype=torch.bool), torch.rand(1, 3, 9), 0.1)
    assert out.abs().max() < 1e-6
    empty = contrast(t[:, :0], t[:, :0], torch.ones(1, 0, dtype=torch.bool), torch.rand(1, 0, 9), 0.1)
    assert empty.shape == (1, 0)


def test_the_objective_contrasts_hidden_tokens_of_one_sample():
    built = root(**WAV2VEC, negatives=5, temperature=0.2)
    objective = masked(built)
    s = step(built, batch(built))
    predictions = []
    objective.predictor.register_forward_hook(lambda _, given, out: predictions.append((out, given[3])))
    out = objective(s)
    (predicted, index), *_ = predictions
    wanted = objective.target(s, "x").values
    T = index.shape[1]
    noise = uniform(s.batch.seeds + stable_hash("x", 0, "mask", None), T * 5, stream=1).view(4, T, 5)
    total = torch.zeros(())
    for b in range(4):
        t = wanted[b][index[b]]
        for at, negatives in enumerate(chosen(index[b] >= 0, noise[b])):
            total = total + theirs(predicted[b, at], t[at], t[negatives], 0.2) / T / 4
    torch.testing.assert_close(out["loss"], total + objective.target.parts()["loss"])
    assert set(out) == {"loss", "diversity", "perplexity"}
    out["loss"].backward()
    for p in [*objective.parameters(), *built.model.tower("image").encoder.parameters()]:
        assert p.grad is not None
        assert p.grad.isfinite().all()


def test_several_masks_of_a_sample_draw_their_own_distractors():
    built = root(**{**WAV2VEC, "mask": {"type": "random", "ratio": 0.5, "masks": 2}})
    noises = []
    import mmrep.objectives.masked as module

    kept = module.contrast
    try:
        module.contrast = lambda p, t, v, noise, temperature: noises.append(noise) or kept(p, t, v, noise, temperature)
        assert masked(built)(step(built, batch(built)))["loss"].isfinite()
    finally:
        module.contrast = kept
    assert noises[0].shape[0] == 8
    assert (noises[0][0] - noises[0][1]).abs().max() > 0.1


def test_a_dead_codebook_has_a_finite_gradient():
    built = root(**WAV2VEC)
    target = masked(built).target
    target.logits.bias.data[0] = 200.0
    target.logits.bias.data[6] = 200.0
    target(step(built, batch(built)), "x")
    loss = target.parts()["loss"]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.1 * (12 - 2) / 12)
    assert target.logits.weight.grad.isfinite().all()


def test_dim_must_be_a_multiple_of_groups():
    with pytest.raises(ValueError, match="groups=2 does not divide dim=7"):
        root(**{**WAV2VEC, "target": {**SMALL, "dim": 7}})
