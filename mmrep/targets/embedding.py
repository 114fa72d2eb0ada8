"""The encoder's own input tokens: which of the hidden patches is the one that belongs here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmrep.config import config
from mmrep.model import Tower
from mmrep.targets.target import Target
from mmrep.tokens import Content

if TYPE_CHECKING:
    from mmrep.step import Step


@config
class EmbeddingConfig:
    """Nothing to choose."""


class Embedding(Target):
    """Tokens as they come from ``tokenize``, less their positions, with gradient (Selfie, arXiv:1906.02940, section 2).

    They are told from each other, so they cannot all become one; compared token by token they would.
    """

    Config = EmbeddingConfig
    losses = ("contrastive",)

    def __init__(self, config: EmbeddingConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        self.width = tower.encoder.width

    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`: vectors [B, N, D], with gradient."""
        tokens = step.tokens(field, view)
        # With its position a patch would be told by where it is, which the predictor is told too.
        return Content(tokens.values if tokens.positions is None else tokens.values - tokens.positions)
