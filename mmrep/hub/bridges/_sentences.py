"""What a sentence-transformers folder says beside its transformer: pooling, dense layer, normalisation, prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrep.hub.bridges.bridge import Values, fill_linear
from mmrep.hub.fetch import ModelFolderError
from mmrep.model import Model

_POOLS = {"mean": "mean", "cls": "cls", "lasttoken": "last", "max": "max", "weightedmean": "weighted-mean"}
_OLD = {
    "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
"""Before version 6, one switch for each kind of pooling."""
_ENDS = ([], ["Dense"], ["Normalize"], ["Dense", "Normalize"])
_ACTIVATIONS = {"Identity": "none", "Tanh": "tanh", "GELU": "gelu", "ReLU": "relu"}


@dataclass(frozen=True)
class Modules:
    """A folder of sentence-transformers: a transformer, a pooling, perhaps dense layers and a normalisation.

    Attributes:
        folder: of the whole.
        path: of the transformer, within the folder.
        pool: what our pool is called.
        width: of the transformer's output.
        dense: the config of the dense layer, with its folder as ``folder``; None = there is none.
        normalize: vectors are of unit length.
        text: fields of the encoder: prompts, length.
    """

    folder: Path
    path: str
    pool: str
    width: int
    dense: dict[str, Any] | None
    normalize: bool
    text: dict[str, Any] = field(default_factory=dict[str, Any])

    def config(self, where: dict[str, Any], pool: str | None) -> dict[str, Any]:
        """The ``model`` part of a recipe."""
        projector: Any = "identity"
        if self.dense is not None:
            activation = _ACTIVATIONS[_last(self.dense["activation_function"])]
            projector = {"type": "dense", "bias": self.dense["bias"], "activation": activation}
        encoder = {"type": "hf-text", **where, **self.text}
        tower = {"encoder": encoder, "pool": pool or self.pool, "projector": projector}
        dim = self.width if self.dense is None else self.dense["out_features"]
        return {"dim": dim, "towers": {"text": tower}, "normalize": self.normalize, "temperatures": {}}

    def fill(self, model: Model) -> None:
        """Give the projector the dense layer's values."""
        if self.dense is not None:
            projector: Any = model.tower("text").projector
            fill_linear(projector.map, Values(self.dense["folder"]), "linear")


def modules(folder: Path) -> Modules | None:
    """Read a folder; None if sentence-transformers did not write it.

    Raises:
        ModelFolderError: it has a part that we have no counterpart of.
    """
    listed = _read(folder / "modules.json")
    if listed is None:
        return None
    kinds = [_last(entry["type"]) for entry in listed]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in _ENDS:
        raise ModelFolderError(
            f"{str(folder)!r} is a sentence-transformers model of the parts {', '.join(kinds)}; what is read here is a "
            "Transformer, a Pooling, and perhaps a Dense and a Normalize"
        )
    paths = [str(entry["path"]) for entry in listed]
    pooling = _read(folder / paths[1] / "config.json") or {}
    dense = None
    if "Dense" in kinds:
        place = folder / paths[kinds.index("Dense")]
        dense = {"bias": True, **(_read(place / "config.json") or {}), "folder": place}
        if _last(dense["activation_function"]) not in _ACTIVATIONS:
            raise ModelFolderError(
                f"{str(folder)!r}: the activation {dense['activation_function']!r} of its Dense is none of "
                f"{', '.join(_ACTIVATIONS)}"
            )
    width = pooling.get("embedding_dimension", pooling.get("word_embedding_dimension"))
    return Modules(
        folder, paths[0], _pool(folder, pooling), int(width or 0), dense, "Normalize" in kinds,
        _text(folder, folder / paths[0], pooling),
    )  # fmt: skip


def _pool(folder: Path, pooling: dict[str, Any]) -> str:
    named = pooling.get("pooling_mode") or [mode for key, mode in _OLD.items() if pooling.get(key)]
    chosen = [named] if isinstance(named, str) else list(named)
    if len(chosen) != 1 or chosen[0] not in _POOLS:
        raise ModelFolderError(
            f"{str(folder)!r} pools by {' and '.join(map(str, chosen)) or 'nothing'}; what is read here is one of "
            f"{', '.join(_POOLS)}"
        )
    return _POOLS[chosen[0]]


def _text(folder: Path, transformer: Path, pooling: dict[str, Any]) -> dict[str, Any]:
    """Length and prompts."""
    own = _read(transformer / "sentence_bert_config.json") or {}
    said = _read(folder / "config_sentence_transformers.json") or {}
    fields: dict[str, Any] = {}
    if own.get("do_lower_case"):
        raise ModelFolderError(f"{str(folder)!r} lowers the case of texts outside of its tokenizer, which we do not")
    if own.get("max_seq_length"):
        fields["max_length"] = own["max_seq_length"]
    prompts = {name: text for name, text in (said.get("prompts") or {}).items() if text}
    if prompts:
        fields["prompts"] = prompts
    default = said.get("default_prompt_name")
    if default and prompts.get(default):
        fields["prompt"] = prompts[default]
    if pooling.get("include_prompt") is False:
        fields["prompt_pooled"] = False
    return fields


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _last(dotted: str) -> str:
    return str(dotted).rsplit(".", 1)[-1]
