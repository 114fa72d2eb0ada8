"""What encoders share whose tokens go through one transformer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmrep.blocks import Transformer
from mmrep.encoder import Encoder
from mmrep.tokens import Encoding, Tokens


class TransformerEncoder(Encoder):
    """`encode` of an encoder that has a ``transformer`` and a final ``norm``; name it before the modality's base."""

    transformer: Transformer
    norm: nn.LayerNorm

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Tokens to an encoding: [B, N', D], normed; the layers are block outputs, not normed."""
        self.check_request(keep, layers)
        kept = tokens.keep(keep)
        full = kept.grid.shape is not None or bool(kept.grid.valid.all())  # a lattice has no padding: no need to look
        values, asked = self.transformer(kept.values, None if full else kept.grid.valid, layers)
        return Encoding(Tokens(self.norm(values), kept.grid), layers=asked)
