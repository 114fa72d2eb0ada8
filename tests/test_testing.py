"""Each contract check fails on a component that breaks just that: how we know that the checks can fail."""

from __future__ import annotations

import math
from typing import Annotated

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import component, config
from mmrep.encoder import BadSampleError, Encoder
from mmrep.testing import ENCODER_CHECKS, LOSS_CHECKS, check_encoder, check_loss
from mmrep.tokens import Content, Encoding, Grid, Inputs, Tokens


class Numbers(Encoder):
    """A toy encoder of lists of numbers, right in every way: padding, a special token, dropping, hiding, two layers."""

    @config
    class Config:
        width: Annotated[int, Field(ge=1)] = 8
        offset: float = 0.0

    modality = "numbers"
    supports = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content"})
    depth = 2
    pooled_width = 3

    def __init__(self, config, files=None):
        super().__init__(config, files)
        self.width = config.width
        self.embed = nn.Linear(1, config.width)
        self.special = nn.Parameter(torch.randn(1, 1, config.width))
        self.place = nn.Parameter(torch.randn(1, 16, config.width))
        self.blocks = nn.ModuleList(nn.Linear(2 * config.width, config.width) for _ in range(2))
        self.out = nn.Linear(config.width, 3)

    def examples(self, n, seed):
        return [[math.sin(seed + i + j) for j in range(3 + 2 * i)] for i in range(n)]

    def oddities(self, seed):
        return {"one number": [0.5], "words": "abc", "large": [1e6, -1e6]}

    def prepare(self, raw, *, view=None, seed=0):
        if not isinstance(raw, list):
            raise BadSampleError("not a list")
        return {"x": torch.tensor(raw), "n": torch.tensor(len(raw))}

    def collate(self, items):
        most = max(len(item["x"]) for item in items)
        return {
            "x": torch.stack([nn.functional.pad(item["x"], (0, most - len(item["x"]))) for item in items]),
            "n": torch.stack([item["n"] for item in items]),
        }

    def length(self, item):
        return len(item["x"])

    def tokenize(self, inputs):
        x, n = inputs["x"], inputs["n"]
        positions = self.place[:, : x.shape[1]].expand(len(x), -1, -1)
        parts = self.embed(x[..., None] + self.config.offset) + positions, positions
        values, positions = (torch.cat([self.special.expand(len(x), -1, -1), part], 1) for part in parts)
        places = torch.arange(values.shape[1])
        valid = places <= n[:, None]
        return Tokens(values, Grid.sequence(valid, (places == 0).expand(len(x), -1)), positions)

    def content(self, inputs):
        return Content(nn.functional.pad(inputs["x"][..., None], (0, 0, 1, 0)))

    def encode(self, tokens, keep=None, layers=()):
        self.check_request(keep, layers)
        tokens = tokens.keep(keep)
        values, valid = tokens.values, tokens.grid.valid[..., None]
        asked = {}
        for number, block in enumerate(self.blocks, 1):
            mean = (values * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
            values = values + torch.tanh(block(torch.cat([values, mean.expand_as(values)], -1)))
            if number in layers:
                asked[number] = values
        return Encoding(Tokens(values, tokens.grid), self.out(values[:, 0]), tuple(asked[n] for n in layers))


def test_the_right_encoder_passes():
    check_encoder(Numbers)
    check_encoder(Numbers(Numbers.Config(width=4)))


def test_an_encoder_of_codes_passes():
    check_encoder(of(content=coded), only=["content"])


def tokenized(change):
    class Broken(Numbers):
        def tokenize(self, inputs):
            return change(self, super().tokenize(inputs))

    return Broken


def encoded(change):
    class Broken(Numbers):
        def encode(self, tokens, keep=None, layers=()):
            return change(self, super().encode(tokens, keep, layers), keep)

    return Broken


def of(**members):
    return type("Broken", (Numbers,), members)


def regrid(grid: Grid, **changes) -> Grid:
    return Grid(**{"coords": grid.coords, "valid": grid.valid, "special": grid.special, "shape": grid.shape, **changes})


class Counts(Numbers):
    """Each forward pass changes a buffer, and the result."""

    def __init__(self, config, files=None):
        super().__init__(config, files)
        self.register_buffer("seen", torch.zeros(()))

    def tokenize(self, inputs):
        self.seen += 1
        return super().tokenize(inputs)


class Disturbed(Numbers):
    """One large value moves the tokens of the whole batch."""

    def oddities(self, seed):
        return {"large": [1e3]}

    def tokenize(self, inputs):
        tokens = super().tokenize(inputs)
        return Tokens(tokens.values + inputs["x"].amax(), tokens.grid)


class Unused(Numbers):
    def __init__(self, config, files=None):
        super().__init__(config, files)
        self.idle = nn.Linear(2, 2)


class NeedsMore(Numbers):
    """Learned something (`offset`) that it does not write down."""

    def __init__(self, config, files=None):
        super().__init__(config, files)
        self.secret = torch.randn(())

    def tokenize(self, inputs):
        tokens = super().tokenize(inputs)
        return Tokens(tokens.values + self.secret, tokens.grid)


class Remembered(Numbers):
    """What was tokenized last comes back in `encode`, hidden or not."""

    def tokenize(self, inputs):
        self.last = inputs["x"].sum(1)[:, None, None]
        return super().tokenize(inputs)

    def encode(self, tokens, keep=None, layers=()):
        out = super().encode(tokens, keep, layers)
        return out.with_values(out.tokens.values + self.last)


class Shifting(Tokens):
    """Hiding moves what is not hidden, too."""

    def hide(self, index, token):
        hidden = super().hide(index, token)
        return Tokens(hidden.values + 0.1, hidden.grid, hidden.positions)


class Open(Tokens):
    """Hiding hides nothing."""

    def hide(self, index, token):
        return self


def placed(change):
    return tokenized(lambda self, t: Tokens(t.values, t.grid, change(t)))


def filled(change):
    return of(content=lambda self, inputs: change(Numbers.content(self, inputs)))


def coded(self, inputs: Inputs) -> Content:
    codes = nn.functional.pad(inputs["x"] > 0, (1, 0)).long()
    return Content(codes, vocabulary=2)


def attended_padding(self, inputs: Inputs) -> Tokens:
    tokens = Numbers.tokenize(self, inputs)
    return Tokens(tokens.values, regrid(tokens.grid, valid=torch.ones_like(tokens.grid.valid)))


def no_layers(self, tokens, keep=None, layers=()):
    return Numbers.encode(self, tokens, keep)


def keep_ignored(self, tokens, keep=None, layers=()):
    full = Numbers.encode(self, tokens, None, layers)
    return Encoding(full.tokens.keep(keep), full.pooled, full.layers)


def keep_renumbered(self, tokens, keep=None, layers=()):
    out = Numbers.encode(self, tokens, keep, layers)
    return Encoding(
        Tokens(out.tokens.values, Grid.sequence(out.tokens.grid.valid, out.tokens.grid.special)), out.pooled
    )


def empty_slots_seen(self, tokens, keep=None, layers=()):
    kept = tokens.keep(keep)
    return Numbers.encode(
        self, Tokens(kept.values, regrid(kept.grid, valid=torch.ones_like(kept.grid.valid))), None, layers
    )


def layers_sorted(self, tokens, keep=None, layers=()):
    return Numbers.encode(self, tokens, keep, sorted(layers))


def unchecked(self, tokens, keep=None, layers=()):
    return Numbers.encode(
        self, tokens, None if "drop_tokens" not in self.supports else keep, [n for n in layers if 0 < n < 3]
    )


def crash(self, raw, **_):
    return {"x": torch.tensor(raw), "n": torch.tensor(len(raw))}


def random_examples(self, n, seed):
    return [torch.rand(3 + i).tolist() for i in range(n)]


def one_seed(self, n, seed):
    return Numbers.examples(self, n, 0)


def last_first(self, items):
    return {key: value.T if value.ndim == 2 else value for key, value in Numbers.collate(self, items).items()}


def rounded(values: Tensor) -> Tensor:
    return values.bfloat16().float().sin() * 1e3 if torch.is_autocast_enabled("cpu") else values


def no_empty(self, inputs: Inputs) -> Encoding:
    inputs["x"].max()
    return Numbers.forward(self, inputs)


def noisy(self, out: Encoding, keep) -> Encoding:
    return out.with_values(out.tokens.values + 1e-3 * torch.rand(()))


class Picky(Numbers):
    """A config that cannot be read back from what it is written as."""

    @config
    class Config(Numbers.Config):
        offset: Annotated[float, Field(ge=0, le=1)] = 3.0


def with_nan(self, out: Encoding, keep) -> Encoding:
    return out.with_values(out.tokens.values.masked_fill(out.tokens.grid.special[..., None], float("nan")))


BROKEN = [
    ("attributes", of(supports=frozenset({"tokens", "fly"}), depth=0)),
    ("attributes", of(depth=0)),
    ("attributes", of(modality="")),
    ("attributes", of(no_weight_decay=lambda self: {"position"})),
    ("examples", of(examples=random_examples)),
    ("examples", of(examples=one_seed)),
    ("prepare_collate", of(collate=last_first)),
    ("prepare_collate", of(length=lambda self, item: 0)),
    ("bad_sample", of(prepare=crash)),
    ("odd_input", of(oddities=lambda self, seed: {"NaN": [1.0, float("nan")]})),
    ("odd_input", of(oddities=lambda self, seed: {"words": ["a", "b"]})),
    ("odd_input", Disturbed),
    ("forward", encoded(lambda self, out, keep: out.with_values(out.tokens.values.double()))),
    ("forward", encoded(with_nan)),
    ("forward", encoded(lambda self, out, keep: out.with_values(out.tokens.values[..., :3]))),
    ("forward", of(forward=lambda self, inputs: self.encode(self.tokenize({**inputs, "x": inputs["x"] * 2})))),
    ("forward", of(pooled_width=8)),
    ("grid", tokenized(lambda self, t: Tokens(t.values, regrid(t.grid, shape=(3, 3))))),
    ("grid", tokenized(lambda self, t: Tokens(t.values, regrid(t.grid, coords=t.grid.coords / 0)))),
    ("grid", tokenized(lambda self, t: Tokens(t.values, regrid(t.grid, special=~t.grid.valid)))),
    ("batch_invariance", of(tokenize=attended_padding)),
    ("batch_invariance", encoded(lambda self, out, keep: Encoding(out.tokens, out.pooled - out.pooled.mean(0)))),
    ("empty_batch", of(forward=no_empty)),
    ("eval_determinism", encoded(noisy)),
    ("eval_determinism", Counts),
    ("gradients", Unused),
    ("gradients", encoded(lambda self, out, keep: Encoding(out.tokens, out.pooled.detach()))),
    ("autocast", encoded(lambda self, out, keep: out.with_values(rounded(out.tokens.values)))),
    ("keep", of(encode=keep_ignored)),
    ("keep", of(encode=keep_renumbered)),
    ("keep", of(encode=empty_slots_seen)),
    ("keep", of(encode=unchecked, supports=frozenset({"tokens", "layers"}))),
    ("layers", of(encode=no_layers)),
    ("layers", of(encode=layers_sorted)),
    ("layers", of(encode=unchecked)),
    (
        "layers",
        of(check_request=lambda self, keep, layers: None, supports=frozenset({"tokens", "drop_tokens"}), depth=0),
    ),
    ("blocks", of(layer_modules=lambda self: [])),
    ("blocks", of(layer_modules=lambda self: list(self.blocks)[::-1])),
    ("blocks", of(layer_modules=lambda self: [self.blocks[0], self.out])),
    ("content", filled(lambda c: Content(c.values[:, 1:]))),
    ("content", filled(lambda c: Content(c.values[..., 0]))),
    ("content", filled(lambda c: Content(c.values - c.values.mean()))),
    ("content", filled(lambda c: Content(c.values * 0))),
    ("content", filled(lambda c: Content(c.values / 0))),
    ("content", filled(lambda c: Content(c.values, points=2))),
    ("content", filled(lambda c: Content(c.values, observed=c.values[..., 0] > 0))),
    ("content", filled(lambda c: Content(c.values, observed=c.values > c.values[:1]))),
    ("content", filled(lambda c: Content(c.values[..., 0].long() + 1, vocabulary=1))),
    ("content", filled(lambda c: Content(c.values[..., 0], vocabulary=2))),
    ("content", filled(lambda c: Content(c.values if len(c.values) else c.values[..., 0]))),
    ("content", of(supports=Numbers.supports - {"content"})),
    ("mask_token", placed(lambda t: t.values)),
    ("mask_token", placed(lambda t: t.positions + 0.1 * (t.values - t.positions))),
    ("mask_token", placed(lambda t: torch.zeros_like(t.values))),
    ("mask_token", placed(lambda t: t.positions / 0)),
    ("mask_token", placed(lambda t: None)),
    ("mask_token", of(supports=Numbers.supports - {"mask_token"})),
    ("mask_token", Remembered),
    ("mask_token", tokenized(lambda self, t: Shifting(t.values, t.grid, t.positions))),
    ("mask_token", tokenized(lambda self, t: Open(t.values, t.grid, t.positions))),
    ("mask_token", encoded(lambda self, out, keep: Encoding(Tokens(out.tokens.values.detach(), out.tokens.grid)))),
    ("attention", of(attended=lambda self, tokens: self.encode(tokens))),
    ("config_round_trip", Picky),
    ("weights_round_trip", NeedsMore),
]


@pytest.mark.parametrize(("check", "broken"), BROKEN)
def test_each_check_fails_on_what_it_is_for(check: str, broken: type[Encoder]):
    with pytest.raises(AssertionError, match=rf"{broken.__name__}, check '{check}': .+"):
        check_encoder(broken, only=[check])


def test_every_check_has_a_broken_encoder():
    assert {check for check, _ in BROKEN} == set(ENCODER_CHECKS)


def test_expected_failures_are_strict():
    check_encoder(Unused, expected_failures={"gradients": "a layer is idle"})
    with pytest.raises(
        AssertionError, match="'gradients': passes, though expected to fail \\(it was idle\\); unlist it"
    ):
        check_encoder(Numbers, expected_failures={"gradients": "it was idle"})
    with pytest.raises(ValueError, match="no check 'gradient'; did you mean 'gradients'"):
        check_encoder(Numbers, expected_failures={"gradient": "…"})


def test_excluded_parameters_are_strict():
    check_encoder(Unused, no_gradient={"idle.*": "only for looks"})
    with pytest.raises(AssertionError, match="gets a gradient now"):
        check_encoder(Numbers, no_gradient={"out.*": "no pool"})
    with pytest.raises(AssertionError, match="matches no parameter"):
        check_encoder(Numbers, no_gradient={"nothing": "no"})


def test_all_problems_are_reported_at_once_and_the_encoder_is_left_alone():
    encoder = Unused(Unused.Config()).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.depth = 5
    with pytest.raises(AssertionError) as caught:
        check_encoder(encoder)
    assert {"'gradients'", "'layers'"} <= {word.strip(":") for word in str(caught.value).split()}
    assert encoder.training
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("name", ["info-nce", "siglip"])
def test_our_losses_pass(name: str):
    check_loss(component("losses", name).build())


class Contrast(nn.Module):
    """A slow, plain, right contrastive loss; the broken ones below differ in one line."""

    @config
    class Config:
        smooth: float = 0.0

    def __init__(self, config=None):
        super().__init__()
        self.config = config or self.Config()

    def rows(self, a, b, group, valid):
        keep = torch.ones(len(a), dtype=torch.bool) if valid is None else valid
        group = torch.arange(len(a)) if group is None else group
        return a[keep], b[keep], group[keep]

    def logits(self, a, b, scale):
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        with torch.autocast("cpu", enabled=False):
            return scale.to(wide) * (a.to(wide) @ b.to(wide).T)

    def total(self, terms, count):
        return terms.sum() / max(count, 1)

    def forward(self, a, b, *, scale, bias=None, negatives=None, group=None, valid=None, world=None):
        a, b, group = self.rows(a, b, group, valid)
        logits = self.logits(a, b, scale)
        same = (group[:, None] == group[None]).to(logits.dtype)
        every = logits if negatives is None else torch.cat([logits, self.logits(a, negatives, scale)], 1)
        terms = every.logsumexp(1) - (logits * same).sum(1) / same.sum(1) if len(a) else logits.sum()[None]
        return {"loss": self.total(terms, len(a)), "n": torch.tensor(len(a))}


def test_a_plain_right_loss_passes():
    check_loss(Contrast())


class Half(Contrast):
    def logits(self, a, b, scale):
        return scale.to(a.dtype) * (a @ b.T)


class MaskedByZero(Contrast):
    """Keeps invalid rows as zeros: they are still negatives."""

    def rows(self, a, b, group, valid):
        keep = torch.ones(len(a), dtype=torch.bool) if valid is None else valid
        a, b = (torch.where(keep[:, None], x, 0.0) for x in (a, b))
        return a, b, torch.arange(len(a)) if group is None else group


class Changed(Contrast):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, a, b, **options):
        return self.change(super().forward, a, b, options)


def order_matters(run, a, b, o):
    weight = torch.arange(1, len(a) + 1, dtype=a.dtype)[:, None]
    return run(a * weight, b, **o)


def mean_of_nothing(run, a, b, o):
    out = run(a, b, **o)
    return {**out, "loss": out["loss"] * out["n"] / out["n"]}


def reversed_sign(run, a, b, o):
    return {**(out := run(a, b, **o)), "loss": -out["loss"]}


def scale_detached(run, a, b, o):
    return run(a, b, **{**o, "scale": o["scale"].detach()})


def doubled_gradient(run, a, b, o):
    return run(2 * a - a.detach(), b, **o)


def overflowing(run, a, b, o):
    return {**(out := run(a, b, **o)), "loss": (100 * out["loss"]).exp().log() / 100}


BROKEN_LOSSES = [
    ("output", Changed(lambda run, a, b, o: {"loss": run(a, b, **o)["loss"]})),
    ("output", Changed(lambda run, a, b, o: {**run(a, b, **o), "n": torch.tensor(len(a) - 1)})),
    ("output", Changed(lambda run, a, b, o: {**run(a, b, **o), "loss": run(a, b, **o)["loss"][None]})),
    ("direction", Changed(reversed_sign)),
    ("reduced_precision", Half()),
    ("gradient", Changed(scale_detached)),
    ("gradient", Changed(doubled_gradient)),
    ("permutation", Changed(order_matters)),
    ("invalid_rows", MaskedByZero()),
    ("invalid_rows", Changed(lambda run, a, b, o: run(a, b, **{**o, "valid": None}))),
    ("no_pairs", Changed(mean_of_nothing)),
    ("extremes", Changed(overflowing)),
    ("groups", Changed(lambda run, a, b, o: run(a, b, **{**o, "group": None}))),
    (
        "groups",
        Changed(lambda run, a, b, o: run(a, b, **{**o, "group": None if o.get("group") is None else o["group"] % 2})),
    ),
    ("negatives", Changed(lambda run, a, b, o: run(a, b, **{**o, "negatives": None}))),
]


class PickyLoss(Contrast):
    @config
    class Config:
        smooth: Annotated[float, Field(ge=0, le=1)] = 3.0


@pytest.mark.parametrize(("check", "broken"), [*BROKEN_LOSSES, ("config_round_trip", PickyLoss())])
def test_each_loss_check_fails_on_what_it_is_for(check: str, broken: nn.Module):
    with pytest.raises(AssertionError, match=rf"{type(broken).__name__}, check '{check}': .+"):
        check_loss(broken, only=[check])


def test_every_loss_check_has_a_broken_loss():
    assert {check for check, _ in BROKEN_LOSSES} | {"config_round_trip"} == set(LOSS_CHECKS)
