"""Learned tokens that two frozen towers share: MMRL and MMRL++.

In a recipe::

    towers:
      image: {adapter: {type: representation-tokens, begin: 3, read: true}, frozen: ["projector.*"], …}
      text: {adapter: {type: representation-tokens, begin: 4}, frozen: ["projector.*"], …}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import config
from mmrep.encoder import Encoder
from mmrep.finetune._injection import Injection
from mmrep.finetune.adapter import Adapter
from mmrep.tokens import Encoding

if TYPE_CHECKING:
    from mmrep.model import Model

NAME = "representation"
"""Of the module in the encoder, and of what an `Encoding` has of it in ``extra``."""


class RepresentationTokens(Adapter):
    """Tokens from a space of their own, put behind the first token of the upper blocks of a frozen encoder.

    MMRL (Guo and Gu 2025, arXiv:2503.08497): from layer ``begin`` on each layer reads ``count`` tokens that a linear
    map of its own makes of R [count, width]; what the layer before made of its tokens is thrown away. With ``rank`` the
    layers have one map in common and a product of low rank each, and with ``keep`` a layer reads ``keep`` times its own
    tokens plus ``1 - keep`` times those that the layer before returned: MMRL++ (2025, arXiv:2505.10088).

    The towers of a model that have this adapter share R.

    With ``read`` a tower has a second embedding: the mean of the tokens behind the last layer through a projection of
    its own, which the objective ``classify`` trains beside the first (``alpha``). The tower's embedding stays the
    first, which serves what was not trained for; for the classes of the training, `known_classes` blends the two.

    These tokens change what the encoder computes from the beginning, and cannot be added to its weights.
    """

    @config
    class Config:
        """Fields of ``representation-tokens``.

        begin: the first layer that reads tokens, from 1. count, width: R. read: give the tower a second embedding.
        alpha: the share of the first embedding where both are blended. rank, keep: see the class; None = MMRL.
        """

        begin: Annotated[int, Field(ge=1)] = 6
        count: Annotated[int, Field(ge=1)] = 5
        width: Annotated[int, Field(ge=1)] = 512
        read: bool = False
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.7
        rank: Annotated[int, Field(ge=1)] | None = None
        keep: Annotated[float, Field(ge=0, le=1)] | None = None

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.known = False

    def apply(self, encoder: Encoder) -> None:
        """See `Adapter.apply`.

        Raises:
            ValueError: an encoder without so many layers, or in whose layers tokens have no room.
        """
        chosen, blocks = self.config, encoder.layer_modules()
        kind = type(encoder).__name__
        if chosen.begin > len(blocks):
            raise ValueError(f"adapter.begin={chosen.begin}: {kind} has {len(blocks)} layers that can read tokens")
        if any(isinstance(block, nn.ModuleList) for block in blocks):
            raise ValueError(f"adapter: layers of {kind} are several modules each, among which tokens have no place")
        inner, upper = _width(encoder, blocks[-1]), blocks[chosen.begin - 1 :]
        with torch.random.fork_rng(devices=[]):  # what is built after it is built as without it
            made = Injection(
                chosen.count, chosen.width, inner, len(upper), rank=chosen.rank, keep=chosen.keep,
                dim=self.dim if chosen.read else 0,
            )  # fmt: skip
        encoder.requires_grad_(False)
        setattr(encoder, NAME, made)
        made.hook(upper)
        _try(encoder, made)

    def base_names(self, encoder: Encoder) -> dict[str, str]:
        """See `Adapter.base_names`."""
        return {name: name for name in encoder.state_dict() if not name.startswith(f"{NAME}.")}

    def merge(self, encoder: Encoder) -> None:
        """Refused: see the class."""
        raise ValueError(
            "adapter: representation tokens cannot be added to an encoder's weights; go on with the adapter, as it is"
        )

    def tie(self, encoder: Encoder, others: Sequence[tuple[Adapter, Encoder]]) -> None:
        """See `Adapter.tie`: R is that of the first tower that has one.

        Raises:
            ValueError: its tokens are others in number or width.
        """
        for other, theirs in others:
            if isinstance(other, RepresentationTokens):
                shape = (self.config.count, self.config.width)
                if shape != (wanted := (other.config.count, other.config.width)):
                    raise ValueError(f"adapter: {shape} tokens, and those of a tower before {wanted}: they share them")
                injection(encoder).tokens = injection(theirs).tokens

    @contextmanager
    def without(self, encoder: Encoder) -> Iterator[None]:
        """See `Adapter.without`."""
        made = injection(encoder)
        made.off = True
        try:
            yield
        finally:
            made.off = False

    def finish(self, encoder: Encoder, encoding: Encoding) -> Encoding:
        """See `Adapter.finish`: the second embedding, [B, dim], not of length 1, is in ``extra``."""
        made = injection(encoder)
        last = made.take()
        if last is None or made.head is None:
            return encoding
        last = last[: len(encoding.tokens.values)]  # libraries that cannot run on no sample run on a blank one
        return replace(encoding, extra={**encoding.extra, NAME: made.read(last)})

    def features(self, encoding: Encoding, pooled: Tensor) -> Tensor:
        """See `Adapter.features`: with the second embedding behind, for who knows the classes."""
        return torch.cat([pooled, encoding.extra[NAME].to(pooled.dtype)], 1) if self.known else pooled

    def embedding(self, first: Tensor, rest: Tensor) -> Tensor:
        """See `Adapter.embedding`: the two embeddings of length 1, blended."""
        if not rest.shape[1]:
            return first
        alpha = self.config.alpha
        return alpha * F.normalize(first, dim=-1) + (1 - alpha) * F.normalize(rest.to(first.dtype), dim=-1)


def injection(encoder: Encoder) -> Injection:
    """The tokens and maps in an encoder that has the adapter."""
    return cast(Injection, getattr(encoder, NAME))


@contextmanager
def known_classes(model: Model) -> Iterator[None]:
    """Within, towers that have two embeddings blend them: for telling the classes that they were trained to tell.

    Everything else, new classes among it, is for the tower's own embedding (decoupled inference, MMRL section 3.4).
    What is blended is ``alpha`` and ``1 - alpha`` times the vectors of length 1: the order of the classes is that of
    the blended logits.
    """
    adapters = [adapter for name in model.towers if (adapter := model.tower(name).adapter) is not None]
    found = [adapter for adapter in adapters if isinstance(adapter, RepresentationTokens) and adapter.config.read]
    if not found:
        raise ValueError("known_classes: no tower of this model has an adapter representation-tokens with read: true")
    for adapter in found:
        adapter.known = True
    try:
        yield
    finally:
        for adapter in found:
            adapter.known = False


def _width(encoder: Encoder, block: nn.Module) -> int:
    """Of the tokens that the blocks read, which need not be that of what the encoder returns."""
    found: list[int] = []

    def look(_: nn.Module, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
        found.append((args[0] if args else options["hidden_states"]).shape[-1])

    handle = block.register_forward_pre_hook(look, with_kwargs=True)
    try:
        _run(encoder)
    except (KeyError, AttributeError) as error:
        raise ValueError(f"adapter: layers of {type(encoder).__name__} are not given tokens first") from error
    finally:
        handle.remove()
    return found[-1]


@torch.no_grad()
def _run(encoder: Encoder) -> Encoding:
    """Three of the encoder's examples, at rest."""
    was_training, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()
    try:
        batch = encoder.collate([encoder.prepare(raw) for raw in encoder.examples(3, 0)])
        return encoder.forward({name: value.to(device) for name, value in batch.items()})
    finally:
        encoder.train(was_training)


def _try(encoder: Encoder, made: Injection) -> None:
    """Refuse an encoder whose layers cannot do with more tokens: windows, rotary positions, biases by place."""
    try:
        _run(encoder)
        last = made.take()
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"adapter: layers of {type(encoder).__name__} cannot read tokens beside their own ({error})"
        ) from error
    if last is None or len(last) != 3:
        raise ValueError(f"adapter: layers of {type(encoder).__name__} do not read samples, one by one")
