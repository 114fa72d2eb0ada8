"""The checks of the encoder contract; `mmrep.testing.check_encoder` runs them."""

# ruff: noqa: PT017, PT018 (rules for pytest's own tests, which rewrite their asserts)
from __future__ import annotations

import copy
import fnmatch
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.config import dump, parse
from mmrep.encoder import CAPABILITIES, BadSampleError, Encoder
from mmrep.tokens import Content, Encoding, Grid, Inputs, Tokens, index_set


class Subject:
    """An encoder under test, with a batch of its own examples.

    Args:
        encoder: an instance, or a class whose config has defaults for every field.
        n: number of examples, at least 2.
        seed: of examples, weights noise and permutations.
        tolerance: largest absolute difference between float32 values that should be equal, where a value's own size is
            about 1; larger values get proportionally more.
        no_gradient: patterns of parameter names that only an option uses which is off here, with the reason.
    """

    def __init__(
        self,
        encoder: Encoder | type[Encoder],
        *,
        n: int = 4,
        seed: int = 0,
        tolerance: float = 1e-4,
        no_gradient: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(encoder, type):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                encoder = encoder(encoder.Config())
        self.encoder = copy.deepcopy(encoder).float().cpu().eval()
        self.name = type(encoder).__name__
        self.n, self.seed, self.tolerance = n, seed, tolerance
        self.no_gradient = dict(no_gradient or {})

    def items(self) -> list[Inputs]:
        """The prepared examples."""
        return [self.encoder.prepare(raw) for raw in self.encoder.examples(self.n, self.seed)]

    def inputs(self) -> Inputs:
        """The collated examples."""
        return self.encoder.collate(self.items())

    @torch.no_grad()
    def tokens(self) -> Tokens:
        """The tokens of the examples, before encoding."""
        return self.encoder.tokenize(self.inputs())

    def close(self, a: Tensor, b: Tensor, what: str) -> None:
        """Assert that two float tensors are equal within the tolerance."""
        assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
        if not a.numel():
            return
        gap = ((a - b).abs() / b.abs().clamp_min(1)).max().item()
        assert gap <= self.tolerance, f"{what}: differ by {gap:.2e}, allowed {self.tolerance:.0e}"


def attributes(s: Subject) -> None:
    """Modality, width, supports and depth say something possible; names in no_weight_decay exist."""
    e = s.encoder
    assert isinstance(e.modality, str) and e.modality, f"modality is {e.modality!r}, not a name"
    assert isinstance(e.width, int) and e.width > 0, f"width is {e.width!r}, not a positive int"
    assert e.supports <= CAPABILITIES, (
        f"supports unknown {sorted(e.supports - CAPABILITIES)}; known: {sorted(CAPABILITIES)}"
    )
    assert (e.depth > 0) == ("layers" in e.supports), (
        f"depth is {e.depth} and 'layers' in supports is {'layers' in e.supports}"
    )
    unknown = e.no_weight_decay() - {name for name, _ in e.named_parameters()}
    assert not unknown, f"no_weight_decay names no parameter of the encoder: {sorted(unknown)}"


def examples(s: Subject) -> None:
    """The same seed gives the same examples; another seed gives others; any number can be had."""
    first, again = s.items(), s.items()
    assert len(first) == s.n, f"examples({s.n}, …) gave {len(first)}"
    assert all(_same(a, b) for a, b in zip(first, again, strict=True)), "examples and prepare are not deterministic"
    others = [s.encoder.prepare(raw) for raw in s.encoder.examples(s.n, s.seed + 1)]
    assert any(not _same(a, b) for a, b in zip(first, others, strict=True)), "another seed gives the same examples"


def prepare_collate(s: Subject) -> None:
    """Items are dicts of tensors; a batch has the batch first, whatever the number of items; lengths are positive."""
    items = s.items()
    for item in items:
        wrong = [key for key, value in item.items() if not isinstance(value, Tensor)]
        assert item and not wrong, f"prepare gave {list(item)}; not tensors: {wrong}"
        assert s.encoder.length(item) >= 1, f"length of an item is {s.encoder.length(item)}"
    for count in (1, s.n):
        batch = s.encoder.collate(items[:count])
        wrong = {key: tuple(value.shape) for key, value in batch.items() if value.shape[:1] != (count,)}
        assert not wrong, f"collate of {count} items: batch not first in {wrong}"


def bad_sample(s: Subject) -> None:
    """A value of a foreign type is a bad sample, not a crash of the run."""
    try:
        s.encoder.prepare(object())
    except BadSampleError as error:
        assert error.cause, "BadSampleError without a cause"
    except Exception as error:
        raise AssertionError(f"prepare(object()) raised {type(error).__name__}, not BadSampleError: {error}") from error
    else:
        raise AssertionError("prepare(object()) raised nothing")


@torch.no_grad()
def odd_input(s: Subject) -> None:
    """An odd raw value is a bad sample, or is read: to finite tokens, and without a trace in the rest of its batch."""
    usual = s.items()
    before = s.encoder(s.encoder.collate(usual))
    for name, raw in s.encoder.oddities(s.seed).items():
        try:
            item = s.encoder.prepare(raw)
        except BadSampleError as error:
            assert error.cause, f"{name}: BadSampleError without a cause"
            continue
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}, not BadSampleError: {error}") from error
        out = s.encoder(s.encoder.collate([*usual, item]))
        grid = out.tokens.grid
        assert bool(grid.valid[-1].any()), f"{name}: read, but to no valid token; refuse it in prepare"
        values = [out.tokens.values[-1][grid.valid[-1]], *([] if out.pooled is None else [out.pooled[-1]])]
        assert all(bool(v.isfinite().all()) for v in values), f"{name}: tokens are not finite"
        for i in range(s.n):
            there, here = out.tokens.values[i][grid.valid[i]], before.tokens.values[i][before.tokens.grid.valid[i]]
            s.close(there, here, f"{name}: example {i} in its company")


@torch.no_grad()
def forward(s: Subject) -> None:
    """Tokens are finite float32 [B, N, width]; pooled is [B, pooled_width] (or width); forward is encode(tokenize)."""
    out = s.encoder(s.inputs())
    values, valid = out.tokens.values, out.tokens.grid.valid
    assert values.ndim == 3 and len(values) == s.n and values.shape[2] == s.encoder.width, (
        f"tokens have shape {tuple(values.shape)}, expected ({s.n}, N, {s.encoder.width})"
    )
    assert values.dtype == torch.float32, f"tokens are {values.dtype} for float32 weights"
    assert bool(valid.any(1).all()), "a sample has no valid token"
    assert bool(values[valid].isfinite().all()), "tokens are not finite"
    if out.pooled is not None:
        assert out.pooled.ndim == 2 and len(out.pooled) == s.n, f"pooled has shape {tuple(out.pooled.shape)}"
        width = s.encoder.pooled_width or s.encoder.width
        assert out.pooled.shape[1] == width, f"pooled is {out.pooled.shape[1]} wide, announced as {width}"
        assert bool(out.pooled.isfinite().all()), "pooled is not finite"
    s.close(s.encoder.encode(s.tokens()).tokens.values[valid], values[valid], "encode(tokenize(x)) against forward(x)")


def grid(s: Subject) -> None:
    """The grid's shape counts its non-special tokens; coordinates are finite; special and valid fit together."""
    g = s.tokens().grid
    assert bool(g.coords.isfinite().all()), "coordinates are not finite"
    assert not bool((g.special & ~g.valid).any()), "a special token is padding"
    if g.shape is not None:
        places, counts = torch.Size(g.shape).numel(), (g.valid & ~g.special).sum(1)
        assert bool((counts == places).all()), (
            f"shape {g.shape} is {places} places; non-special tokens: {counts.tolist()}"
        )


@torch.no_grad()
def batch_invariance(s: Subject) -> None:
    """A sample alone gives what it gives in a batch, padding and all."""
    items = s.items()
    together = s.encoder(s.encoder.collate(items))
    for i, item in enumerate(items):
        alone, valid = s.encoder(s.encoder.collate([item])), together.tokens.grid.valid[i]
        there, here = together.tokens.values[i][valid], alone.tokens.values[0][alone.tokens.grid.valid[0]]
        s.close(there, here, f"tokens of example {i} in a batch of {s.n} against alone")
        if together.pooled is not None and alone.pooled is not None:
            s.close(together.pooled[i], alone.pooled[0], f"pooled of example {i} in a batch of {s.n} against alone")


@torch.no_grad()
def empty_batch(s: Subject) -> None:
    """A batch of zero samples gives zero embeddings, so that a rank without the modality need not be special."""
    out = s.encoder({key: value[:0] for key, value in s.inputs().items()})
    assert out.tokens.values.shape[::2] == (0, s.encoder.width), (
        f"tokens of no samples: {tuple(out.tokens.values.shape)}"
    )


@torch.no_grad()
def eval_determinism(s: Subject) -> None:
    """In eval mode nothing is random and nothing changes."""
    inputs = s.inputs()
    before = {key: value.clone() for key, value in s.encoder.state_dict().items()}
    torch.manual_seed(s.seed)
    first = s.encoder(inputs)
    torch.manual_seed(s.seed + 1)
    again = s.encoder(inputs)
    assert torch.equal(first.tokens.values, again.tokens.values), "two runs in eval mode differ"
    changed = [key for key, value in s.encoder.state_dict().items() if not torch.equal(value, before[key])]
    assert not changed, f"a forward pass in eval mode changed {changed}"


def gradients(s: Subject) -> None:
    """Every trainable parameter has a gradient path to tokens or pooled, in train mode."""
    encoder = copy.deepcopy(s.encoder).train()
    generator = torch.Generator().manual_seed(s.seed)
    with torch.no_grad():  # some start at zero on purpose (a residual branch), which would hide the path behind them
        for parameter in encoder.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    out = encoder(s.inputs())
    total = _weighted_sum(out.tokens.values[out.tokens.grid.valid], generator)
    if out.pooled is not None:
        total = total + _weighted_sum(out.pooled, generator)
    total.backward()
    trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    for pattern, reason in s.no_gradient.items():
        matched = fnmatch.filter(trainable, pattern)
        assert matched, f"no_gradient lists {pattern!r} ({reason}), which matches no parameter"
        assert all(not _reached(trainable.pop(name)) for name in matched), f"{pattern!r} gets a gradient now: unlist it"
    unreached = [name for name, p in trainable.items() if not _reached(p)]
    assert not unreached, f"no gradient reaches {len(unreached)} of {len(trainable)} parameters: {unreached[:8]}"
    assert all(bool(p.grad.isfinite().all()) for p in trainable.values() if p.grad is not None), (
        "a gradient is not finite"
    )


@torch.no_grad()
def autocast(s: Subject) -> None:
    """Under bf16 autocast the result is finite and points the same way."""
    inputs = s.inputs()
    exact = s.encoder(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = s.encoder(inputs)
    valid = exact.tokens.grid.valid
    a, b = rough.tokens.values.float()[valid], exact.tokens.values[valid]
    assert bool(a.isfinite().all()), "tokens are not finite under bf16 autocast"
    cosine = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
    assert cosine > 0.98, f"cosine between bf16 and float32 tokens is {cosine:.3f}"


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
        _refuses(lambda: s.encoder.encode(tokens, keep=index), "drop_tokens")
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
        _refuses(lambda: s.encoder.encode(tokens, layers=[1]), "layers")
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
        _refuses(lambda number=wrong: s.encoder.encode(tokens, layers=[number]), str(depth))


@torch.no_grad()
def content(s: Subject) -> None:
    """The content is aligned with the tokens, and a sample's own whatever its batch; or a clear refusal."""
    inputs = s.inputs()
    if "content" not in s.encoder.supports:
        _refuses(lambda: s.encoder.content(inputs), "content")
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
        _refuses(lambda: tokens.hide(index_set(plain), token), "mask_token")
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
    _weighted_sum(out.values[g.valid], torch.Generator().manual_seed(s.seed)).backward()
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


def config_round_trip(s: Subject) -> None:
    """The config survives being written as plain data."""
    config = s.encoder.config
    again = parse(type(config), dump(config))
    assert again == config, f"config read back as {again}, was {config}"


@torch.no_grad()
def weights_round_trip(s: Subject) -> None:
    """Config, files and weights rebuild the encoder; the files are complete (no hub, no original path)."""
    inputs = s.inputs()
    with tempfile.TemporaryDirectory() as place:
        s.encoder.save_files(Path(place))
        files = Path(place) if any(Path(place).iterdir()) else None
        again = type(s.encoder)(s.encoder.config, files=files).eval()
        again.load_state_dict(s.encoder.state_dict())
        remade = again.collate([again.prepare(raw) for raw in again.examples(s.n, s.seed)])
    assert _same(remade, inputs), "the rebuilt encoder prepares the examples differently"
    first, second = s.encoder(inputs), again(inputs)
    assert torch.equal(first.tokens.values, second.tokens.values), "the rebuilt encoder gives other tokens"


def _same(a: Inputs, b: Inputs) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _weighted_sum(values: Tensor, generator: torch.Generator) -> Tensor:
    # A plain sum of normalised values is constant, so its gradient would vanish for a reason that is not the encoder's.
    return (values * torch.randn(values.shape, generator=generator)).sum()


def _reached(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool((parameter.grad != 0).any())


def _refuses(call: Callable[[], Any], names: str) -> None:
    try:
        call()
    except ValueError as error:
        assert names in str(error), f"the refusal does not name {names!r}: {error}"
    else:
        raise AssertionError(f"a request beyond {names!r} is not refused")


ENCODER_CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        attributes,
        examples,
        prepare_collate,
        bad_sample,
        odd_input,
        forward,
        grid,
        batch_invariance,
        empty_batch,
        eval_determinism,
        gradients,
        autocast,
        keep,
        layers,
        content,
        mask_token,
        config_round_trip,
        weights_round_trip,
    )
}
