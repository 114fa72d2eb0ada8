"""What adapters that the peft library (github.com/huggingface/peft) puts in have in common."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mmrep.encoder import Encoder
from mmrep.finetune._attention import NAMES, CalledAttention
from mmrep.finetune.adapter import Adapter, matching
from mmrep.registry import require

PLACE = "default"  # peft keeps several adapters by name; here a layer has one
_ADDED = (".lora_", ".ia3_l.", ".hada_", ".lokr_", ".modules_to_save.", ".trainable_tokens_")
"""In the names of what peft adds."""
_AROUND = (".base_layer.", ".original_module.", ".token_adapter.")
"""What it puts between the names of a module and of its own weights."""


class ThroughPeft(Adapter):
    """An adapter of peft's: a layer is replaced by one that has it as ``base_layer``, and new weights beside it."""

    def base_names(self, encoder: Encoder) -> dict[str, str]:
        """See `Adapter.base_names`."""
        names = {now: _inside_out(now) for now in encoder.state_dict() if not any(part in now for part in _ADDED)}
        for place, part in encoder.named_modules():
            if isinstance(part, CalledAttention):
                theirs = {f"{place}.{ours}": f"{place}.{name}" for ours, name in NAMES.items()}
                names = {now: theirs.get(own, own) for now, own in names.items()}
        return names

    @torch.no_grad()
    def settle(self, encoder: Encoder) -> None:
        """Norms of DoRA are again those of the weights, and copies that train those of what they are copies of."""
        for _, layer in layers(encoder):
            for vector in getattr(layer, "lora_magnitude_vector", {}).values():
                weight: Tensor = _weight(layer)
                norm = vector.get_weight_norm(weight, torch.zeros_like(weight), 1.0)
                vector.weight.copy_(norm.reshape(vector.weight.shape))
        for _, wrapper in _wrappers(encoder):
            if hasattr(wrapper, "modules_to_save"):
                wrapper.modules_to_save[PLACE].load_state_dict(wrapper.original_module.state_dict())
            else:
                tokens = wrapper.token_adapter
                own, chosen = tokens.get_base_layer().weight, tokens.token_indices[PLACE]
                tokens.trainable_tokens_delta[PLACE].copy_(own[chosen])

    def merge(self, encoder: Encoder) -> None:
        """See `Adapter.merge`."""
        for name, wrapper in list(_wrappers(encoder)):
            whole = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            encoder.set_submodule(name, whole)
        for name, layer in list(layers(encoder)):
            layer.merge(safe_merge=True)
            encoder.set_submodule(name, layer.get_base_layer())
        for name, part in list(encoder.named_modules()):
            if isinstance(part, CalledAttention):
                encoder.set_submodule(name, part.original())


class ByPatterns(ThroughPeft):
    """One whose config says ``targets``, and ``also`` which parameters train in full."""

    kinds: ClassVar[tuple[type[nn.Module], ...]]
    """Beside linear layers, what peft can adapt."""

    def apply(self, encoder: Encoder) -> None:
        """See `Adapter.apply`.

        Raises:
            MissingPackageError: peft is not installed.
        """
        peft: Any = require("peft", "lora")
        for name, part in inside(encoder, CalledAttention.can_replace):
            encoder.set_submodule(name, CalledAttention(cast(nn.MultiheadAttention, part)))
        own = dict(encoder.named_parameters())
        targets = self.targets(encoder)
        adapted = {id(p) for name in targets for p in encoder.get_submodule(name).parameters()}
        also = matching(self.config.also, own, "adapter.also")
        if twice := [name for name in also if id(own[name]) in adapted]:
            raise ValueError(f"adapter.also: {twice[0]!r} has an adapter already; leave it out of one of the two")
        # A holder, since peft looks for a transformers config in what it is given, and leaves its own there.
        holder = nn.Module()
        holder.encoder = encoder
        inject(peft, self.options(peft, {name: f"encoder.{name}" for name in targets}), holder)
        for name in also:
            own[name].requires_grad_(True)

    def options(self, peft: Any, targets: Mapping[str, str]) -> Any:
        """Peft's config.

        Args:
            peft: the library.
            targets: by the names of the layers in the encoder, those that peft finds them by.
        """
        raise NotImplementedError

    def targets(self, encoder: Encoder) -> list[str]:
        """Names of the layers to adapt in an encoder without the adapter.

        Raises:
            ValueError: a pattern matches nothing, or there is no pattern and nothing to adapt by default.
        """
        raise NotImplementedError

    def able(self, encoder: Encoder) -> dict[str, nn.Module]:
        """What can be adapted, by name."""
        return {n: part for n, part in encoder.named_modules() if is_linear(part) or isinstance(part, self.kinds)}


def inject(peft: Any, options: Any, holder: nn.Module) -> None:
    """Let peft put an adapter into ``holder``, whose names its patterns speak of; other weights rest."""
    with warnings.catch_warnings():  # that the weights of GPT-2's layers are transposed
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        with torch.random.fork_rng(devices=[]):  # what is built after it is built as without it
            peft.inject_adapter_in_model(options, holder, adapter_name=PLACE)


def any_of(names: Iterable[str]) -> str:
    """The names as one expression of peft's, which matches in full; in a list a name stands for all that end so."""
    return "|".join(re.escape(name) for name in names)


def inside(encoder: Encoder, wanted: Callable[[nn.Module], bool]) -> list[tuple[str, nn.Module]]:
    """The modules of the encoder's layers that are ``wanted``, but not what an attention holds and does not call."""
    found = {id(part) for block in encoder.layer_modules() for part in block.modules()}
    held = (part for m in encoder.modules() if isinstance(m, nn.MultiheadAttention) for part in list(m.modules())[1:])
    found -= {id(part) for part in held}
    return [(name, part) for name, part in encoder.named_modules() if id(part) in found and wanted(part)]


def is_linear(part: nn.Module) -> bool:
    """Whether it is a linear layer, or GPT-2's in transformers."""
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def layers(encoder: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, part) for name, part in encoder.named_modules() if isinstance(part, BaseTunerLayer))


def _wrappers(encoder: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules that train whole, or some rows of them."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return ((name, part) for name, part in encoder.named_modules() if isinstance(part, AuxiliaryTrainingWrapper))


def _inside_out(name: str) -> str:
    for part in _AROUND:
        name = name.replace(part, ".")
    return name


def _weight(layer: Any) -> Tensor:
    """Of the layer itself, outputs first."""
    weight = layer.get_base_layer().weight
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight
