"""An encoder under test, and what several of its checks need."""

# ruff: noqa: PT017 (rules for pytest's own tests, which rewrite their asserts)
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.encoder import Encoder
from mmrep.tokens import Inputs, Tokens


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


def weighted_sum(values: Tensor, generator: torch.Generator) -> Tensor:
    # A plain sum of normalised values is constant, so its gradient would vanish for a reason that is not the encoder's.
    return (values * torch.randn(values.shape, generator=generator)).sum()


def reached(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool((parameter.grad != 0).any())


def refuses(call: Callable[[], Any], names: str) -> None:
    try:
        call()
    except ValueError as error:
        assert names in str(error), f"the refusal does not name {names!r}: {error}"
    else:
        raise AssertionError(f"a request beyond {names!r} is not refused")
