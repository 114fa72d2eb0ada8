"""The checks of the token contract: dropped and hidden tokens, layers, and what a token stands for."""

# ruff: noqa: PT018 (rules for pytest's own tests, which rewrite their asserts)
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from mmrep._encoder_subject import Subject, refuses, weighted_sum
from mmrep.layers import parameter_layers
from mmrep.tokens import Content, Encoding, Grid, Tokens, index_set


@torch.no_grad()
def keep(s: Subject) -> None:
    """Only kept tokens come out, special ones in any case; order and empty slots do not matter. Or a clear refusal."""
    tokens = s.tokens()
    g = tokens.grid
    picks = [
        torch.randperm(int(c), generator=torch.Generator().manual_seed(s.seed)) for c in (g.valid & ~g.special).sum(1)
    ]
    plain = [(row & ~special).nonzero()[:, 0] for row, special in zip(g.valid, g.special, strict=True)]
    count = max(1, min(len(p) for p in plain) // 2)
    index = torch.stack([p[pick[:count]] for p, pick in zip(plain, picks, strict=True)])
    if "drop_tokens" not in s.encoder.supports:
        refuses(lambda: s.encoder.encode(tokens, keep=index), "drop_tokens")
        return
    specials = int(g.special[0].sum())
    out = s.encoder.encode(tokens, keep=index)
    _expect_kept(s, out, specials, count)
    assert torch.equal(out.tokens.grid.coords[:, specials:], _at(g.coords, index)), (
        "coordinates do not travel with tokens"
    )
    turned = s.encoder.encode(tokens, keep=index.flip(1)).tokens.values
    s.close(turned[:, specials:].flip(1), out.tokens.values[:, specials:], "keep in reverse order")
    s.close(turned[:, :specials], out.tokens.values[:, :specials], "special tokens, keep in reverse order")
    padded = s.encoder.encode(tokens, keep=torch.cat([index, torch.full_like(index, -1)], 1)).tokens
    assert not bool(padded.grid.valid[:, specials + count :].any()), "an empty slot of keep is valid"
    s.close(padded.values[:, : specials + count], out.tokens.values, "keep with empty slots")
    if all(len(p) == len(plain[0]) for p in plain):
        everything = s.encoder.encode(tokens, keep=torch.stack(plain)).tokens
        whole = s.encoder.encode(tokens).tokens
        order = torch.cat([g.special.nonzero()[:, 1].view(s.n, specials), torch.stack(plain)], 1)
        s.close(everything.values, _at(whole.values, order), "keep of every token against no keep")
    alone = s.encoder.encode(tokens).tokens.values
    changed = (out.tokens.values[:, specials:] - _at(alone, index)).abs().max().item()
    assert changed > 0 or count == len(plain[0]), "dropping tokens changes nothing: were they computed after all?"


def _expect_kept(s: Subject, out: Encoding, specials: int, count: int) -> None:
    shape = tuple(out.tokens.values.shape)
    assert shape == (s.n, specials + count, s.encoder.width), f"kept {count} and {specials} special tokens, got {shape}"
    marks = out.tokens.grid.special
    assert bool(marks[:, :specials].all()) and not bool(marks[:, specials:].any()), "special tokens are not in front"


@torch.no_grad()
def layers(s: Subject) -> None:
    """Layers come in the order asked for, do not change the result, and others are refused."""
    tokens, depth = s.tokens(), s.encoder.depth
    if "layers" not in s.encoder.supports:
        refuses(lambda: s.encoder.encode(tokens, layers=[1]), "layers")
        return
    every = s.encoder.encode(tokens, layers=range(1, depth + 1))
    assert len(every.layers) == depth, f"asked for {depth} layers, got {len(every.layers)}"
    for number, layer in enumerate(every.layers, start=1):
        assert layer.ndim == 3 and len(layer) == s.n, (
            f"layer {number} has shape {tuple(layer.shape)}, expected [B, N, D]"
        )
    assert depth == 1 or not torch.equal(every.layers[0], every.layers[-1]), "the first and the last layer are the same"
    s.close(every.tokens.values, s.encoder.encode(tokens).tokens.values, "tokens when layers are asked for")
    swapped = s.encoder.encode(tokens, layers=[depth, 1]).layers
    s.close(swapped[0], every.layers[-1], f"layers=[{depth}, 1], the first")
    s.close(swapped[1], every.layers[0], f"layers=[{depth}, 1], the second")
    for wrong in (0, depth + 1):
        refuses(lambda number=wrong: s.encoder.encode(tokens, layers=[number]), str(depth))


def blocks(s: Subject) -> None:
    """Blocks are the layers: layer k depends on what comes before the layers and on the first k blocks alone."""
    e = s.encoder
    found, where = e.layer_modules(), parameter_layers(e)
    named = {name: p for name, p in e.named_parameters() if p.requires_grad}
    assert not found or set(named) <= set(where), f"without a layer: {sorted(set(named) - set(where))}"
    if "layers" not in e.supports:
        return
    assert len(found) == e.depth, f"{len(found)} blocks and {e.depth} layers"
    for number in {1, e.depth}:
        (layer,) = e.encode(e.tokenize(s.inputs()), layers=[number]).layers
        gradients = torch.autograd.grad(layer.float().sum(), list(named.values()), allow_unused=True)
        reached = {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
        # Of some libraries' models the last layer is what the final norm gives.
        late = sorted(name for name in reached if where[name] > number and not where[name] > e.depth == number)
        assert not late, f"layer {number} depends on what is said to come after it: {late}"
        for block in range(1, number + 1):
            own = {name for name in named if where[name] == block}
            assert not own or own & reached, f"layer {number} depends on nothing in block {block}"


@torch.no_grad()
def attention(s: Subject) -> None:
    """Of what a valid token attends to, padding has nothing and all has a weight of 1; or a clear refusal."""
    e, tokens = s.encoder, s.tokens()
    if "attention" not in e.supports:
        refuses(lambda: e.attended(tokens), "attention")
        return
    found = e.attended(tokens)
    weights, valid = found.extra["attention"], tokens.grid.valid
    B, N = valid.shape
    layers, heads = weights.shape[1:3]
    assert weights.shape == (B, layers, heads, N, N) and layers > 0 < heads, (
        f"attention is {tuple(weights.shape)}, expected [{B}, layers, heads, {N}, {N}]"
    )
    s.close(found.tokens.values, e.encode(tokens).tokens.values, "tokens when attention is asked for")
    rows = weights.movedim(3, 1)[valid]
    padding = (~valid)[:, None].expand(B, N, N)[valid][:, None, None].expand_as(rows)
    assert not bool(rows[padding].any()), "valid tokens attend to padding"
    s.close(rows.sum(-1), torch.ones_like(rows[..., 0]), "the sum of what a token attends to")


@torch.no_grad()
def content(s: Subject) -> None:
    """The content is aligned with the tokens, and a sample's own whatever its batch; or a clear refusal."""
    inputs = s.inputs()
    if "content" not in s.encoder.supports:
        refuses(lambda: s.encoder.content(inputs), "content")
        return
    grid, found = s.tokens().grid, s.encoder.content(inputs)
    plain = grid.valid & ~grid.special
    _expect_content(found, grid)
    values, seen = _observed(found, plain)
    assert bool(values[seen].isfinite().all()), "content is not finite"
    if found.vocabulary is None:  # a tokenizer may know no word of the examples
        assert bool((values[seen] != values[seen][:1]).any()), "content is the same everywhere"
    else:
        outside = (values[seen] < 0) | (values[seen] >= found.vocabulary)
        assert not bool(outside.any()), f"{int(outside.sum())} codes are outside of 0..{found.vocabulary - 1}"
    for i, item in enumerate(s.items()):
        one = s.encoder.collate([item])
        alone, where = s.encoder.content(one), s.encoder.tokenize(one).grid
        here, seen_here = _observed(alone, where.valid & ~where.special)
        there, seen_there = _observed(replace(found, values=found.values[i : i + 1], observed=_row(found, i)),
                                      plain[i : i + 1])  # fmt: skip
        what = f"content of example {i} in a batch of {s.n} against alone"
        assert here.shape == there.shape, f"{what}: shapes {tuple(there.shape)} and {tuple(here.shape)}"
        assert torch.equal(seen_here, seen_there), f"{what}: other figures are observed"
        s.close(there[seen_there].float(), here[seen_here].float(), what)
    empty = s.encoder.content({key: value[:0] for key, value in inputs.items()}).values
    assert len(empty) == 0 and empty.ndim == found.values.ndim, f"content of no samples: {tuple(empty.shape)}"


def _expect_content(found: Content, grid: Grid) -> None:
    values, (B, N) = found.values, grid.valid.shape
    if found.vocabulary is not None:
        assert values.dtype == torch.int64 and values.shape == (B, N), (
            f"codes are {values.dtype} {tuple(values.shape)}, expected int64 ({B}, {N}) as the tokens"
        )
    else:
        assert values.is_floating_point() and values.ndim == 3 and values.shape[:2] == (B, N), (
            f"content is {values.dtype} {tuple(values.shape)}, expected float ({B}, {N}, P) as the tokens"
        )
        points = found.points or 1
        assert values.shape[2] and values.shape[2] % points == 0, f"{values.shape[2]} figures, {points} a point"
    seen = found.observed
    assert seen is None or (seen.dtype == torch.bool and seen.shape == values.shape), "observed is not bool, as values"


def _observed(found: Content, plain: Tensor) -> tuple[Tensor, Tensor]:
    """The content at ``plain`` bool [B, N], and which figures of it were observed."""
    values = found.values[plain]
    return values, torch.ones_like(values, dtype=torch.bool) if found.observed is None else found.observed[plain]


def _row(found: Content, i: int) -> Tensor | None:
    return None if found.observed is None else found.observed[i : i + 1]


def mask_token(s: Subject) -> None:
    """A hidden token is its place alone: its content leaves no trace, others keep theirs, the mask token learns."""
    tokens = s.tokens()
    g = tokens.grid
    plain = g.valid & ~g.special
    token = torch.randn(s.encoder.width, generator=torch.Generator().manual_seed(s.seed))
    if "mask_token" not in s.encoder.supports:
        refuses(lambda: tokens.hide(index_set(plain), token), "mask_token")
        return
    assert tokens.positions is not None, "'mask_token' is in supports, and tokenize gives no positions"
    assert tokens.values.shape[2] == s.encoder.width, (
        f"tokens are {tokens.values.shape[2]} wide, but a mask token is as wide as the output, {s.encoder.width}"
    )
    assert bool(tokens.positions[g.valid].isfinite().all()), "positions are not finite"
    with torch.no_grad():
        before, nothing = s.encoder.encode(tokens), torch.full((s.n, 1), -1)
        _same_encoding(s, s.encoder.encode(tokens.hide(nothing, token)), before, "hiding no token")
        hidden = s.encoder.encode(tokens.hide(index_set(plain), token))
        changed = (hidden.tokens.values - before.tokens.values)[plain].abs().max().item()
        assert changed > s.tolerance, "hiding every token changes nothing"
        if g.edges is None:  # of a graph, nodes may have nothing of their own but their edges
            _expect_places(s, tokens, token)
        for name, other in _other_contents(s, tokens):  # none where all content is geometry: each point a centre
            blind = s.encoder.encode(other.hide(index_set(plain), token))
            _same_encoding(s, blind, hidden, f"hidden tokens, when {name} says something else")
    learned = token.clone().requires_grad_()
    out = s.encoder.encode(tokens.hide(index_set(plain), learned)).tokens
    weighted_sum(out.values[g.valid], torch.Generator().manual_seed(s.seed)).backward()
    gradient = learned.grad
    assert gradient is not None and bool((gradient != 0).any()), "no gradient reaches the mask token"
    assert bool(gradient.isfinite().all()), "the gradient of the mask token is not finite"


def _same_encoding(s: Subject, a: Encoding, b: Encoding, what: str) -> None:
    valid = b.tokens.grid.valid
    s.close(a.tokens.values[valid], b.tokens.values[valid], what)
    if a.pooled is not None and b.pooled is not None:
        s.close(a.pooled, b.pooled, f"{what}: pooled")


def _expect_places(s: Subject, tokens: Tokens, token: Tensor) -> None:
    """Assert that every other token, hidden, can be told apart in some sample (channels of one moment may not)."""
    plain = tokens.grid.valid & ~tokens.grid.special
    every_other = plain & (plain.cumsum(1) % 2 == 0)
    values = s.encoder.encode(tokens.hide(index_set(every_other), token)).tokens.values
    rows = [row[marks] for row, marks in zip(values, every_other, strict=True)]
    apart = [(row - row[:1]).abs().max().item() for row in rows if len(row) > 1]
    assert not apart or max(apart) > 1e-6, "hidden tokens are all the same: their places are lost"


def _other_contents(s: Subject, tokens: Tokens) -> Iterator[tuple[str, Tokens]]:
    """Tokens of the examples with something else in them, but the same geometry and the same special tokens.

    Which input holds the content is found by trying: all of it, or the figures of single places, are changed, or given
    to other tokens; a change counts if the values of tokens follow and nothing of their grid does.
    """
    inputs, g = s.inputs(), tokens.grid
    plain = g.valid & ~g.special
    for key, value in inputs.items():
        for changed in _changes(value, plain, s.seed):
            other = s.encoder.tokenize({**inputs, key: changed})
            moved = (other.values != tokens.values).any(-1) if other.values.shape == tokens.values.shape else g.special
            if _same_grid(other.grid, g) and bool(moved[plain].any()) and not bool(moved[g.special].any()):
                yield key, other
                break


def _changes(value: Tensor, plain: Tensor, seed: int) -> Iterator[Tensor]:
    if value.dtype == torch.bool:
        return
    if value.dtype == torch.uint8:
        yield 255 - value
    elif value.is_floating_point():
        yield -0.5 * value
        if value.ndim > 2:  # a place that the geometry does not hang on: a point that is no centre of others
            generator = torch.Generator().manual_seed(seed)
            for place in torch.randperm(value.shape[1], generator=generator)[:32].tolist():
                nudged = value.clone()
                nudged[:, place] += 1e-2
                yield nudged
    if value.ndim > 1 and (front := plain.shape[1] - value.shape[1]) >= 0 and not bool(plain[:, :front].any()):
        turned = value.clone()  # what belongs to a token goes to the next of its sample
        for row, marks in zip(turned, plain[:, front:], strict=True):
            row[marks] = row[marks].roll(1, 0)
        yield turned
        if not value.is_floating_point():
            lower = value.clone()  # of one token a sample, or of equal ones: another code
            lower[plain[:, front:]] -= (value[plain[:, front:]] > 0).to(value.dtype)
            yield lower


def _same_grid(a: Grid, b: Grid) -> bool:
    pairs = ((getattr(a, part.name), getattr(b, part.name)) for part in fields(b))
    return all(torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y
               for x, y in pairs)  # fmt: skip


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


TOKEN_CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check for check in (keep, layers, blocks, attention, content, mask_token)
}
