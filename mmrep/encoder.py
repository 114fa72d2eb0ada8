"""The encoder contract: how raw values of one modality become numbers, tokens and an encoding.

Every encoder of every modality has the same verbs. `mmrep.testing.check_encoder` runs them all on the encoder's own
`Encoder.examples`, so a new encoder gets its tests by registering.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmrep.layers import stacked
from mmrep.tokens import Content, Encoding, Inputs, Tokens
from mmrep.views import View

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmrep.config import Component

logger = logging.getLogger(__name__)

CAPABILITIES = frozenset({"tokens", "drop_tokens", "mask_token", "layers", "content", "attention"})


class BadSampleError(ValueError):
    """A raw value that cannot be read; the sample is quarantined under ``cause`` and the run goes on.

    Args:
        cause: a short stable label to count by, such as ``"truncated image"``.
        detail: what was seen.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        self.cause = cause
        super().__init__(f"{cause}: {detail}" if detail else cause)


class Encoder(nn.Module):
    """Raw values of one modality to tokens.

    A subclass has a nested or neighbouring config dataclass named by ``Config`` and is built as ``cls(config)``, or
    as ``cls(config, files=folder)`` when it is loaded from a saved model whose ``folder`` holds what `save_files`
    wrote (the folder is absent if it wrote nothing), or after `fit` learned something. Building with ``files`` must
    need nothing else: no hub, no network, no original path, and no pretrained weights, which come from the state.

    Attributes:
        modality: the name of the modality, such as ``"image"``.
        width: D, the width of the tokens.
        supports: which of ``"tokens", "drop_tokens", "mask_token", "layers", "content", "attention"`` it can do.
            ``"mask_token"``: `tokenize` gives the positions apart, so that a token can be hidden and its place kept.
        pooled_width: width of ``Encoding.pooled``, if the architecture has one of another width than its tokens.
        depth: how many layers can be asked for, 0 when ``"layers"`` is not supported.
    """

    Config: ClassVar[type]
    modality: ClassVar[str]
    supports: frozenset[str] = frozenset({"tokens"})
    width: int
    pooled_width: int | None = None
    depth: int = 0

    def __init__(self, config: Any, files: Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.files = files

    @classmethod
    def fit(cls, config: Any, samples: Iterable[Any], folder: Path) -> None:
        """Learn what must be known before the weights exist (a tokenizer, a normalisation) from training samples.

        Args:
            config: the config as written in the recipe.
            samples: raw values of the fields that this encoder will read, training split only; may be read twice.
            folder: where to write what was learned; it is then given to the constructor as ``files``. The default
                learns nothing and writes nothing.
        """

    @classmethod
    def wrapped(cls, config: Any) -> Component | None:
        """The encoder that one of this class and config stands around, as its attribute ``inner``.

        A run may `start` with a model that has the encoder within where this one now stands. The default has none.
        """
        return None

    def settle(self) -> None:
        """Begin anew from the weights of the encoder within, which were replaced after it was built."""

    def examples(self, n: int, seed: int) -> list[Any]:
        """Make ``n`` raw sample inputs, the same for the same ``seed`` on every machine."""
        raise NotImplementedError

    def oddities(self, seed: int) -> dict[str, Any]:
        """Raw values at and past the edge of what the modality may be, by what is odd about them.

        Zero-length audio, a cloud of one point, a graph with a dangling edge, a wrong dtype: each must either be read,
        to finite tokens that do not disturb the rest of the batch, or be refused by `BadSampleError`; the contract
        checks try them all. The default knows none.
        """
        return {}

    def prepare(self, raw: Any, *, view: View | None = None, seed: int = 0) -> Inputs:
        """Read one raw value into per-sample tensors, without a batch axis. Runs in loader workers.

        Args:
            raw: a path, bytes, PIL image, array, string or dict, as the modality accepts.
            view: a random reading to apply between decoding and normalisation; None is the deterministic reading.
            seed: what the view's randomness is derived from.

        Raises:
            BadSampleError: the value cannot be read.
        """
        raise NotImplementedError

    def collate(self, items: Sequence[Inputs]) -> Inputs:
        """Stack prepared items into one batch; padding is the encoder's affair. The default stacks equal shapes.

        Every tensor of the result has the batch first (a graph's edges are int64 [B, E, 2], -1 where there is none), so
        that a batch can be cut into parts.
        """
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}

    def length(self, item: Inputs) -> int:
        """How long a prepared item is, for sorting into batches of similar length. The default is constant."""
        return 1

    def summary(self, item: Inputs) -> Tensor:
        """A prepared item in a fixed number of plain figures, without anything learned: float32 [k].

        It is what the ``nearest-input`` baseline compares, so it should be the simplest honest description of the
        modality: pixels, a mean spectrum, counts of atoms. The default is the item's own values, which serves where all
        items have one size.
        """
        return torch.cat([value.reshape(-1).float() for value in item.values()]) / 255

    def tokenize(self, inputs: Inputs) -> Tokens:
        """Inputs to tokens [B, N, D], with positions added."""
        raise NotImplementedError

    def content(self, inputs: Inputs) -> Content:
        """What each token was made from, for objectives that predict it: see `Content`. Needs ``"content"``."""
        raise ValueError(unsupported(self, "content"))

    def recode(self, inputs: Inputs, codes: Tensor) -> Inputs:
        """The inputs with another content: int64 [B, N] ``codes``, of encoders whose `content` is such codes.

        What stands at special and padded tokens is as `content` has it.
        """
        raise ValueError(f"{type(self).__name__}: the content of {self.modality} tokens cannot be replaced by codes")

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Tokens to an encoding.

        Args:
            tokens: what `tokenize` returned.
            keep: int64 [B, K] of the tokens to compute; others cost nothing. Needs ``"drop_tokens"``.
            layers: 1-based layer numbers whose outputs to return. Needs ``"layers"``.
        """
        raise NotImplementedError

    def attended(self, tokens: Tokens) -> Encoding:
        """`encode` of all tokens, and in ``extra["attention"]`` what they attended to. Needs ``"attention"``.

        That is float [B, layers, heads, N, N], of the same pass: the weight that a token (row) gave to each (column),
        after dropout where there is some. It is 0 for padding; what stands in the rows of padding means nothing.
        """
        raise ValueError(unsupported(self, "attention"))

    def forward(self, inputs: Inputs) -> Encoding:
        """``encode(tokenize(inputs))``."""
        return self.encode(self.tokenize(inputs))

    def preview(self, raw: Any) -> Image | str:
        """What a person is shown of a raw value, in reports and search results: a picture or a line of text."""
        text = str(raw)
        return text if len(text) <= 120 else text[:117] + "…"

    def save_files(self, folder: Path) -> None:
        """Write what the constructor needs beside config and weights (tokenizer, foreign config). Default: nothing."""

    def no_weight_decay(self) -> set[str]:
        """Names of this encoder's parameters of two or more dimensions that must not decay (position tables)."""
        return set()

    def layer_modules(self) -> list[nn.Module]:
        """The modules that its layers are, in order: layer k is what the k-th gives. Empty if there is no such thing.

        It is what is counted in ``frozen`` and ``layer_decay``, recomputed by ``checkpointing`` and adapted by default.
        A layer of several modules is an `nn.ModuleList` of them, in the order in which they run. The default finds
        them: of all its lists of `depth` modules, that with the most parameters.
        """
        return stacked(self, self.depth)

    def check_request(self, keep: Tensor | None, layers: Sequence[int]) -> None:
        """Refuse what this encoder cannot do, naming encoders of the modality that can.

        Raises:
            ValueError: ``keep`` or ``layers`` is asked of an encoder that does not support it.
        """
        if keep is not None and "drop_tokens" not in self.supports:
            raise ValueError(unsupported(self, "drop_tokens"))
        if layers and "layers" not in self.supports:
            raise ValueError(unsupported(self, "layers"))
        bad = [n for n in layers if not 1 <= n <= self.depth]
        if bad:
            raise ValueError(f"{type(self).__name__} has layers 1 to {self.depth}; asked for {bad}")


def unsupported(encoder: Encoder, capability: str) -> str:
    """The message for a capability that ``encoder`` lacks; it names encoders of its modality that have it."""
    from mmrep.registry import encoders

    able = [
        name
        for name, cls in encoders.load_all().items()
        if getattr(cls, "modality", None) == encoder.modality and capability in getattr(cls, "supports", ())
    ]
    return (
        f"{type(encoder).__name__} does not support {capability!r}; "
        f"{encoder.modality} encoders that do: {', '.join(able) or 'none is registered'}"
    )
