"""Predictors: a prediction depends on the context and the place, and on nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mmrep.config import component
from mmrep.predictors.predictor import sincos, take
from mmrep.predictors.tokenwise import places_in
from mmrep.tokens import Grid, Tokens, keep_special

D, OUT = 8, 5
VISIBLE = torch.tensor([[1, 3, 4, 8, 9], [2, 5, 6, -1, -1]])
TARGET = torch.tensor([[2, 5, 6, 7], [1, 4, -1, -1]])
NAMES = ["transformer", "cross-attention", "conv", "tokenwise"]


def scene(seed=0):
    """A 3 x 3 grid behind a class token, the encoder's output at some of it, and where that stands."""
    generator = torch.Generator().manual_seed(seed)
    grid = Grid.regular(2, (3, 3), special=1)
    positions = torch.randn(2, 10, D, generator=generator)
    tokens = Tokens(torch.randn(2, 10, D, generator=generator) + positions, grid, positions)
    index = keep_special(VISIBLE, grid)
    context = tokens.keep(VISIBLE)
    return replace(context, values=torch.randn(2, index.shape[1], D, generator=generator)), index, tokens


def build(name, condition=0, **fields):
    torch.manual_seed(1)
    built = component("predictors", name, **fields).build(width=D, out=OUT, axes=2, condition=condition)
    return built.eval().double()


def double(tokens):
    positions = None if tokens.positions is None else tokens.positions.double()
    return replace(tokens, values=tokens.values.double(), positions=positions)


def predict(predictor, context, index, tokens, target, condition=None):
    return predictor(double(context), index, double(tokens), target, condition)


CASES = [("transformer", {"positions": kind}) for kind in ("sincos", "mlp", "encoder")]
CASES += [("cross-attention", {"positions": kind}) for kind in ("sincos", "mlp", "encoder")]
CASES += [("cross-attention", {"attend": "all"}), ("conv", {})]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_a_prediction_depends_neither_on_empty_slots_nor_on_what_is_hidden(name, fields):
    predictor = build(name, **fields)
    context, index, tokens = scene()
    out = predict(predictor, context, index, tokens, TARGET)
    assert out.shape == (2, 4, OUT)
    # Other values in the empty slots of the context, and at the hidden tokens; only positions may be read.
    other = replace(context, values=context.values.masked_fill(~context.grid.valid[..., None], 50.0))
    assert bool((~context.grid.valid).any())
    hidden = replace(tokens, values=torch.full_like(tokens.values, 9.0))
    again = predict(predictor, other, index, hidden, TARGET)
    torch.testing.assert_close(again[TARGET >= 0], out[TARGET >= 0], atol=1e-12, rtol=0)
    # The second sample alone, without empty slots.
    row = slice(1, 2)
    cut = context.grid.select(torch.arange(4).expand(2, 4))
    trimmed = Tokens(context.values[row, :4], Grid(cut.coords[row], cut.valid[row], cut.special[row]))
    g = tokens.grid
    one = Tokens(tokens.values[row], Grid(g.coords[row], g.valid[row], g.special[row], g.shape), tokens.positions[row])
    alone = predict(predictor, trimmed, index[row, :4], one, TARGET[row, :2])
    torch.testing.assert_close(alone, out[row, :2], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_a_prediction_depends_on_the_place_and_on_the_context(name, fields):
    predictor = build(name, **fields)
    context, index, tokens = scene()
    out = predict(predictor, context, index, tokens, TARGET)
    assert (out[0, 0] - out[0, 1]).abs().max() > 1e-6
    moved = replace(context, values=context.values.roll(1, 1))
    assert (predict(predictor, moved, index, tokens, TARGET)[0] - out[0]).abs().amax(-1).min() > 1e-8


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_every_parameter_has_a_gradient_and_no_target_is_no_prediction(name, fields):
    predictor = build(name, **fields)
    context, index, tokens = scene()
    predict(predictor, context, index, tokens, TARGET).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in predictor.parameters())
    assert all(p.grad.abs().sum() > 0 for n, p in predictor.named_parameters() if not n.endswith("qkv.bias"))
    assert predict(predictor, context, index, tokens, TARGET[:, :0]).shape == (2, 0, OUT)


def test_the_transformer_equals_its_formula():
    predictor = build("transformer", width=16, depth=2, heads=2)
    context, index, tokens = scene()
    out = predict(predictor, context, index, tokens, TARGET)
    for b in range(2):
        rows = []
        for slot, at in enumerate(index[b].tolist()):
            if at >= 0:
                row = predictor.embed(context.values[b, slot].double())
                rows.append(row + (0 if at == 0 else sincos(tokens.grid.coords[b, at], 16).double()))
        wanted = [at for at in TARGET[b].tolist() if at >= 0]
        rows += [predictor.token + sincos(tokens.grid.coords[b, at], 16).double() for at in wanted]
        x = torch.stack(rows)[None]
        for block in predictor.transformer.blocks:
            x = block(x)
        twin = predictor.head(predictor.norm(x[0, -len(wanted) :]))
        torch.testing.assert_close(out[b, : len(wanted)], twin)


@pytest.mark.parametrize("name", ["transformer", "cross-attention"])
def test_the_condition_is_told(name):
    predictor = build(name, condition=3)
    context, index, tokens = scene()
    condition = torch.randn(2, 2, 3, dtype=torch.float64)
    out = predict(predictor, context, index, tokens, TARGET, condition)
    other = predict(predictor, context, index, tokens, TARGET, condition + 1)
    assert (out - other).abs().amax(-1)[TARGET >= 0].min() > 1e-6


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_sincos_equals_a_loop(axes):
    coords = torch.randn(4, 3, axes, generator=torch.Generator().manual_seed(0)) * 5
    width = 14
    out = sincos(coords, width)
    n = width // (2 * axes)
    twin = torch.zeros(4, 3, width)
    for b in range(4):
        for t in range(3):
            row = []
            for a in range(axes):
                angles = [float(coords[b, t, a]) / 10000 ** (i / n) for i in range(n)]
                row += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            twin[b, t, : len(row)] = torch.tensor(row)
    torch.testing.assert_close(out, twin, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="at least"):
        sincos(coords, 2 * axes - 1)


def test_tokenwise_maps_the_encoder_output_at_each_target():
    predictor = build("tokenwise", depth=2, hidden=6, norm=True)
    context, index, tokens = scene()
    at = torch.tensor([[9, 1, -1], [6, 2, 0]])
    out = predict(predictor, context, index, tokens, at)
    for b in range(2):
        for k, wanted in enumerate(at[b].tolist()):
            if wanted >= 0:
                slot = index[b].tolist().index(wanted)
                twin = predictor.layers(context.values[b, slot].double())
                torch.testing.assert_close(out[b, k], twin)
    with pytest.raises(ValueError, match="takes no condition"):
        build("tokenwise", condition=1)


def test_places_in_finds_each_target_among_the_context():
    index = torch.tensor([[0, 5, 2, -1], [3, -1, 0, 4]])
    target = torch.tensor([[2, 0, -1], [4, 3, 0]])
    assert places_in(index, target, 6).tolist() == [[2, 0, -1], [3, 0, 2]]
    values = torch.arange(8.0).view(2, 4, 1)
    assert take(values, places_in(index, target, 6))[1, :, 0].tolist() == [7.0, 4.0, 6.0]


def test_the_convolutions_equal_a_loop_over_cells():
    predictor = build("conv", depth=1)
    context, index, tokens = scene()
    out = predict(predictor, context, index, tokens, TARGET)
    layer = predictor.layers[0]
    for b in range(2):
        cells = {(r, c): predictor.token for r in range(3) for c in range(3)}
        for slot, at in enumerate(index[b].tolist()):
            if at > 0:
                cells[divmod(at - 1, 3)] = predictor.embed(context.values[b, slot].double())
        for k, at in enumerate(TARGET[b].tolist()):
            if at < 0:
                continue
            r, c = divmod(at - 1, 3)
            mixed = torch.zeros(D, dtype=torch.float64)
            for (i, j), value in cells.items():
                if abs(i - r) <= 1 and abs(j - c) <= 1:
                    mixed = mixed + layer.depthwise.weight[:, 0, i - r + 1, j - c + 1] * value
            twin = cells[r, c] + torch.nn.functional.gelu(layer.norm(layer.pointwise(mixed)))
            torch.testing.assert_close(out[b, k], predictor.head(twin))


def test_convolutions_over_a_sequence_do_not_see_its_padding():
    torch.manual_seed(0)
    predictor = component("predictors", "conv", depth=2).build(width=D, out=OUT, axes=1).double()
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    values = torch.randn(2, 7, D, dtype=torch.float64)
    tokens = Tokens(values, Grid.sequence(valid))
    visible, target = torch.tensor([[0, 2, 4, 5], [0, 2, -1, -1]]), torch.tensor([[1, 3, 6], [1, 3, -1]])
    out = predictor(tokens.keep(visible), visible, tokens, target)
    short = Tokens(values[1:, :4], Grid.sequence(valid[1:, :4]))
    alone = predictor(short.keep(visible[1:, :2]), visible[1:, :2], short, target[1:, :2])
    torch.testing.assert_close(out[1, :2], alone[0])
    # Where the encoder saw mask tokens, what it made of them is not read.
    everywhere = torch.arange(7).expand(2, 7)
    again = predictor(tokens, everywhere, tokens, target)
    other = torch.where(torch.tensor([[False, True, False, True, False, False, True]])[..., None], 7.0, values)
    torch.testing.assert_close(predictor(Tokens(other, tokens.grid), everywhere, tokens, target)[0], again[0])


def test_convolutions_refuse_what_is_no_grid():
    predictor = build("conv")
    context, index, tokens = scene()
    ragged = replace(tokens, grid=replace(tokens.grid, shape=None))
    with pytest.raises(ValueError, match="needs a full grid"):
        predict(predictor, context, index, ragged, TARGET)
    with pytest.raises(ValueError, match="takes no condition"):
        build("conv", condition=2)


@pytest.mark.parametrize("attend", ["context", "all"])
def test_cross_attention_equals_its_formula(attend):
    predictor = build("cross-attention", width=16, depth=2, heads=2, attend=attend)
    context, index, tokens = scene()
    out = predict(predictor, context, index, tokens, TARGET)
    for b in range(2):
        known = []
        for slot, at in enumerate(index[b].tolist()):
            if at >= 0:
                row = predictor.embed(context.values[b, slot].double())
                known.append(row + (0 if at == 0 else sincos(tokens.grid.coords[b, at], 16).double()))
        known = predictor.known(torch.stack(known))
        wanted = [at for at in TARGET[b].tolist() if at >= 0]
        asked = torch.stack([predictor.token + sincos(tokens.grid.coords[b, at], 16).double() for at in wanted])
        for layer in predictor.layers:
            normed = layer.norm1(asked)
            source = torch.cat([known, normed]) if attend == "all" else known
            q, k, v = layer.query(normed), layer.key(source), layer.value(source)
            mixed = [((q[:, h] @ k[:, h].T) / 8**0.5).softmax(-1) @ v[:, h] for h in (slice(0, 8), slice(8, 16))]
            asked = asked + layer.out(torch.cat(mixed, -1))
            asked = asked + layer.mlp(layer.norm2(asked))
        torch.testing.assert_close(out[b, : len(wanted)], predictor.head(predictor.norm(asked)))


def test_cross_attention_to_the_context_alone_predicts_each_token_by_itself():
    predictor = build("cross-attention")
    context, index, tokens = scene()
    out = predict(predictor, context, index, tokens, TARGET)
    torch.testing.assert_close(predict(predictor, context, index, tokens, TARGET[:, 1:2])[0], out[0, 1:2])


def test_convolutions_over_three_axes_keep_the_order_of_the_grid():
    torch.manual_seed(0)
    predictor = component("predictors", "conv", depth=1, width=4).build(width=D, out=OUT, axes=3).double()
    shape = (2, 3, 4)
    tokens = Tokens(torch.randn(1, 24, D, dtype=torch.float64), Grid.regular(1, shape))
    visible, target = torch.arange(0, 24, 2)[None], torch.arange(1, 24, 2)[None]
    out = predictor(tokens.keep(visible), visible, tokens, target)
    dense = predictor.token.expand(24, -1).clone()
    dense[visible[0]] = predictor.embed(tokens.values[0, visible[0]])
    layer = predictor.layers[0]
    mixed = layer.depthwise(dense.T.reshape(1, 4, *shape)).reshape(4, 24).T
    twin = predictor.head(dense + torch.nn.functional.gelu(layer.norm(layer.pointwise(mixed))))
    torch.testing.assert_close(out[0], twin[target[0]])


@pytest.mark.parametrize("name", ["transformer", "cross-attention"])
def test_positions_that_the_encoder_does_not_give_are_refused(name):
    context, index, tokens = scene()
    with pytest.raises(ValueError, match="does not give its positions"):
        predict(build(name, positions="encoder"), context, index, replace(tokens, positions=None), TARGET)
    with pytest.raises(ValueError, match="heads=3 does not divide width=16"):
        build(name, width=16, heads=3)
