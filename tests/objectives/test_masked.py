"""Prediction of hidden tokens: the wiring of mask, encoder, predictor and target, against loops over samples."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from mmrep.config import ConfigError, component
from mmrep.data.batch import Batch
from mmrep.data.sample import stable_hash
from mmrep.model import Model, ModelConfig, TowerConfig
from mmrep.objectives.root import Root
from mmrep.predictors.predictor import sincos
from mmrep.schedules import Clock
from mmrep.targets.content import standardize
from mmrep.teacher import TeacherConfig
from mmrep.tokens import Grid, Tokens
from mmrep.training.cached import forward_backward
from mmrep.views.view import View

VIT = component("encoders", "image-vit", size=16, patch=4, width=24, depth=2, heads=2, class_token=True)
TEXT = component("encoders", "text-transformer", tokenizer="bytes", width=20, depth=1, heads=2, max_length=12)
TRANSFORMER = component("predictors", "transformer", width=16, depth=1, heads=2)
N = 5
WORDS = ["a", None, "bcd", "ef", None]


def root(*objectives, teacher=None, frozen=False, views=None) -> Root:
    torch.manual_seed(0)
    towers = {
        "image": TowerConfig(encoder=VIT, projector=component("projectors", "identity"), frozen=frozen),
        "text": TowerConfig(encoder=TEXT),
    }
    model = Model(ModelConfig(dim=24, towers=towers))
    built = Root(model, objectives, fields={"x": "image", "t": "text"}, views=views or {}, teacher=teacher)
    return built.train()


def masked(**fields):
    return component("objectives", "masked", **{"field": "x", "predictor": TRANSFORMER, **fields})


def batch(built: Root, rows=range(N), words=WORDS) -> Batch:
    image, text = (built.model.tower(name).encoder for name in ("image", "text"))
    pictures, rows = image.examples(N, 0), list(rows)
    inputs = {"x": [image.collate([image.prepare(pictures[i]) for i in rows])]}
    present = {"x": torch.ones(len(rows), dtype=torch.bool)}
    if any(words[i] is not None for i in rows):
        inputs["t"] = [text.collate([text.prepare(words[i]) for i in rows if words[i] is not None])]
        present["t"] = torch.tensor([words[i] is not None for i in rows])
    return Batch(ids=[str(i) for i in rows], inputs=inputs, present=present, seeds=torch.tensor(rows) * 7)


def drawn(built: Root, given: Batch):
    """The mask that the first objective draws."""
    (objective,) = built.objectives.values()
    tokens = built.model.tower("image").encoder.tokenize(given.inputs["x"][0])
    return tokens, objective.masker(tokens.grid, given.seeds + stable_hash("x", 0, "mask", None))


def test_an_autoencoder_encodes_what_is_visible_and_predicts_the_rest():
    built = root(masked(target={"type": "content", "normalize": True}))
    given = batch(built)
    (objective,) = built.objectives.values()
    encoder, predictor = built.model.tower("image").encoder, objective.predictor
    tokens, mask = drawn(built, given)
    content = encoder.content(given.inputs["x"][0]).values
    expected = []
    for i in range(N):
        visible, hidden = mask.visible[i, 0], mask.target[i, 0]
        assert len(hidden) == 12  # 75 % of 16
        seen = torch.cat([tokens.values[i, :1], tokens.values[i, visible]])[None]  # the class token in front
        context = encoder.norm(encoder.transformer(seen, None)[0])
        places = sincos(tokens.grid.coords[i], 16)
        known = predictor.embed(context)[0]
        known[1:] += places[visible]
        asked = predictor.token + places[hidden]
        out = predictor.transformer(torch.cat([known, asked])[None], None)[0][0, -len(hidden) :]
        expected.append(F.mse_loss(predictor.head(predictor.norm(out)), standardize(content[i, hidden])))
    torch.testing.assert_close(built(given)["loss"], torch.stack(expected).mean())


def test_many_targets_of_one_context_are_predicted_one_by_one():
    target = {"type": "teacher"}
    blocks = {"type": "multi-block", "targets": 3, "scale": [0.2, 0.3]}
    built = root(masked(mask=blocks, target=target), teacher=TeacherConfig(momentum=0.5))
    given = batch(built)
    tokens, mask = drawn(built, given)
    assert (mask.visible.shape[1], mask.target.shape[1]) == (1, 3)
    (objective,) = built.objectives.values()
    encoder, wanted = built.model.tower("image").encoder, []
    with torch.no_grad():
        twin = built.teacher.of(encoder)
        taught = twin(given.inputs["x"][0]).tokens.values
    taught = F.layer_norm(taught, taught.shape[-1:])
    for i in range(N):
        one = Tokens(tokens.values[i : i + 1], _row(tokens.grid, i))
        losses = []
        for k in range(3):
            hidden = mask.target[i : i + 1, k]
            hidden = hidden[hidden >= 0][None]
            visible = mask.visible[i : i + 1, 0]
            visible = visible[visible >= 0][None]
            context = encoder.encode(one, visible).tokens
            index = torch.cat([torch.zeros(1, 1, dtype=torch.long), visible], 1)
            out = objective.predictor(context, index, one, hidden)
            losses += F.smooth_l1_loss(out, taught[i, hidden[0]][None], reduction="none").mean(-1)[0].tolist()
        wanted.append(sum(losses) / len(losses))
    assert built(given)["loss"].item() == pytest.approx(sum(wanted) / N, rel=1e-4)


def _row(grid, i):
    return Grid(coords=grid.coords[i : i + 1], valid=grid.valid[i : i + 1], special=grid.special[i : i + 1],
                shape=grid.shape)  # fmt: skip


def test_a_mask_token_hides_what_it_stands_for():
    built = root(masked(input="mask-token", mask={"type": "random", "ratio": 0.5}, predictor={"type": "tokenwise"},
                        target={"type": "teacher"})).eval()  # fmt: skip
    given = batch(built)
    (objective,) = built.objectives.values()
    mask = drawn(built, given)[1]
    seen = []
    original = objective.predictor.forward
    objective.predictor.forward = lambda context, *rest: (seen.append(context.values), original(context, *rest))[1]
    built(given)
    changed = copy.deepcopy(given)
    pixels = changed.inputs["x"][0]["pixels"]
    for i in range(N):
        for token in mask.target[i, 0].tolist():
            row, column = divmod(token - 1, 4)
            patch = pixels[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            patch.copy_(255 - patch if patch.dtype == torch.uint8 else -patch)
    built(changed)
    torch.testing.assert_close(seen[0], seen[1])


def test_given_fields_are_read_where_they_are():
    built = root(masked(given=["t"])).eval()
    base = built(batch(built))["loss"]
    other = built(batch(built, words=["a", None, "xyz", "ef", None]))["loss"]
    assert base != other
    alone = [built(batch(built, [i]))["loss"] for i in range(N)]
    torch.testing.assert_close(torch.stack(alone).mean(), base)  # whoever else has the field, and however long


def test_what_is_not_the_fields_own_is_predicted_from_the_given_alone():
    built = root(masked(given=["t"], own=False, target={"type": "content"})).eval()
    whole = built(batch(built))["loss"]
    some = torch.stack([built(batch(built, [i]))["loss"] for i in (0, 2, 3)])
    torch.testing.assert_close(whole, some.mean())  # the two that have no text count for nothing
    assert built(batch(built, [1]))["loss"] == 0
    loss = built.train()(batch(built))["loss"]
    loss.backward()
    encoder = built.model.tower("image").encoder
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad)  # all processes reduce the same
    assert all(p.grad.abs().sum() == 0 for p in encoder.parameters())
    assert any(p.grad.abs().sum() > 0 for p in built.model.tower("text").encoder.parameters())


class Told(View):
    factor = 1.0

    def batch(self, inputs, seeds):
        return inputs, {"angle": self.factor * seeds / 50, "box": self.factor * torch.stack([seeds / 9] * 4, 1)}


def test_the_predictor_is_told_the_parameters_of_the_view(monkeypatch):
    told = {"x": [Told(None)]}
    plain = root(masked(condition={"angle": 1, "box": 4}), views=told).eval()
    given = batch(plain)
    loss = plain(given)["loss"]
    monkeypatch.setattr(Told, "factor", 0.0)
    assert plain(given)["loss"] != loss
    with pytest.raises(ConfigError, match=r"condition.box: 3, but view 0 of 'x' has 4; it has \{angle: 1, box: 4\}"):
        root(masked(condition={"box": 3}), views=told)(given)


@pytest.mark.parametrize("fields", [
    {}, {"target": {"type": "teacher"}, "mask": {"type": "random", "masks": 2}}, {"given": ["t"]},
    {"given": ["t"], "own": False}, {"input": "mask-token", "predictor": {"type": "tokenwise"}},
])  # fmt: skip
def test_micro_batches_have_the_gradient_of_the_whole(fields):
    built = root(masked(**fields))
    twin = copy.deepcopy(built)
    whole = batch(built)
    forward_backward(built, Accelerator(cpu=True), whole)
    parts = [batch(twin, rows) for rows in ((0, 1), (2,), (3, 4))]
    cut = Batch(ids=whole.ids, present=whole.present, seeds=whole.seeds, parts=parts)
    forward_backward(twin, Accelerator(cpu=True), cut)
    for (name, a), (_, b) in zip(built.named_parameters(), twin.named_parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


class Darker(View):
    def batch(self, inputs, seeds):
        return {**inputs, "pixels": (inputs["pixels"].float() * 0.5).to(inputs["pixels"].dtype)}, {}


class Shorter(View):
    def batch(self, inputs, seeds):
        return {**inputs, "pixels": inputs["pixels"][:, :, :8]}, {}


def two(built):
    """Both views of a batch."""
    given = batch(built)
    given.inputs["x"] = given.inputs["x"] * 2
    return given


ALTERED = {"mask": None, "view": 1, "of": 0, "predictor": {"type": "tokenwise"}, "loss": "l1"}


def test_all_of_a_view_is_predicted_from_an_altered_one():
    built = root(masked(**ALTERED), views={"x": [None, Darker(None)]})
    given = two(built)
    (objective,) = built.objectives.values()
    encoder, pixels = built.model.tower("image").encoder, given.inputs["x"][0]
    read = encoder(Darker(None).batch(pixels, given.seeds)[0]).tokens.values
    twin = (objective.predictor.layers(read)[:, 1:] - encoder.content(pixels).values[:, 1:]).abs().mean()
    loss = built(given)["loss"]
    torch.testing.assert_close(loss, twin)
    (mine,) = torch.autograd.grad(loss, encoder.patches.weight)
    (his,) = torch.autograd.grad(twin, encoder.patches.weight)
    torch.testing.assert_close(mine, his)


def test_a_mask_and_an_altered_view_go_together():
    """The encoder sees the visible tokens of the altered view, the teacher all of the other."""
    fields = {"view": 1, "of": 0, "target": {"type": "teacher"}}
    built = root(masked(**fields), views={"x": [None, Darker(None)]}).eval()
    plain = root(masked(target={"type": "teacher"})).eval()
    assert built(two(built))["loss"] != plain(batch(plain))["loss"]
    name, *rest = [name for name in built.seen]
    assert (name, rest) == ("x/teacher", [])  # of view 0


def test_an_altered_view_keeps_its_tokens_in_place():
    built = root(masked(**ALTERED), views={"x": [None, Shorter(None)]})
    with pytest.raises(ConfigError, match="view 0 of 'x' has 17 tokens, and view 1 has 9"):
        built(two(built))


def test_a_tower_that_no_objective_reads_rests():
    built = root(masked())
    assert not any(p.requires_grad for p in built.model.tower("text").parameters())
    assert all(p.requires_grad for p in built.model.tower("image").encoder.parameters())
    assert all(p.requires_grad for p in root(masked(given=["t"])).model.tower("text").encoder.parameters())


def test_the_projector_rests_where_no_embedding_is_asked_for():
    built = root(masked())
    assert not any(p.requires_grad for p in built.model.tower("text").projector.parameters())
    both = root(masked(), component("objectives", "contrastive", pairs=[{"between": ["x", "t"]}]))
    assert all(p.requires_grad for p in both.model.tower("text").projector.parameters())


def test_the_teacher_follows_by_the_clock():
    built = root(masked(target={"type": "teacher"}), teacher=TeacherConfig(momentum=0.5))
    encoder = built.model.tower("image").encoder
    twin = built.teacher.of(encoder)
    before = twin.patches.weight.clone()
    with torch.no_grad():
        encoder.patches.weight.add_(1.0)
    built.clock = Clock(step=50, total=100)  # half a cosine from 0.5 to 1: 0.75
    built.after_optimizer_step()
    torch.testing.assert_close(twin.patches.weight, before + 0.25)


@pytest.mark.parametrize(("fields", "message"), [
    ({"field": "y"}, "unknown field 'y'"),
    ({"given": ["u"]}, "unknown field 'u'"),
    ({"given": ["x"]}, "given: 'x' is what is predicted"),
    ({"own": False}, "own: false predicts from `given` fields alone"),
    ({"loss": "chamfer"}, "loss: 'chamfer' does not fit this target"),
    ({"predictor": {"type": "tokenwise"}}, "use input: mask-token"),
    ({"mask": None}, "mask: null predicts what is seen: name in `of` another view"),
    ({"mask": None, "of": 0}, "mask: null predicts what is seen"),
    ({"mask": None, "of": 1, "input": "mask-token"}, "input: mask-token hides nothing"),
])  # fmt: skip
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        root(masked(**fields))


def test_a_frozen_tower_is_refused():
    with pytest.raises(ConfigError, match="tower 'image' is frozen"):
        root(masked(), frozen=True)


def test_what_the_teacher_makes_of_the_field_is_watched():
    built = root(masked(target={"type": "teacher"}))
    built(batch(built))
    (name, seen), *rest = built.seen.items()
    assert (name, rest) == ("x/teacher", [])
    tokens = built.teacher.of(built.model.tower("image").encoder)(batch(built).inputs["x"][0]).tokens.values
    torch.testing.assert_close(seen, tokens[:, 1:].mean(1))  # without the class token
