"""The contract of an evaluation: a named measurement of a model on held-out sources, beside its baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from mmrep.data.source import Source
from mmrep.evaluate.encoded import EncodedSet
from mmrep.model import Model

Row = dict[str, Any]
"""One line of a result table: ``who`` (model, chance, a baseline), optionally ``direction``, and figures by name."""


@dataclass
class Bench:
    """What an evaluation may ask for; everything asked twice is computed once.

    Attributes:
        model: the model under test.
        fields: tower by field.
        encoded: a held-out source by name, embedded by the model.
        encoded_untrained: the same, embedded by the model as it was before training.
        train: the training source, for baselines and probes.
        encoded_train: the training source, embedded by the model.
        encoded_train_untrained: the same, embedded by the model as it was before training.
        untrained: the model before training (same seed).
    """

    model: Model
    fields: dict[str, str]
    encoded: Callable[[str], EncodedSet]
    encoded_untrained: Callable[[str], EncodedSet]
    train: Callable[[], Source]
    encoded_train: Callable[[], EncodedSet]
    encoded_train_untrained: Callable[[], EncodedSet]
    untrained: Callable[[], Model]


class Evaluation:
    """One measurement. Its config names the held-out source as ``data``, if it reads one."""

    Config: ClassVar[type]

    def __init__(self, config: Any) -> None:
        self.config = config

    def run(self, bench: Bench) -> list[Row]:
        """Measure; one row for each contestant (and direction)."""
        raise NotImplementedError
