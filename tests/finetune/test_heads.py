"""Heads: they learn what is there, equal scikit-learn on the embeddings, and leave the model as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmrep.config import component
from mmrep.finetune.attentive import AttentiveHead
from mmrep.finetune.heads import LinearHead, MultiLabelHead, RegressionHead
from mmrep.model import Model, ModelConfig, TowerConfig
from tests import toys  # noqa: F401  registers the encoder

N = 60


def model(towers=("a",), dropout=0.0):
    torch.manual_seed(0)
    made = TowerConfig(encoder=component("encoders", "toy", dropout=dropout))
    return Model(ModelConfig(dim=6, towers=dict.fromkeys(towers, made), temperatures={}))


def values(seed=0):
    """Lists of numbers: what their mean is, and whether some single one is large."""
    random = np.random.default_rng(seed)
    raw = [random.uniform(-1, 1, 4 + i % 3).round(2).tolist() for i in range(N)]
    return raw, np.array([np.mean(x) for x in raw])


def state(m):
    return torch.cat([p.detach().reshape(-1).clone() for p in m.parameters()])


def test_a_linear_head_is_logistic_regression_on_the_embeddings():
    m, (raw, mean) = model(), values()
    y = np.where(mean > 0, "up", "down")
    head = LinearHead(m, C=3.0).fit(raw[:40], y[:40])
    x = np.asarray(m.encode(raw), dtype=float)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=3.0, max_iter=1000)).fit(x[:40], y[:40])
    assert (head.predict(raw[40:]) == reference.predict(x[40:])).all()
    np.testing.assert_allclose(head.predict_proba(raw[40:]), reference.predict_proba(x[40:]))
    assert head.score(raw[40:], y[40:]) == reference.score(x[40:], y[40:]) > 0.8
    assert list(head.classes_) == ["down", "up"]
    assert (LinearHead(C=3.0).fit(x[:40], y[:40]).predict(x[40:]) == reference.predict(x[40:])).all()


def test_a_regression_head_is_ridge_regression():
    m, (raw, mean) = model(), values()
    head = RegressionHead(m, alpha=0.1).fit(raw[:40], mean[:40])
    x = np.asarray(m.encode(raw), dtype=float)
    reference = make_pipeline(StandardScaler(), Ridge(alpha=0.1)).fit(x[:40], mean[:40])
    np.testing.assert_allclose(head.predict(raw[40:]), reference.predict(x[40:]))
    assert head.score(raw[40:], mean[40:]) > 0.7
    assert RegressionHead(m).fit(raw, np.stack([mean, -mean], 1)).predict(raw).shape == (N, 2)


def test_a_multi_label_head_answers_as_it_was_asked():
    m, (raw, mean) = model(), values()
    names = [{name for name, is_so in (("up", v > 0), ("far", abs(v) > 0.2)) if is_so} for v in mean]
    head = MultiLabelHead(m, of="pooled", C=10.0).fit(raw, names)
    assert list(head.classes_) == ["far", "up"]
    found = head.predict(raw)
    right = np.mean([set(a) == b for a, b in zip(found, names, strict=True)])
    assert head.score(raw, names) == pytest.approx(right)
    assert np.mean([("up" in a) == ("up" in b) for a, b in zip(found, names, strict=True)]) > 0.85
    table = np.array([["far" in n, "up" in n] for n in names]).astype(int)
    again = MultiLabelHead(m, of="pooled", C=10.0).fit(raw, table)
    np.testing.assert_allclose(again.predict_proba(raw), head.predict_proba(raw))
    assert again.predict(raw).shape == (N, 2)
    assert again.score(raw, table) == pytest.approx(right)


def test_pooled_is_before_the_projector_in_eval_mode():
    m, (raw, mean) = model(dropout=0.5), values()
    m.train()
    head = RegressionHead(m, of="pooled").fit(raw, mean)
    np.testing.assert_allclose(head.predict(raw), head.predict(raw))
    assert head.head_[0].n_features_in_ == 8  # the width of the tokens, not the model's 6
    assert m.training


def test_heads_work_in_scikit_learns_tools():
    m, (raw, mean) = model(), values()
    assert cross_val_score(LinearHead(m), raw, mean > 0, cv=3).mean() > 0.7
    copied = clone(LinearHead(m, C=7.0))
    assert copied.C == 7.0


@pytest.mark.parametrize("end_to_end", [False, True])
def test_an_attentive_head_finds_the_one_token_that_matters_and_leaves_the_model_alone(end_to_end):
    m, (raw, _) = model(), values()
    y = np.array(["yes" if max(x) > 0.8 else "no" for x in raw])
    before = state(m)
    m.train()
    head = AttentiveHead(m, end_to_end=end_to_end, epochs=40, lr=0.05, encoder_lr=0.01).fit(raw, y)
    assert head.score(raw, y) > max(0.9, (y == "no").mean() + 0.1)
    assert torch.equal(state(m), before)
    assert all(part.training for part in m.modules())
    assert torch.equal(state(head.tower_), before) is not end_to_end
    assert head.predict_proba(raw).sum(1) == pytest.approx(np.ones(N), abs=1e-5)
    assert (AttentiveHead(m, end_to_end=end_to_end, epochs=40, lr=0.05, encoder_lr=0.01).fit(raw, y)
            .predict_proba(raw) == head.predict_proba(raw)).all()  # fmt: skip


def test_an_attentive_head_gives_labels_and_numbers():
    m, (raw, mean) = model(), values()
    head = AttentiveHead(m, task="numbers", epochs=60, lr=0.05).fit(raw, 100 + 5 * mean)
    assert head.score(raw, 100 + 5 * mean) > 0.7
    assert head.predict(raw).shape == (N,)
    table = np.stack([mean > 0, mean < 0.1], 1).astype(int)
    labels = AttentiveHead(m, task="labels", epochs=60, lr=0.05).fit(raw, table)
    assert (labels.predict(raw) == table).mean() > 0.85
    with pytest.raises(ValueError, match="no probabilities"):
        head.predict_proba(raw)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda raw, y: LinearHead(model(("a", "b")), of="pooled").fit(raw, y), "this model reads a, b: say which"),
        (lambda raw, y: LinearHead(model()).fit(raw, y[:-1]), "60 values and 59 targets"),
        (lambda raw, y: LinearHead().fit(np.zeros(60), y), r"reads embeddings \[n, D\]"),
        (lambda raw, y: LinearHead(model(), of="tokens").fit(raw, y), "of is 'embedding' or 'pooled'"),
        (lambda raw, y: AttentiveHead(model(), task="class").fit(raw, y), "task is 'classes'"),
    ],
)
def test_mistakes_are_told(build, words):
    raw, mean = values()
    with pytest.raises(ValueError, match=words):
        build(raw, mean > 0)
