"""The contract of a target: for every token of a field, what a predictor is to say of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmrep.encoder import Encoder
from mmrep.model import Tower
from mmrep.tokens import Content, Inputs, Tokens

if TYPE_CHECKING:
    from mmrep.step import Step


class Target(nn.Module):
    """Content for every token, usually without gradient.

    Built as ``cls(config, tower)``; the tower is that of the field whose tokens are predicted. What a target learns
    (codebooks, statistics) is in its registered buffers, so that a resumed run is exact.

    Attributes:
        width: how many figures the predictor gives for each token: P, or the size of the vocabulary.
        choices: how many codes there are to choose from in one codebook; 0 = it is not about codes.
        losses: names of the losses in `mmrep.losses.tokenwise` that make sense, the default first; ``"own"`` is
            `distance`.
    """

    Config: ClassVar[type]
    width: int
    choices: int = 0
    losses: tuple[str, ...] = ("mse",)

    def __init__(self, config: Any, tower: Tower) -> None:
        super().__init__()
        self.config = config

    def taught(self, tower: Tower) -> list[nn.Module]:
        """The modules whose teacher this target reads with ``step.teacher.of(module)``. The default needs none."""
        return []

    def fit(self, samples: Iterable[Any]) -> None:
        """Learn, once and before the first step, what must be known by then (a codebook), into buffers.

        Args:
            samples: raw values of the field, of the training split only; read no more of them than needed. The default
                learns nothing.
        """

    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """What the tokens of the samples that have the field are: [B, N, ...], as `Content` says."""
        raise NotImplementedError

    def distance(self, step: Step, predicted: Tensor, wanted: Content, index: Tensor, reading: Reading) -> Tensor:
        """The loss ``own``, of all that is predicted of a sample together, where no loss of single tokens will do.

        Args:
            step: the step.
            predicted: float32 (or float64) [B * groups, Nt, width].
            wanted: what `forward` returned, of B samples.
            index: int64 [B * groups, Nt], of which tokens; -1 is an empty slot.
            reading: which reading was predicted from.

        Returns:
            [B * groups]; 0 where nothing is predicted.
        """
        raise NotImplementedError

    def absent(self, step: Step) -> None:
        """No sample of this process has the field: take part in what `forward` sums over processes.

        The default takes it that `forward` sums nothing. What it leaves as ``loss`` to `parts` counts.
        """

    def parts(self) -> dict[str, Tensor]:
        """What the last `forward` left to look at; ``loss``, if there, is added to the objective's."""
        return {}

    def after_optimizer_step(self) -> None:
        """Update codebooks. Called once per optimizer step."""


@dataclass(frozen=True)
class Reading:
    """A field and one of its views."""

    field: str
    view: int = 0


@dataclass(frozen=True)
class Sight:
    """What an encoder makes of its own examples: how an objective learns sizes before there is data."""

    inputs: Inputs
    tokens: Tokens

    @property
    def axes(self) -> int:
        """Coordinates of a token."""
        return self.tokens.grid.coords.shape[-1]


@torch.no_grad()
def look(encoder: Encoder) -> Sight:
    """Tokenize two of the encoder's own examples, in eval mode, on its device."""
    was_training = encoder.training
    encoder.eval()
    try:
        device = next(encoder.parameters()).device
        prepared = encoder.collate([encoder.prepare(raw) for raw in encoder.examples(2, 0)])
        inputs = {name: value.to(device) for name, value in prepared.items()}
        return Sight(inputs, encoder.tokenize(inputs))
    finally:
        encoder.train(was_training)
