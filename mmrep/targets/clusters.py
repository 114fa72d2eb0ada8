"""Clusters that are found once, before training: k-means of the input, or of a layer of the encoder as it starts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.encoder import BadSampleError, Encoder, unsupported
from mmrep.model import Tower
from mmrep.targets._codebook import nearest, perplexity, spread
from mmrep.targets.random_projection import seen
from mmrep.targets.target import Target, look
from mmrep.tokens import Content, Grid

if TYPE_CHECKING:
    from mmrep.step import Step

_BATCH = 32  # samples that are read at once


@config
class ClustersConfig:
    """codes: K. layer: cluster this layer of the encoder, as it is before training; None = the content of the tokens.

    vectors: of at most so many tokens the clusters are found; of a sample's tokens all are taken, so it should be large
    beside the length of one. seed: of k-means.
    """

    codes: Annotated[int, Field(ge=2)] = 100
    layer: Annotated[int, Field(ge=1)] | None = None
    vectors: Annotated[int, Field(ge=2)] = 100_000
    seed: Annotated[int, Field(ge=0)] = 0


class Clusters(Target):
    """The units of HuBERT (Hsu et al. 2021, arXiv:2106.07447, section II.A): which cluster a token falls in.

    Its first iteration clusters the sound (there MFCCs), which is ``layer: null``. The second clusters a layer of the
    first's model: a recipe that ``start``s from that model names the ``layer``, and the codes are those of a copy of
    the encoder as it started, which is not trained. Vectors are standardised, figure by figure, then clustered by
    scikit-learn's ``MiniBatchKMeans``. Codes, statistics and copy are in the checkpoint.
    """

    Config = ClustersConfig
    losses = ("cross-entropy",)

    def __init__(self, config: ClustersConfig, tower: Tower) -> None:
        super().__init__(config, tower)
        encoder = tower.encoder
        self.width = config.codes
        self.copy: Encoder | None = None
        if config.layer is None:
            content = encoder.content(look(encoder).inputs)
            if content.vocabulary is not None or content.points is not None:
                raise ValueError(f"{tower.modality} tokens are no list of measured values: they cannot be clustered")
            figures = content.values.shape[-1]
        else:
            if "layers" not in encoder.supports:
                raise ValueError(unsupported(encoder, "layers"))
            if config.layer > encoder.depth:
                raise ValueError(f"layer: {config.layer} of an encoder that has {encoder.depth}")
            figures = encoder.width
            self.copy = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.__dict__["_encoder"] = encoder  # seen, not owned
        self.register_buffer("codes", torch.zeros(config.codes, figures))
        self.register_buffer("mean", torch.zeros(figures))
        self.register_buffer("deviation", torch.ones(figures))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.codes: Tensor
        self.fitted: Tensor
        self.mean: Tensor
        self.deviation: Tensor
        self._parts: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Clusters:
        """The copy is never in training mode."""
        super().train(mode)
        if self.copy is not None:
            self.copy.eval()
        return self

    @torch.no_grad()
    def fit(self, samples: Iterable[Any]) -> None:
        """See `Target.fit`.

        Raises:
            ValueError: there are fewer tokens than codes.
        """
        from sklearn.cluster import MiniBatchKMeans

        config = cast(ClustersConfig, self.config)
        found, count = [torch.zeros(0, self.codes.shape[1])], 0
        for rows in self._rows(samples):
            found.append(rows)
            count += len(rows)
            if count >= config.vectors:
                break
        vectors = torch.cat(found)[: config.vectors].double()
        if len(vectors) < config.codes:
            raise ValueError(f"clusters: codes={config.codes}, but the training samples have {len(vectors)} tokens")
        mean, deviation = vectors.mean(0), vectors.std(0, unbiased=False).clamp_min(1e-5)
        starts: Any = 3  # its stub says str
        means = MiniBatchKMeans(config.codes, random_state=config.seed, batch_size=4096, n_init=starts)
        means.fit(((vectors - mean) / deviation).float().numpy())
        self.codes.copy_(torch.from_numpy(np.asarray(means.cluster_centers_)))
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        self.fitted.fill_(True)

    def _rows(self, samples: Iterable[Any]) -> Iterator[Tensor]:
        """Vectors of tokens, batch by batch; samples that cannot be read are left out."""
        encoder: Encoder = self.copy or self.__dict__["_encoder"]
        was_training = encoder.training
        encoder.eval()
        items: list[Any] = []
        device = next(encoder.parameters()).device
        try:
            for raw in samples:
                try:
                    items.append(encoder.prepare(raw))
                except BadSampleError:  # the run will count and report it
                    continue
                if len(items) == _BATCH:
                    yield self._vectors(encoder, items, device)
                    items = []
            if items:
                yield self._vectors(encoder, items, device)
        finally:
            encoder.train(was_training)

    def _vectors(self, encoder: Encoder, items: list[Any], device: torch.device) -> Tensor:
        inputs = {name: value.to(device) for name, value in encoder.collate(items).items()}
        layer = cast(ClustersConfig, self.config).layer
        tokens = encoder.tokenize(inputs)
        if layer is not None:
            return encoder.encode(tokens, None, (layer,)).layers[0][_counted(tokens.grid)].float().cpu()
        content, rows = encoder.content(inputs), _counted(tokens.grid)
        if content.observed is not None:
            rows = rows & content.observed.any(-1)
        return _measured(content)[rows].float().cpu()

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`: codes int64 [B, N].

        Raises:
            ValueError: the clusters were not found yet.
        """
        if not bool(self.fitted):
            raise ValueError("target 'clusters' was not fitted: call Root.fit before the first step, as Run does")
        layer = cast(ClustersConfig, self.config).layer
        if self.copy is None or layer is None:
            content, rows = step.content(field, view), _counted(step.tokens(field, view).grid)
            values = _measured(content)
        else:
            tokens = self.copy.tokenize(step.inputs(field, view))
            content, rows = None, _counted(tokens.grid)
            values = self.copy.encode(tokens, None, (layer,)).layers[0]
        chosen = nearest((values[rows].float() - self.mean) / self.deviation, self.codes)
        counts = torch.bincount(chosen, minlength=len(self.codes)).float()
        self._parts = {"perplexity": perplexity(counts / counts.sum().clamp_min(1))}
        codes = spread(chosen[:, None], rows)
        observed = None if content is None else seen(content, codes)
        return Content(codes, observed, len(self.codes))

    def parts(self) -> dict[str, Tensor]:
        """See `Target.parts`: ``perplexity``, how many codes this batch uses."""
        return self._parts


def _counted(grid: Grid) -> Tensor:
    return grid.valid & ~grid.special


def _measured(content: Content) -> Tensor:
    """What was not observed is zero, the padding of the last token of a clip above all."""
    return content.values if content.observed is None else content.values.masked_fill(~content.observed, 0)
