"""Low-rank adapters, through the peft library (github.com/huggingface/peft)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from mmrep.config import config
from mmrep.encoder import Encoder
from mmrep.finetune._through_peft import ByPatterns, any_of, inside, is_linear
from mmrep.finetune.adapter import matching


class LoRA(ByPatterns):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): ``W x`` becomes ``W x + alpha / rank * B A x``, with B zero at first.

    With ``dora`` it is DoRA (Liu et al. 2024, arXiv:2402.09353): the sum is scaled to a norm of its own for each output
    (row), learned and at first that of W. Either way a tower begins as exactly what it was without.

    A layer that computes queries, keys and values at once is one linear layer here, and has one A for the three. The
    encoder's own weights rest, and modules that hold nothing that trains are in eval mode; the dropout of blocks that
    hold an adapter stays on in training, as it does in peft.
    """

    @config
    class Config:
        """Fields of a ``lora`` adapter.

        rank: r, the rows of A. alpha: see the class. dropout: on the input of A. dora: see the class. targets: patterns
        of module names relative to the encoder, ``*`` matches any part; the linear (and convolutional) layers and
        embeddings among what they match are adapted. None given: every linear layer of the encoder's layers. (The
        attention of torch, `nn.MultiheadAttention`, is such layers too, called ``qkv`` and ``out``.) also: patterns of
        the names of parameters that train in full beside the adapter, relative to the encoder
        (``norm.*``); they are saved with it, and there is no going back to what they were.
        """

        rank: Annotated[int, Field(ge=1)] = 8
        alpha: Annotated[float, Field(gt=0)] = 16.0
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        dora: bool = False
        targets: tuple[str, ...] = ()
        also: tuple[str, ...] = ()

    config: Config

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)

    def options(self, peft: Any, targets: Mapping[str, str]) -> Any:
        """See `ByPatterns.options`."""
        return peft.LoraConfig(
            r=self.config.rank, lora_alpha=self.config.alpha, lora_dropout=self.config.dropout,
            use_dora=self.config.dora, bias="none", target_modules=any_of(targets.values()),
        )  # fmt: skip

    def targets(self, encoder: Encoder) -> list[str]:
        """See `ByPatterns.targets`."""
        able = self.able(encoder)
        if self.config.targets:
            return matching(self.config.targets, able, "adapter.targets")
        found = [name for name, _ in inside(encoder, is_linear)]
        if not found:
            raise ValueError(
                f"adapter.targets: {type(encoder).__name__} has no linear layers in its layers; say which modules, of "
                f"{', '.join(list(able)[:8]) or 'none'}"
            )
        return found
