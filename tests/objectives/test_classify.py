"""Labels by the similarity to class names: against a loop, what of a prompt learns, and what stays near."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.data.batch import Batch
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root

CLASSES = ("red disc", "blue bar", "frame")
TEMPLATES = ("a {}", "{} on grey")
LABELS = ["frame", None, "red disc", "red disc", "blue bar", "frame"]


def build(context="a photo of", words=(), **fields):
    torch.manual_seed(0)
    plain = {"type": "text-transformer", "tokenizer": "bytes", "width": 16, "depth": 1, "heads": 2, "max_length": 40}
    text = component("encoders", "prompt-tuned-text", encoder=plain, context=context, words=words)
    image = component("encoders", "image-cnn", size=8, widths=[8], depths=[1], norm="group")
    towers = {
        "image": TowerConfig(encoder=image, frozen="tower"),
        "text": TowerConfig(encoder=text, frozen=["encoder.inner.*", "projector.*"]),
    }
    model = Model(ModelConfig(dim=6, towers=towers))
    model.temperature("default").requires_grad_(False)
    given = {"field": "x", "text": "text", "classes": CLASSES, "templates": TEMPLATES, **fields}
    root = Root(model, [component("objectives", "classify", **given)], fields={"x": "image"}, views={})
    root.fit(lambda field: [])
    return root.train()


def batch(root, rows=range(6), absent=(3,)):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
    here = [i for i in rows if i not in absent]
    present = torch.tensor([i not in absent for i in rows], dtype=torch.bool)
    inputs = {"x": [{"pixels": pixels[here]}]} if here else {}
    return Batch(
        ids=[str(i) for i in rows], inputs=inputs, present={"x": present}, seeds=torch.tensor(list(rows)),
        labels=[LABELS[i] for i in rows],
    )  # fmt: skip


def slow(root, near=0.0, same=0.0):
    """Sample by sample, class by class, text by text."""
    model = root.model
    tower, pictures = model.tower("text"), model.tower("image")
    now, before = [], []
    for name in CLASSES:
        vectors = []
        for template in TEMPLATES:
            item = tower.encoder.prepare(template.format(name))
            vectors.append(tower(tower.encoder.collate([item]))[0])
        now.append(F.normalize(torch.stack(vectors).mean(0), dim=0))
        text = f"a photo of a {name}."
        inner = tower.encoder.inner
        plain = tower.project(tower.pool(inner(inner.collate([inner.prepare(text)]))))[0]
        before.append(plain.detach())
    scale, losses = model.temperature("default").scale[0], []
    given = batch(root)
    for row, i in enumerate([0, 1, 2, 4, 5]):
        if LABELS[i] is None:
            continue
        x = pictures({"pixels": given.inputs["x"][0]["pixels"][row : row + 1]})[0]
        logits = torch.stack([scale * x @ c for c in now])
        old = torch.stack([scale * x @ c for c in before]).softmax(0)
        kept = sum(p * (p.log() - q) for p, q in zip(old, logits.log_softmax(0), strict=True))
        losses.append(-logits.log_softmax(0)[CLASSES.index(LABELS[i])] + same * kept)
    away = sum(((a - b) ** 2).sum() for a, b in zip(now, before, strict=True)) / len(CLASSES)
    return torch.stack(losses).mean() + near * away


@pytest.mark.parametrize("kept", [{}, {"near": 3.0}, {"near": 0.5, "same": 2.0}])
def test_the_loss_is_a_loop_over_samples_and_classes(kept):
    root = build(**kept).double()
    root.fit(lambda field: [])
    with torch.no_grad():
        root.model.tower("text").encoder.learned.add_(0.1)
    found, wanted = root(batch(root))["loss"], slow(root, **kept)
    torch.testing.assert_close(found, wanted)
    learned = root.model.tower("text").encoder.learned
    (ours,), (theirs,) = (torch.autograd.grad(loss, [learned]) for loss in (found, wanted))
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().max() > 1e-4


PROMPTS = {
    "red disc": ("a round red thing", "something like a coin, red", "zzzz 0000 ////"),
    "blue bar": ("a long blue thing", "a stick of blue", "qqqq 1111 ----"),
    "frame": ("the border of a picture", "a thin square line", "!!!! ???? ****"),
}  # fmt: skip


@pytest.mark.parametrize("outliers", [0.9, 100.0])
def test_prompts_of_each_class_and_those_that_stand_out_are_left_out(outliers):
    root = build(near=0.5, same=2.0, near_prompts=PROMPTS, outliers=outliers).double()
    root.fit(lambda field: [])
    model, given = root.model, batch(root)
    tower, pictures = model.tower("text"), model.tower("image")
    inner, texts = tower.encoder.inner, []
    for place in range(3):  # scores: for each prompt, what its best class says of a sample, on average
        row = []
        for name in CLASSES:
            inputs = inner.collate([inner.prepare(PROMPTS[name][place])])
            row.append(F.normalize(tower.project(tower.pool(inner(inputs)))[0].detach(), dim=0))
        texts.append(torch.stack(row))
    rows = [row for row, i in enumerate([0, 1, 2, 4, 5]) if LABELS[i] is not None]
    items = F.normalize(pictures({"pixels": given.inputs["x"][0]["pixels"][rows]}), dim=1)
    scores = torch.stack([(items @ t.T).max(1).values.mean() for t in texts]).detach()
    z = (scores - scores.median()) / (scores - scores.median()).abs().median()
    kept = ((z - z.mean()) / z.std()).abs() <= outliers
    assert kept.sum() == (2 if outliers < 1 else 3)

    before = F.normalize(torch.stack([t for t, k in zip(texts, kept, strict=True) if k]).mean(0), dim=1)
    everything = F.normalize(torch.stack(texts).mean(0), dim=1)
    now = root.objectives["classify"].classes()
    scale = model.temperature("default").scale
    logits, old = scale * items @ now.T, (scale * items @ before.T).softmax(1)
    wanted = F.cross_entropy(logits, torch.tensor([CLASSES.index(LABELS[i]) for i in (0, 2, 4, 5)]))
    wanted = wanted + 2.0 * (old * (old.log() - logits.log_softmax(1))).sum(1).mean()
    wanted = wanted + 0.5 * ((now - everything) ** 2).sum() / len(CLASSES)
    torch.testing.assert_close(root(given)["loss"], wanted)


def test_only_the_prompt_learns_and_it_learns():
    root = build()
    trained = {name for name, p in root.named_parameters() if p.requires_grad}
    assert trained == {"model.towers.text.encoder.learned"}
    before = copy.deepcopy(root.model.state_dict())
    optimizer = torch.optim.Adam([p for p in root.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(40):
        loss = root(batch(root))["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    moved = {name for name, value in root.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"towers.text.encoder.learned"}


def test_features_of_a_frozen_tower_that_are_kept_count_like_pictures():
    root = build().double()
    given = batch(root)
    kept = batch(root)
    encoder = root.model.tower("image").encoder
    kept.items["x"] = [{"pixels": p} for p in kept.inputs.pop("x")[0]["pixels"]]
    kept.keys["x"] = [bytes([i]) for i in range(len(kept.items["x"]))]
    assert not encoder.training
    torch.testing.assert_close(root(kept)["classify/accuracy"], root(given)["classify/accuracy"])
    torch.testing.assert_close(root(kept)["loss"], root(given)["loss"], rtol=1e-5, atol=1e-6)  # kept in fp32
    assert root(kept)["loss"] > 0


def test_a_rank_without_the_field_and_a_batch_without_labels():
    for given in (batch(build(), absent=range(6)), batch(build(), rows=[1])):
        root = build()
        out = root(given)
        assert out["loss"] == 0
        out["loss"].backward()
        assert root.model.tower("text").encoder.learned.grad is not None


@pytest.mark.parametrize(("wrong", "message"), [
    ({"field": "xx"}, "unknown 'xx'; did you mean 'x'"),
    ({"text": "txt"}, "did you mean 'text'"),
    ({"classes": ("a", "a")}, "one is named twice"),
    ({"temperature": "defalt"}, "did you mean 'default'"),
    ({"outliers": 1.5}, "same is 0"),
    ({"near": 1.0, "near_prompts": {"red disc": ("a",), "blue bar": ("b",)}}, "no texts of 'frame'"),
    ({"near": 1.0, "near_prompts": {**dict.fromkeys(CLASSES, ("a",)), "frme": ("b",)}}, "did you mean 'frame'"),
    ({"near": 1.0, "near_prompts": {**dict.fromkeys(CLASSES, ("a",)), "frame": ("b", "c")}}, "as many texts"),
])  # fmt: skip
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(**wrong)


def test_an_unknown_label_is_named():
    root = build(classes=("red disc", "blue bar", "frames"))
    with pytest.raises(ValueError, match=r"label 'frame' is none of .*did you mean 'frames'"):
        root(batch(root))
