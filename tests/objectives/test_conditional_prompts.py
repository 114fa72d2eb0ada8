"""Prompts that move with the picture: against a loop over samples and classes, and that they do move."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.data.batch import Batch
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root

CLASSES = ("red disc", "blue bar", "frame")
LABELS = ["frame", None, "red disc", "blue bar"]


def build(image="image-vit", context="a photo of", **fields):
    torch.manual_seed(0)
    plain = {"type": "text-transformer", "tokenizer": "bytes", "width": 16, "depth": 1, "heads": 2, "max_length": 40}
    text = component("encoders", "prompt-tuned-text", encoder=plain, context=context)
    vit = {"size": 8, "patch": 4, "width": 16, "depth": 2, "heads": 2} if image == "image-vit" else {}
    towers = {
        "image": TowerConfig(encoder=component("encoders", image, **vit), frozen="tower"),
        "text": TowerConfig(encoder=text, frozen=["encoder.inner.*", "projector.*"]),
    }
    model = Model(ModelConfig(dim=6, towers=towers))
    model.temperature("default").requires_grad_(False)
    given = {"field": "x", "text": "text", "classes": CLASSES, "template": "{} here", "views": 2, **fields}
    return Root(model, [component("objectives", "conditional-prompts", **given)], fields={"x": "image"}, views={})


def batch(rows=range(4), absent=()):
    pixels = torch.randint(0, 256, (2, 4, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    here = [i for i in rows if i not in absent]
    present = torch.tensor([i not in absent for i in rows], dtype=torch.bool)
    inputs = {"x": [{"pixels": pixels[view][here]} for view in range(2)]} if here else {}
    return Batch(
        ids=[str(i) for i in rows], inputs=inputs, present={"x": present}, seeds=torch.tensor(list(rows)),
        labels=[LABELS[i] for i in rows],
    )  # fmt: skip


def slow(root, given, consistency):
    """Sample by sample: the context is moved in place and every prompt is read by itself."""
    model, objective = root.model, root.objectives["conditional-prompts"]
    pictures, text = model.tower("image"), model.tower("text")
    learned, losses = text.encoder.learned, []
    for row, label in enumerate(LABELS):
        if label is None:
            continue
        seen = []
        for view in range(2):
            inputs = {"pixels": given.inputs["x"][view]["pixels"][row : row + 1]}
            encoder = pictures.encoder
            layers = encoder.encode(encoder.tokenize(inputs), None, (1, 2)).layers
            shift = objective.blend.bias
            for number, tokens in enumerate(layers):
                mean, deviation = tokens[0].mean(0), tokens[0].var(0, correction=0).sqrt()
                part = objective.style[number]((mean + deviation) / 2) / 2 + objective.look[number](mean) / 2
                shift = shift + objective.blend.weight[0, number] * part
            vectors = []
            for name in CLASSES:
                collated = text.encoder.collate([text.encoder.prepare(f"{name} here")])
                ids = collated["ids"][0]
                places = ids - text.encoder.vocabulary
                table = text.encoder.inner.vectors()
                values = [learned[p] + shift if p >= 0 else table.weight[i] for p, i in zip(places, ids, strict=True)]
                hook = table.register_forward_hook(lambda *_, values=values: torch.stack(values)[None])
                encoding = text.encoder.inner({**collated, "ids": torch.zeros_like(collated["ids"])})
                hook.remove()
                vectors.append(F.normalize(text.project(text.pool(encoding))[0], dim=0))
            seen.append(torch.stack(vectors))
        picture = pictures({"pixels": given.inputs["x"][0]["pixels"][row : row + 1]})[0]
        logits = model.temperature("default").scale[0] * F.normalize(picture, dim=0) @ seen[0].T
        losses.append(-logits.log_softmax(0)[CLASSES.index(label)] + consistency * ((seen[0] - seen[1]) ** 2).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("consistency", [0.0, 5.0])
def test_the_loss_is_a_loop_over_samples_and_classes(consistency):
    root = build(consistency=consistency).double().train()
    given = batch()
    found, wanted = root(given)["loss"], slow(root, given, consistency)
    torch.testing.assert_close(found, wanted)
    parameters = [p for p in root.parameters() if p.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().max() > 0


def test_only_the_context_and_the_net_that_moves_it_learn():
    root = build().train()
    trained = {name for name, p in root.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained - {"model.towers.text.encoder.learned"}} == {"objectives"}
    optimizer = torch.optim.Adam([p for p in root.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(30):
        loss = root(batch())["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_stages_of_a_convolutional_net_have_widths_of_their_own():
    root = build(image="image-cnn").train()
    assert [layer.in_features for layer in root.objectives["conditional-prompts"].style] == [64, 128, 256]
    assert torch.isfinite(root(batch())["loss"])


def test_without_labels_or_without_the_field_all_parameters_still_take_part():
    for given in (batch(absent=range(4)), batch(rows=[1])):
        root = build().train()
        loss = root(given)["loss"]
        assert loss == 0
        loss.backward()
        assert all(p.grad is not None for p in root.parameters() if p.requires_grad)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"field": "xx"}, "unknown 'xx'; did you mean 'x'"),
    ({"text": "txt"}, "did you mean 'text'"),
    ({"context": 0}, "with a context"),
    ({"classes": ("a", "a")}, "named twice"),
])  # fmt: skip
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(**wrong)
