"""(IA)^3, learned scales of inner activations, through the peft library (github.com/huggingface/peft)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from mmrep.config import config
from mmrep.encoder import Encoder
from mmrep.finetune._through_peft import ByPatterns, any_of, inside, is_linear, layers
from mmrep.finetune.adapter import matching

_KEYS_AND_VALUES = frozenset({
    "k", "v", "kv", "key", "value", "k_proj", "v_proj", "k_lin", "v_lin", "to_k", "to_v",
    "qkv", "query_key_value", "c_attn", "in_proj", "Wqkv", "qkv_proj",
})  # fmt: skip
"""What layers of keys and values are called; queries beside them are scaled, too, which adds nothing to the keys'."""


class IA3(ByPatterns):
    """(IA)^3 (Liu et al. 2022, arXiv:2205.05638): learned vectors scale keys, values and what is inside a feed-forward.

    A scaled layer gives ``l * (W x + b)``, a feed-forward's second layer reads ``l * x`` (section 3.3). Every l begins
    as ones, so that a tower begins as exactly what it was without, and none decays: decay would draw it to zero.

    The encoder's own weights rest, as with `LoRA`.
    """

    @config
    class Config:
        """Fields of an ``ia3`` adapter; patterns of names are relative to the encoder, ``*`` matches any part.

        targets: layers whose output is scaled. None given: those of keys and values in the encoder's layers, known by
        name (``key``, ``v_proj``, ``qkv`` …). feedforward: layers whose input is scaled. None given: linear layers of
        the encoder's layers that give less than they read, as the second of a feed-forward does. also: as of `LoRA`.
        """

        targets: tuple[str, ...] = ()
        feedforward: tuple[str, ...] | None = None
        also: tuple[str, ...] = ()

    config: Config
    kinds = (nn.Conv2d, nn.Conv3d)
    _second: frozenset[str] = frozenset()

    def options(self, peft: Any, targets: Mapping[str, str]) -> Any:
        """See `ByPatterns.options`."""
        second = [named for name, named in targets.items() if name in self._second]
        return peft.IA3Config(target_modules=any_of(targets.values()), feedforward_modules=any_of(second))

    def targets(self, encoder: Encoder) -> list[str]:
        """See `ByPatterns.targets`: both kinds."""
        able, linear = self.able(encoder), inside(encoder, is_linear)
        if self.config.targets:
            scaled = matching(self.config.targets, able, "adapter.targets")
        else:
            scaled = [name for name, _ in linear if name.rpartition(".")[2] in _KEYS_AND_VALUES]
            if not scaled:
                raise ValueError(
                    f"adapter.targets: no layer of {type(encoder).__name__} is called by a name that keys and values "
                    f"have; say which, of {', '.join([name for name, _ in linear][:8] or list(able)[:8]) or 'none'}"
                )
        if self.config.feedforward is None:
            second = [name for name, part in linear if _narrows(part) and name not in scaled]
        else:
            second = matching(self.config.feedforward, able, "adapter.feedforward")
        if both := [name for name in second if name in scaled]:
            raise ValueError(f"adapter.feedforward: {both[0]!r} is among targets; a layer is scaled on one side alone")
        self._second = frozenset(second)
        return [name for name in able if name in {*scaled, *second}]

    def no_weight_decay(self, encoder: Encoder) -> set[str]:
        """See `Adapter.no_weight_decay`: the vectors, which peft keeps as matrices of one row or column."""
        return {f"{name}.ia3_l.*" for name, _ in layers(encoder)}


def _narrows(part: nn.Module) -> bool:
    rows, columns = cast("tuple[int, int]", tuple(cast(Any, part).weight.shape))
    return (rows < columns) if isinstance(part, nn.Linear) else (columns < rows)
