"""A tower: encoder, pool and projector, from the inputs of one field to embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import field
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.config import Component, Of, component, config
from mmrep.encoder import Encoder
from mmrep.finetune.adapter import Adapter
from mmrep.finetune.freeze import Frozen, freeze
from mmrep.tokens import Encoding, Inputs


@config
class TowerConfig:
    """Encoder → pool → projector.

    frozen: what gets no gradient. True: the encoder and the pool, while the projector trains. ``"tower"``: the
    projector too, so that the embeddings stay what they are to the last bit. A number k: what comes before the
    encoder's layers, and the first k of them. A list: patterns of parameter names relative to the tower
    (``encoder.*``, ``*.attention.*``), ``*`` matches any part; a pattern with ``!`` in front takes out again what those
    before it have frozen. A module whose parameters are all frozen stays in eval mode.
    """

    encoder: Annotated[Component, Of("encoders")]
    pool: Annotated[Component, Of("pools")] = field(default_factory=lambda: component("pools", "mean"))
    projector: Annotated[Component, Of("projectors")] = field(default_factory=lambda: component("projectors", "linear"))
    frozen: Frozen = False
    adapter: Annotated[Component | None, Of("adapters")] = None

    def __post_init__(self) -> None:
        if self.adapter is not None and self.frozen is True:
            raise ValueError(
                "frozen: true would keep the adapter from training, as it is inside the encoder. Leave it out, since "
                "the encoder's own weights rest anyway; frozen: tower keeps everything as it is"
            )


class Tower(nn.Module):
    """Encoder → pool → projector: the inputs of one field to embeddings [B, dim]."""

    def __init__(self, config: TowerConfig, dim: int, *, normalize: bool = True, files: Path | None = None) -> None:
        super().__init__()
        self._resting: list[nn.Module] = []
        self.dim = dim
        self.normalize = normalize
        self.encoder: Encoder = config.encoder.build(files=files)
        native = config.pool.type == "native" and self.encoder.pooled_width is not None
        width = self.encoder.pooled_width if native else self.encoder.width
        self.pool = config.pool.build(width)
        self.projector = config.projector.build(width, dim)
        self.adapter: Adapter | None = None if config.adapter is None else config.adapter.build()
        # Without an adapter; an encoder may keep parts of its own from training.
        self.trained_alone = {name for name, p in self.named_parameters() if p.requires_grad}
        if self.adapter is not None:
            self.adapter.dim = dim
            self.adapter.apply(self.encoder)
        self.configure(config)

    def configure(self, config: TowerConfig) -> None:
        """Take the gradient from what ``config.frozen`` names; ``config`` is from now on the tower's.

        Raises:
            ValueError: more layers than there are, or a pattern that matches nothing.
        """
        self.config = config
        touched = config.frozen is not False or config.adapter is not None
        self._resting = freeze(self, config.frozen) if touched else []  # a plain list: they are parts of it already
        learns = any(p.requires_grad for part in (self.encoder, self.pool) for p in part.parameters())
        self._frozen = config.frozen is not False and not learns
        self.train(self.training)

    @property
    def frozen(self) -> bool:
        """Whether encoder and pool are frozen whole, so that the features of an input never change."""
        return self._frozen

    @property
    def modality(self) -> str:
        """The modality of the encoder."""
        return self.encoder.modality

    def train(self, mode: bool = True) -> Tower:
        """Switch training mode; frozen parts stay in eval mode, so that their dropout and statistics rest."""
        super().train(mode)
        for part in self._resting:
            part.eval()
        return self

    def encoding(self, inputs: Inputs, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """The encoder's tokens."""
        if keep is None and not layers:
            return self.finish(self.encoder(inputs))
        return self.finish(self.encoder.encode(self.encoder.tokenize(inputs), keep, layers))

    def finish(self, encoding: Encoding) -> Encoding:
        """What the encoder has just returned, with what an adapter adds to it."""
        return encoding if self.adapter is None else self.adapter.finish(self.encoder, encoding)

    def no_weight_decay(self) -> set[str]:
        """Names of an adapter's parameters that must not decay; an encoder says its own."""
        found = set[str]() if self.adapter is None else self.adapter.no_weight_decay(self.encoder)
        return {f"encoder.{name}" for name in found}

    def without_adapter(self) -> AbstractContextManager[None]:
        """Within, the tower is what it was before its adapter; see `Adapter.without`."""
        return nullcontext() if self.adapter is None else self.adapter.without(self.encoder)

    def features(self, inputs: Inputs) -> Tensor:
        """Pooled, not projected: [B, width], and behind it what an adapter wants to be projected beside it."""
        encoding = self.encoding(inputs)
        pooled = self.pool(encoding)
        return pooled if self.adapter is None else self.adapter.features(encoding, pooled)

    def projected(self, features: Tensor) -> Tensor:
        """[B, width] to [B, dim], of whatever length the projector gives."""
        if self.adapter is None:
            return self.projector(features)
        width = self.pool.width
        return self.adapter.embedding(self.projector(features[:, :width]), features[:, width:])

    def project(self, features: Tensor) -> Tensor:
        """[B, width] to float32 [B, dim], of unit length if the model normalises; a model of doubles stays one."""
        out = self.projected(features)
        out = out if out.dtype == torch.float64 else out.float()
        return F.normalize(out, dim=-1) if self.normalize else out

    def forward(self, inputs: Inputs) -> Tensor:
        """Inputs to embeddings, float32 [B, dim]."""
        return self.project(self.features(inputs))
