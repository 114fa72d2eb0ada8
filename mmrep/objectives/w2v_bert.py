"""Contrast of codes half way up the encoder, and prediction of these codes at its top: W2v-BERT."""

from __future__ import annotations

from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import ConfigError, config
from mmrep.encoder import unsupported
from mmrep.losses.tokenwise import cross_entropy
from mmrep.model import Model
from mmrep.objectives.masked import Masked, MaskedConfig
from mmrep.predictors.predictor import take
from mmrep.step import Step
from mmrep.targets.gumbel_codes import GumbelCodes, GumbelCodesConfig
from mmrep.tokens import Content, Mask, Tokens


@config
class W2vBERTConfig(MaskedConfig):
    """layer: of the encoder, where hidden tokens are told from distractors. codes: weight of the prediction of codes.

    target is a ``gumbel-codes``, and the predictor, of the contrast, sees one token at a time. Other fields are those
    of ``masked``; ``input`` is ``mask-token``.
    """

    layer: Annotated[int, Field(ge=1)]
    codes: Annotated[float, Field(ge=0)] = 1.0


class W2vBERT(Masked):
    """W2v-BERT (Chung et al. 2021, arXiv:2108.06209, section 3): the losses of wav2vec 2.0 and, above, of their codes.

    The blocks up to ``layer`` are its contrastive module, whose quantiser gives codes; the blocks above are its masked
    prediction module, which names at every hidden place the code of each group, by cross-entropy: their mean over the
    groups. One pass of the encoder, one mask and one quantiser serve both.
    """

    Config = W2vBERTConfig

    def __init__(self, config: W2vBERTConfig, model: Model, fields: dict[str, str]) -> None:
        super().__init__(config, model, fields)
        encoder = self.__dict__["_tower"].encoder
        problems: list[str] = []
        if not isinstance(self.target, GumbelCodes):
            problems.append("target: the codes that are predicted are those of `gumbel-codes`")
        if config.input != "mask-token":
            problems.append("input: mask-token: codes are read where they are hidden")
        if not self.predictor.needs_hidden:
            problems.append("predictor: it reads one token at a time: tokenwise")
        if config.given or config.condition:
            problems.append("given, condition: it predicts codes from the field alone")
        if "layers" not in encoder.supports:
            problems.append(f"layer: {unsupported(encoder, 'layers')}")
        elif config.layer >= encoder.depth:
            problems.append(f"layer: {config.layer} leaves nothing above it in an encoder of {encoder.depth} layers")
        if problems:
            raise ConfigError([f"objectives.w2v-bert.{problem}" for problem in problems])
        codes = cast(GumbelCodesConfig, self.target.config)
        self.shape = (codes.groups, codes.codes)
        self.norm = nn.LayerNorm(encoder.width)  # a layer's output is not normed, the encoder's is
        self.classify = nn.Linear(encoder.width, codes.groups * codes.codes)

    def predict(self, step: Step, tokens: Tokens, mask: Mask) -> tuple[Tensor, Tensor]:
        """See `Masked.predict`; behind what is contrasted stand the logits of the codes."""
        config = cast(W2vBERTConfig, self.config)
        assert self.token is not None
        groups, target = mask.target.shape[1], mask.target.flatten(0, 1)
        encoder = step.tower(config.field).encoder
        hidden = tokens.repeat(groups).hide(target, self.token)
        encoding = encoder.encode(hidden, None, (config.layer,))
        index = torch.arange(hidden.values.shape[1], device=target.device).expand(len(target), -1)
        middle = Tokens(self.norm(encoding.layers[0]), encoding.tokens.grid)
        contrasted = self.predictor(middle, index, hidden, target)
        logits = self.classify(take(encoding.tokens.values, target))
        return torch.cat([contrasted, logits.to(contrasted.dtype)], -1), target

    def _losses(self, predicted: Tensor, wanted: Content, target: Tensor, groups: int, seeds: Tensor) -> Tensor:
        config, (G, K) = cast(W2vBERTConfig, self.config), self.shape
        contrasted, logits = predicted.split([predicted.shape[-1] - G * K, G * K], -1)
        losses = super()._losses(contrasted, wanted, target, groups, seeds)
        chosen = cast(GumbelCodes, self.target).chosen
        assert chosen is not None
        valid = target >= 0
        codes = take(chosen.repeat_interleave(groups, 0), target)[valid]
        return losses + config.codes * cross_entropy(logits[valid], codes)
