"""Clusters that are found before training: against scikit-learn, and HuBERT's loss against torchaudio."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import MiniBatchKMeans
from torch.nn import functional as F

from mmrep._gradients_measure import Subject
from mmrep.recipe import read_recipe
from mmrep.run import Run
from tests.targets.targets_steps import DEPTH, SIZE, WIDTH, batch, drawn, masked, root, step

K = 6
CONTENT = {"type": "clusters", "codes": K}
LAYER = {"type": "clusters", "codes": K, "layer": 2}
HIDDEN = {"input": "mask-token", "mask": {"type": "random", "ratio": 0.5}}


def pictures(n=9):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(n)]


def vectors(built, layer=None):
    """Of all patches of the pictures, one picture at a time: float64."""
    encoder, found = built.model.tower("image").encoder.eval(), []
    for picture in pictures():
        inputs = encoder.collate([encoder.prepare(picture)])
        if layer is None:
            found.append(encoder.content(inputs).values[0, 1:])
        else:
            found.append(encoder.encode(encoder.tokenize(inputs), None, (layer,)).layers[0][0, 1:].detach())
    built.train()
    return torch.cat(found).double()


@pytest.mark.parametrize("target", [CONTENT, LAYER], ids=["content", "layer"])
def test_clusters_are_those_of_scikit_learn_and_codes_the_nearest(target):
    built = root(target=target)
    built.fit(lambda field: pictures() if field == "x" else [])
    layer = target.get("layer")
    x = vectors(built, layer)
    mean, deviation = x.mean(0), x.var(0, unbiased=False).sqrt()
    twin = MiniBatchKMeans(K, random_state=0, batch_size=4096, n_init=3)
    twin.fit(((x - mean) / deviation).float().numpy())
    mine = masked(built).target
    torch.testing.assert_close(mine.codes, torch.from_numpy(twin.cluster_centers_), atol=1e-4, rtol=1e-4)
    s = step(built, batch(built, pictures=pictures()))
    content = mine(s, "x")
    expected = twin.predict(((x - mean) / deviation).float().numpy()).reshape(9, -1)
    assert content.values[:, 1:, 0].tolist() == expected.tolist()
    assert content.vocabulary == mine.width == K
    shares = np.bincount(expected.ravel(), minlength=K) / expected.size
    shares = shares[shares > 0]
    assert float(mine.parts()["perplexity"]) == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-5)


def test_codes_of_a_layer_are_those_of_the_encoder_as_it_started():
    built = root(target=LAYER, encoder={"dropout": 0.5}, **{**HIDDEN, "predictor": {"type": "tokenwise"}})
    built.fit(lambda field: pictures())
    given = batch(built, pictures=pictures())
    before = masked(built.eval()).target(step(built, given), "x").values
    assert not any(p.requires_grad for p in masked(built).target.parameters())
    built.train()
    optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        built(given)["loss"].backward()
        optimizer.step()
    assert torch.equal(masked(built).target(step(built, given), "x").values, before)


@pytest.mark.parametrize("target", [CONTENT, LAYER], ids=["content", "layer"])
def test_a_checkpoint_brings_the_clusters(target):
    built = root(target=target)
    built.fit(lambda field: pictures())
    other = root(seed=9, target=target)
    given = batch(built)
    with pytest.raises(ValueError, match="was not fitted"):
        masked(other).target(step(other, given), "x")
    other.load_state_dict(built.state_dict())
    a, b = (masked(m).target(step(m, given), "x").values for m in (built, other))
    assert torch.equal(a, b)


def test_fitting_changes_no_weight_and_reads_no_more_than_needed():
    built = root(target={**CONTENT, "vectors": 40})
    before = {name: p.clone() for name, p in built.named_parameters()}
    read = []

    def samples(field):
        for i, picture in enumerate([b"broken", *pictures(200)]):
            read.append(i)
            yield picture

    built.fit(samples)
    assert len(read) <= 33 + 1  # one batch, and what could not be read
    assert all(torch.equal(p, before[name]) for name, p in built.named_parameters())
    assert built.model.tower("image").encoder.training
    with pytest.raises(ValueError, match="codes=6, but the training samples have 0 tokens"):
        root(target=CONTENT).fit(lambda field: [])


def test_what_cannot_be_clustered_is_refused():
    with pytest.raises(ValueError, match="layer: 4 of an encoder that has 3"):
        root(target={**CONTENT, "layer": DEPTH + 1})


def test_a_run_fits_before_it_trains(tmp_path):
    recipe = read_recipe("mae", [
        "objectives=[{type: masked, field: image, input: mask-token, predictor: {type: tokenwise, cosine: 0.1}, "
        "target: {type: clusters, codes: 5}}]", "evaluations={}", "train.steps=2", "average=null",
    ], smoke=True)  # fmt: skip
    run = Run(recipe, tmp_path / "run", smoke=True)
    run.train()
    line = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert "masked/perplexity" in line
    assert masked(Subject(run, processes=1, samples=6).root).target.fitted  # as `mmrep gradients` has it


def test_hubert_s_loss_is_that_of_torchaudio():
    from torchaudio.models.wav2vec2.components import LogitGenerator

    built = root(target=CONTENT, **HIDDEN, predictor={"type": "tokenwise", "cosine": 0.1, "hidden": 7})
    built.fit(lambda field: pictures())
    objective = masked(built)
    theirs = LogitGenerator(WIDTH, K, 7, skip_masked=False, skip_nomask=True)
    linear, cosines = objective.predictor.layers
    theirs.final_proj.load_state_dict(linear.state_dict())
    theirs.label_embeddings.data = cosines.weight.detach().clone()
    s = step(built, batch(built))
    hidden = drawn(built, s)
    tokens, encoder = s.tokens("x"), built.model.tower("image").encoder
    places = torch.where(hidden[..., None], objective.token + tokens.positions, tokens.values)
    x = encoder.encode(type(tokens)(places, tokens.grid, tokens.positions)).tokens.values
    codes = objective.target(s, "x").values[..., 0]
    logits, _ = theirs(x, codes, hidden, hidden)
    twin = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))  # as many are hidden in each sample
    loss = objective(s)["loss"]
    torch.testing.assert_close(loss, twin)
    for mine, his in ((linear.weight, theirs.final_proj.weight), (cosines.weight, theirs.label_embeddings)):
        (a,) = torch.autograd.grad(loss, mine, retain_graph=True)
        (b,) = torch.autograd.grad(twin, his, retain_graph=True)
        torch.testing.assert_close(a, b)
