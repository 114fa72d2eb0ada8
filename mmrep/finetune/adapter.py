"""Adapters: a few new weights inside an encoder whose own weights rest."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mmrep.encoder import Encoder
from mmrep.layers import known
from mmrep.registry import near
from mmrep.tokens import Encoding

if TYPE_CHECKING:
    from mmrep.model import Model


class Adapter:
    """Puts new weights into an encoder, in place; registered under ``mmrep.adapters``.

    It is put in when a tower is built, with the encoder's weights in place, and with the same config it always puts
    them in the same places, under the same names: that is how a saved model is loaded.

    Args:
        config: its own.

    Attributes:
        dim: of the model's space; the tower says it before `apply`.
    """

    Config: ClassVar[type]
    dim: int = 0

    def __init__(self, config: Any) -> None:
        self.config = config

    def apply(self, encoder: Encoder) -> None:
        """Change the encoder. Afterwards exactly what is to be trained of it has ``requires_grad``.

        Raises:
            ValueError: a pattern matches nothing that can be adapted.
        """
        raise NotImplementedError

    def base_names(self, encoder: Encoder) -> dict[str, str]:
        """Of an encoder that has the adapter: its own weights' names by the names they now have in its state."""
        raise NotImplementedError

    def settle(self, encoder: Encoder) -> None:
        """Begin anew from the encoder's own weights, which were replaced after `apply`. Default: nothing to do."""

    def tie(self, encoder: Encoder, others: Sequence[tuple[Adapter, Encoder]]) -> None:
        """Share weights with the adapters of the model's towers before this one. Default: none are shared."""

    def no_weight_decay(self, encoder: Encoder) -> set[str]:
        """Names of its matrices in an encoder that has it which must not decay, since not zero is nothing to them."""
        return set()

    def without(self, encoder: Encoder) -> AbstractContextManager[None]:
        """Within, the encoder computes what it did before the adapter was put in.

        The default changes nothing, for adapters that begin as nothing and are asked at the beginning.
        """
        return nullcontext()

    def finish(self, encoder: Encoder, encoding: Encoding) -> Encoding:
        """What the encoder has just returned, with what the adapter adds to ``extra``. Default: nothing."""
        return encoding

    def features(self, encoding: Encoding, pooled: Tensor) -> Tensor:
        """The pooled features [B, width], and behind them what `embedding` is to know. Default: nothing."""
        return pooled

    def embedding(self, first: Tensor, rest: Tensor) -> Tensor:
        """Of the projected features [B, dim] and what `features` put behind them [B, n], the embedding [B, dim]."""
        return first

    def merge(self, encoder: Encoder) -> None:
        """Take the adapter out again; the encoder's own weights change so that it computes the same.

        Raises:
            ValueError: it is none that weights could stand for.
        """
        raise NotImplementedError


def merged(model: Model, towers: Collection[str] | None = None) -> Model:
    """An equal model without adapters: their weights are added to those of the encoders. ``model`` stays as it is.

    Args:
        model: any model.
        towers: which towers' adapters; None = all.

    Returns:
        A copy whose config knows no adapter any more, so that it is saved, loaded and trained as any other model.
    """
    made, changed = copy.deepcopy(model), dict(model.config.towers)
    for name, config in model.config.towers.items():
        if config.adapter is None or (towers is not None and name not in towers):
            continue
        tower = made.tower(name)
        assert tower.adapter is not None
        with torch.no_grad():
            tower.adapter.merge(tower.encoder)
        # Patterns may have named weights of the adapter, and what rests for its sake alone need not rest any more.
        frozen = False if isinstance(config.frozen, list) else config.frozen
        changed[name] = dataclasses.replace(config, adapter=None, frozen=frozen)
        tower.adapter = None
        for parameter_name, parameter in tower.named_parameters():
            parameter.requires_grad_(parameter_name in tower.trained_alone)
        tower.configure(changed[name])
    made.config = dataclasses.replace(model.config, towers=changed)
    return made


def matching(patterns: Collection[str], allowed: dict[str, Any], what: str) -> list[str]:
    """Names of ``allowed`` that match some pattern, each of which must match one.

    Raises:
        ValueError: one does not; ``what`` says whose it is.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in allowed):
            raise ValueError(
                f"{what}: nothing that it could name matches {pattern!r}{near(pattern, known([*allowed]))}"
            )
    return [name for name in allowed if any(fnmatchcase(name, pattern) for pattern in patterns)]
