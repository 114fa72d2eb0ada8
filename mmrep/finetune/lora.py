"""Low-rank adapters, through the peft library (github.com/huggingface/peft)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.encoder import Encoder
from mmrep.finetune.adapter import Adapter, matching
from mmrep.registry import require

_PLACE = "default"  # peft keeps several adapters by name; here a layer has one


class LoRA(Adapter):
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
        embeddings among what they match are adapted. None given: every linear layer of the encoder's layers, those
        alone excepted that an `nn.MultiheadAttention` holds, which reads their weights without calling them. also:
        patterns of the names of parameters that train in full beside the adapter, relative to the encoder
        (``norm.*``); they are saved with it, and there is no going back to what they were.
        """

        rank: Annotated[int, Field(ge=1)] = 8
        alpha: Annotated[float, Field(gt=0)] = 16.0
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
        dora: bool = False
        targets: tuple[str, ...] = ()
        also: tuple[str, ...] = ()

    config: Config

    def apply(self, encoder: Encoder) -> None:
        """See `Adapter.apply`.

        Raises:
            MissingPackageError: peft is not installed.
        """
        peft: Any = require("peft", "lora")
        own, targets = dict(encoder.named_parameters()), self._targets(encoder)
        adapted = {id(p) for name in targets for p in encoder.get_submodule(name).parameters()}
        also = matching(self.config.also, own, "adapter.also")
        if twice := [name for name in also if id(own[name]) in adapted]:
            raise ValueError(f"adapter.also: {twice[0]!r} has an adapter already; leave it out of one of the two")
        # A holder, since peft looks for a transformers config in what it is given, and leaves its own there.
        holder = nn.Module()
        holder.encoder = encoder
        options = peft.LoraConfig(
            r=self.config.rank, lora_alpha=self.config.alpha, lora_dropout=self.config.dropout,
            use_dora=self.config.dora, bias="none",
            target_modules="|".join(re.escape(f"encoder.{name}") for name in targets),
        )  # fmt: skip
        with warnings.catch_warnings():  # that the weights of GPT-2's layers are transposed
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            with torch.random.fork_rng(devices=[]):  # what is built after it is built as without it
                peft.inject_adapter_in_model(options, holder, adapter_name=_PLACE)
        for name in also:
            own[name].requires_grad_(True)

    def base_names(self, encoder: Encoder) -> dict[str, str]:
        """See `Adapter.base_names`."""
        return {name: name.replace(".base_layer.", ".") for name in encoder.state_dict() if ".lora_" not in name}

    @torch.no_grad()
    def settle(self, encoder: Encoder) -> None:
        """Norms of DoRA are again those of the weights."""
        for _, layer in _layers(encoder):
            for vector in layer.lora_magnitude_vector.values():
                weight: Tensor = _weight(layer)
                norm = vector.get_weight_norm(weight, torch.zeros_like(weight), 1.0)
                vector.weight.copy_(norm.reshape(vector.weight.shape))

    def merge(self, encoder: Encoder) -> None:
        """See `Adapter.merge`."""
        for name, layer in list(_layers(encoder)):
            layer.merge(safe_merge=True)
            encoder.set_submodule(name, layer.get_base_layer())

    def _targets(self, encoder: Encoder) -> list[str]:
        able = {name: part for name, part in encoder.named_modules() if _can(part)}
        if self.config.targets:
            return matching(self.config.targets, able, "adapter.targets")
        inside = {id(part) for block in encoder.layer_modules() for part in block.modules()}
        uncalled = {id(p) for m in encoder.modules() if isinstance(m, nn.MultiheadAttention) for p in m.modules()}
        found = [n for n, part in able.items() if _is_linear(part) and id(part) in inside and id(part) not in uncalled]
        if not found:
            raise ValueError(
                f"adapter.targets: {type(encoder).__name__} has no linear layers in its layers; say which modules, of "
                f"{', '.join(list(able)[:8]) or 'none'}"
            )
        return found


def _is_linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"  # GPT-2's linear layer in transformers


def _can(part: nn.Module) -> bool:
    return _is_linear(part) or isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding))


def _layers(encoder: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, part) for name, part in encoder.named_modules() if isinstance(part, cast(type, LoraLayer)))


def _weight(layer: Any) -> Tensor:
    """Of the layer itself, outputs first."""
    weight = layer.get_base_layer().weight
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight
