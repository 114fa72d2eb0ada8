"""An adapter as peft's own ``adapter_config.json`` describes it, put in by peft."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from torch import Tensor, nn

from mmrep.config import config
from mmrep.encoder import Encoder
from mmrep.finetune._through_peft import PLACE, ThroughPeft, inject
from mmrep.registry import require

_PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT")
_SHARED = {"task_type", "peft_type", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
           "layers_pattern", "rank_pattern", "alpha_pattern"}  # fmt: skip
_FIELDS = {
    "LORA": {"r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "init_lora_weights", "use_dora",
             "lora_bias", "trainable_token_indices"},
    "IA3": {"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"},
    "LOHA": {"r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"},
    "LOKR": {"r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights", "decompose_both",
             "decompose_factor", "rank_dropout_scale"},
}  # fmt: skip
"""Kinds that are read, and what may be said of them beside `_SHARED`: none names code or another file."""
_ELSEWHERE = {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "runtime_config",
              "megatron_core"}  # fmt: skip
"""What says nothing about the weights; ``auto_mapping`` and ``megatron_core`` name code, which is never imported."""
_CHANGES_BASE = re.compile(r"pissa(_niter_\d+)?|olora")
AROUND = "base_model.model."
"""What the names in ``adapter_model.safetensors`` begin with."""
_BEGINNINGS = ("gaussian", "orthogonal", "eva")


@config
class PeftConfigFields:
    """Fields of a ``peft`` adapter; `mmrep.load` of a folder of peft's writes them.

    options: what ``adapter_config.json`` says, but for the base and what is peft's default. places: modules of the
    encoder by the names that they have in the library's model, which the options' patterns speak of; ``""`` is all of
    it.
    """

    options: dict[str, Any]
    places: dict[str, str] = field(default_factory=lambda: {"": "model"})


class PeftConfig(ThroughPeft):
    """What peft puts in: LoRA and DoRA with all that they have there, (IA)^3, LoHa, LoKr; and modules that train whole.

    Names, ranks by pattern, layers and biases are peft's affair: the encoder's network is given to it under the names
    that the library has.
    """

    Config = PeftConfigFields
    config: PeftConfigFields

    def apply(self, encoder: Encoder) -> None:
        """See `Adapter.apply`.

        Raises:
            MissingPackageError: peft is not installed.
            ValueError: peft cannot build it, or in no layer of the encoder.
        """
        peft: Any = require("peft", "lora")
        holder = seen(encoder, self.config.places)
        try:
            inject(peft, self.options(peft, holder), holder)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"adapter.options: peft cannot put it into {type(encoder).__name__}: {error}") from error
        self._put_back(encoder, holder)

    def options(self, peft: Any, holder: nn.Module) -> Any:
        """Peft's config, without modules that train whole and are not there, as those of a head: peft asks for each."""
        options = dict(self.config.options)
        if whole := options.get("modules_to_save"):
            names = [name for name, _ in holder.named_modules()]
            options["modules_to_save"] = [one for one in whole if any(name.endswith(one) for name in names)] or None
        return built(peft, options)

    def fill(self, encoder: Encoder, state: Mapping[str, Tensor]) -> None:
        """Give an encoder that has the adapter the values of ``adapter_model.safetensors``.

        Args:
            encoder: see above.
            state: by peft's names without ``base_model.model.``; all of them have a place here.

        Raises:
            ValueError: values are missing, are too many, or have other shapes.
        """
        peft: Any = require("peft", "lora")
        holder = seen(encoder, self.config.places)
        options = self.options(peft, holder)
        wanted = set(values(peft, holder, options))
        # Of an embedding that is adapted peft writes the table, too, which is the base's own.
        given = {key: value for key, value in state.items() if key in wanted}
        absent = sorted(wanted - set(given))
        extra = sorted(key for key in set(state) - wanted if ".base_layer." not in key)
        if absent or extra:
            said = [
                f"{label} {', '.join(keys[:3])}" for label, keys in (("missing", absent), ("too many", extra)) if keys
            ]
            raise ValueError(f"the adapter's values do not fit its options: {'; '.join(said)}")
        vars(holder)["peft_config"] = {PLACE: options}
        try:
            peft.set_peft_model_state_dict(holder, given, PLACE)
        except RuntimeError as error:
            raise ValueError(f"the adapter's values do not fit: {error}") from error
        finally:
            del vars(holder)["peft_config"]

    def _put_back(self, encoder: Encoder, holder: nn.Module) -> None:
        """What peft has replaced at a place itself; and nothing of peft stays on a network of the library."""
        for name, place in self.config.places.items():
            if name and encoder.get_submodule(place) is not holder.get_submodule(name):
                encoder.set_submodule(place, holder.get_submodule(name))
        holder.__dict__.pop("peft_config", None)


def seen(encoder: Encoder, places: Mapping[str, str]) -> nn.Module:
    """Parts of an encoder under other names: itself the part that is called ``""``, or a module that holds them."""
    if "" in places:
        return encoder.get_submodule(places[""])
    holder = nn.Module()
    for name, place in places.items():
        *around, last = name.split(".")
        inner = holder
        for part in around:
            if not hasattr(inner, part):
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.add_module(last, encoder.get_submodule(place))
    return holder


def values(peft: Any, holder: nn.Module, options: Any) -> dict[str, Tensor]:
    """What peft has put into a module, by its names; without the table of an adapted embedding, which is the base's.

    Args:
        peft: the library.
        holder: see `seen`.
        options: peft's config.
    """
    vars(holder)["peft_config"] = {PLACE: options}
    try:
        return peft.get_peft_model_state_dict(holder, adapter_name=PLACE, save_embedding_layers=False)
    finally:
        del vars(holder)["peft_config"]


def read_options(document: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an ``adapter_config.json``.

    Raises:
        ValueError: a kind, or something said of it, that is not read; the message says which and why.
    """
    kind = str(document.get("peft_type", ""))
    if kind in _PROMPTS:
        raise ValueError(
            f"it is of type {kind}: learned vectors in front of the input or of every layer, no weights in the "
            "network, so that its other inputs (masks, positions, pooling) would change with it. LoRA and its like "
            f"({', '.join(_FIELDS)}) are read; here such prompts are learned by the encoder prompt-tuned-text"
        )
    if kind not in _FIELDS:
        raise ValueError(f"it is of type {kind!r}; read are {', '.join(_FIELDS)}. Where the library has "
                         "merge_and_unload for it, merge it there and load the folder of the whole")  # fmt: skip
    peft: Any = require("peft", "lora")
    usual = _plain(peft.get_peft_config({"peft_type": kind}).to_dict())
    found = {
        k: v for k, v in _plain(document).items() if k not in _ELSEWHERE and v != usual.get(k) and k != "peft_type"
    }
    found = {k: v for k, v in found.items() if not _is_nothing(v) or usual.get(k)}
    if unknown := sorted(set(found) - _SHARED - _FIELDS[kind]):
        raise ValueError(f"it says {', '.join(f'{k}: {found[k]!r}' for k in unknown[:3])}, which is not read")
    begin = found.get("init_lora_weights", True)
    if isinstance(begin, str) and not _CHANGES_BASE.fullmatch(begin):
        if begin not in _BEGINNINGS:
            raise ValueError(f"it says init_lora_weights: {begin!r}, which begins from other weights than the base's; "
                             "save it with peft's path_initial_model_for_weight_conversion, or merged")  # fmt: skip
        del found["init_lora_weights"]  # all values are read from the file
    return {"peft_type": kind, **found}


def built(peft: Any, options: Mapping[str, Any]) -> Any:
    """Peft's config of options, for training."""
    return peft.get_peft_config({**read_options(options), "inference_mode": False})


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])  # layer 0 is something


def _plain(value: Any) -> Any:
    """Of JSON: no sets, no tuples, enumerations by their value."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, set):
        return sorted(_plain(inner) for inner in value)
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return getattr(value, "value", value)


def strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of a file by the names of the model that it is for."""
    return {key.removeprefix(AROUND): value for key, value in state.items()}
