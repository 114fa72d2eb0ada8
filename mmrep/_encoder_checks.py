"""The checks of the encoder contract; `mmrep.testing.check_encoder` runs them."""

# ruff: noqa: PT017, PT018 (rules for pytest's own tests, which rewrite their asserts)
from __future__ import annotations

import copy
import fnmatch
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmrep._encoder_subject import Subject, reached, weighted_sum
from mmrep._token_checks import TOKEN_CHECKS
from mmrep.config import dump, parse
from mmrep.encoder import CAPABILITIES, BadSampleError
from mmrep.tokens import Inputs


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
    total = weighted_sum(out.tokens.values[out.tokens.grid.valid], generator)
    if out.pooled is not None:
        total = total + weighted_sum(out.pooled, generator)
    total.backward()
    trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    for pattern, reason in s.no_gradient.items():
        matched = fnmatch.filter(trainable, pattern)
        assert matched, f"no_gradient lists {pattern!r} ({reason}), which matches no parameter"
        assert all(not reached(trainable.pop(name)) for name in matched), f"{pattern!r} gets a gradient now: unlist it"
    unreached = [name for name, p in trainable.items() if not reached(p)]
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


ENCODER_CHECKS: dict[str, Callable[[Subject], None]] = {
    **{
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
        )
    },
    **TOKEN_CHECKS,
    **{check.__name__: check for check in (config_round_trip, weights_round_trip)},
}
