"""A text in one vector, from which a decoder writes the whole of it: TSDAE, a denoising autoencoder of sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field as default
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.blocks import Transformer
from mmrep.config import ConfigError, config
from mmrep.encoder import Encoder, unsupported
from mmrep.model import Model
from mmrep.objectives.objective import Objective, ObjectiveConfig
from mmrep.registry import near
from mmrep.step import Step, idle
from mmrep.targets.target import look


@config
class DecoderConfig:
    """depth, heads: of the transformer. width: of it; None = that of the encoder's table of token vectors.

    tied: it reads and writes with the encoder's own table where the encoder has one; then width is the table's. length:
    so many tokens of a text are written at most.
    """

    depth: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 4
    width: Annotated[int, Field(ge=1)] | None = None
    tied: bool = True
    length: Annotated[int, Field(ge=1)] = 128


@config
class DenoiseConfig(ObjectiveConfig):
    """field: whose content must be codes, as that of text is. view: the damaged reading. target: the whole one."""

    field: str
    view: Annotated[int, Field(ge=0)] = 0
    target: Annotated[int, Field(ge=0)] = 1
    decoder: DecoderConfig = default(default_factory=DecoderConfig)


class Denoise(Objective):
    """Cross-entropy of every token of the whole text, given those before it and the pooled vector of the damaged one.

    TSDAE (Wang, Reimers and Gurevych 2021, arXiv:2104.06979, equation 1), with teacher forcing: the first token, which
    is the begin token where the tokenizer has one, is given, and the mean is over all others, the end token among them,
    of the whole batch. The decoder sees one vector of the text and nothing else of it. It is not saved with the model.
    """

    Config = DenoiseConfig
    scope = "sample"

    def __init__(self, config: DenoiseConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        problems = [f"objectives.denoise.{problem}" for problem in _problems(config, model, fields)]
        if problems:
            raise ConfigError(problems)
        tower = model.tower(fields[config.field])
        vocabulary = tower.encoder.content(look(tower.encoder).inputs).vocabulary
        assert vocabulary is not None
        table = _table(tower.encoder) if config.decoder.tied else None
        self.decoder = Decoder(config.decoder, tower.pool.width, vocabulary, table, tower.encoder.width)

    def embedded(self) -> set[str]:
        """No embedding is asked for."""
        return set()

    def pooled(self) -> set[str]:
        """See `Objective.pooled`."""
        return {cast(DenoiseConfig, self.config).field}

    def raw(self) -> set[str]:
        """See `Objective.raw`."""
        return {cast(DenoiseConfig, self.config).field}

    def count(self, step: Step) -> int:
        """See `Objective.count`: the tokens that are to be written."""
        return int(self._wanted(step)[1].sum())

    def forward(self, step: Step) -> dict[str, Tensor]:
        """See `Objective.forward`; part ``accuracy`` is the share of this process's tokens that come first."""
        config = cast(DenoiseConfig, self.config)
        codes, wanted = self._wanted(step)
        n = step.world.sum(wanted.sum()).clamp_min(1)
        vectors = step.pooled(config.field, config.view)
        if not step.has(config.field):
            return {"loss": vectors.sum() * 0 + idle(self) * step.world.size}
        logits = self.decoder(codes[:, :-1], vectors[step.present(config.field)])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(logits[wanted], codes[:, 1:][wanted], reduction="sum")
        right = (logits.argmax(-1) == codes[:, 1:])[wanted]
        accuracy = right.sum() / wanted.sum().clamp_min(1)
        return {"loss": losses * (step.world.size / n), "accuracy": accuracy.to(losses.dtype)}

    def _wanted(self, step: Step) -> tuple[Tensor, Tensor]:
        """The whole texts, int64 [n, T + 1], and which of their T last are to be written, bool [n, T]."""
        config = cast(DenoiseConfig, self.config)
        if not step.has(config.field):
            nothing = torch.zeros(0, 1, dtype=torch.long, device=step.model.device)
            return nothing, nothing[:, 1:].bool()
        codes = step.content(config.field, config.target).values[:, : config.decoder.length + 1]
        with torch.no_grad():
            valid = step.tokens(config.field, config.target).grid.valid[:, : codes.shape[1]]
        return codes, valid[:, 1:] & valid[:, :-1]


class Decoder(nn.Module):
    """A causal transformer that writes a sequence of codes from one vector.

    Cross-attention to a single vector gives its value whatever the query is, since a softmax over one key is 1. So
    there are no queries and keys here: what a block would attend to is a linear map of the vector, added at every place
    in front of the block.

    Args:
        config: sizes.
        given: width of the vector.
        vocabulary: how many codes there are.
        table: the encoder's token vectors, to be shared; None = a table of its own.
        width: of the decoder, where neither the config nor a shared table says it.
    """

    def __init__(
        self, config: DecoderConfig, given: int, vocabulary: int, table: nn.Embedding | None, width: int
    ) -> None:
        super().__init__()
        width = table.embedding_dim if table is not None else config.width or width
        self.own = None if table is not None else nn.Embedding(vocabulary, width)
        if self.own is not None:
            nn.init.normal_(self.own.weight, std=0.02)
        self.__dict__["_table"] = table if table is not None else self.own  # a shared one is seen, not owned
        self.places = nn.Parameter(0.02 * torch.randn(config.length, width))
        self.begin = nn.LayerNorm(width)
        self.given = nn.ModuleList(nn.Linear(given, width) for _ in range(config.depth))
        self.transformer = Transformer(width, config.depth, config.heads, causal=True)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, codes: Tensor, vectors: Tensor) -> Tensor:
        """What comes next.

        Args:
            codes: int64 [n, T], what has been written.
            vectors: [n, given].

        Returns:
            logits [n, T, vocabulary]; those at a place say what comes after it.
        """
        table = cast(nn.Embedding, self.__dict__["_table"])
        values = self.begin(table(codes) + self.places[: codes.shape[1]])
        for block, given in zip(self.transformer.blocks, self.given, strict=True):
            values = block(values + given(vectors)[:, None], None, True)
        return F.linear(self.norm(values), table.weight, self.bias)


def _table(encoder: Encoder) -> nn.Embedding | None:
    """The table of token vectors of an encoder that has one: see `vectors` of the text encoders."""
    found: Any = getattr(encoder, "vectors", lambda: None)()
    return found if isinstance(found, nn.Embedding) else None


def _problems(config: DenoiseConfig, model: Model, fields: dict[str, str]) -> Iterator[str]:
    if config.field not in fields:
        yield f"field: unknown {config.field!r}{near(config.field, fields)} Fields: {', '.join(fields)}"
        return
    tower = model.tower(fields[config.field])
    if tower.frozen:
        yield f"field: tower {fields[config.field]!r} is frozen: it would learn nothing"
    if config.view == config.target:
        yield f"target: view {config.target} is the damaged one too; name the reading that is whole"
    if "content" not in tower.encoder.supports:
        yield f"field: {unsupported(tower.encoder, 'content')}"
        return
    content = tower.encoder.content(look(tower.encoder).inputs)
    if content.vocabulary is None or content.values.ndim != 2:
        yield f"field: {tower.modality} tokens are no codes that could be written one after the other"
        return
    decoder, table = config.decoder, _table(tower.encoder) if config.decoder.tied else None
    if table is not None and decoder.width not in (None, table.embedding_dim):
        yield (
            f"decoder.width: {decoder.width}, but the encoder's token vectors, which it shares, have "
            f"{table.embedding_dim}; leave it out, or set decoder.tied: false"
        )
    width = table.embedding_dim if table is not None else decoder.width or tower.encoder.width
    if width % decoder.heads:
        yield f"decoder.heads: {decoder.heads} does not divide the width of {width}"
