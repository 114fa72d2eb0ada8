"""A text tower as a folder of sentence-transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from mmrep.hub.exports.export import Export, refuse
from mmrep.registry import require
from mmrep.tower import Tower

_POOLS = {"mean": "mean", "cls": "cls", "last": "lasttoken", "max": "max", "weighted-mean": "weightedmean"}
_ALONE = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel"}
"""Of encoder-decoders by model type: the class that the library builds, which has the encoder alone."""
_ACTIVATIONS = {"none": torch.nn.Identity, "tanh": torch.nn.Tanh, "gelu": torch.nn.GELU, "relu": torch.nn.ReLU}


class SentenceTransformers(Export):
    """Transformer, Pooling, Dense for a linear projector, Normalize; prompts and length come along.

    The tower's encoder is an ``hf-text`` without a projection of its own, its pool one that the library has, its
    projector the identity or one linear map.
    """

    def write(self, folder: Path) -> None:
        """See `Export.write`."""
        tower = self.one_tower("a sentence-transformers model")
        refuse(tower, "sentence-transformers", _problems(tower))
        library: Any = require("sentence_transformers", "quantize")
        modules: Any = require("sentence_transformers.sentence_transformer.modules", "quantize")
        encoder: Any = tower.encoder
        with tempfile.TemporaryDirectory() as scratch:
            _network(encoder).save_pretrained(scratch)
            encoder.tokenizer.save_pretrained(scratch)
            parts = [modules.Transformer(scratch, max_seq_length=encoder.max_length)]
        pool = _POOLS[tower.config.pool.type]
        config = encoder.config
        parts.append(modules.Pooling(encoder.width, pool, include_prompt=config.prompt_pooled))
        if tower.config.projector.type != "identity":
            parts.append(_dense(tower, modules.Dense))
        if tower.normalize:
            parts.append(modules.Normalize())
        prompts = dict(config.prompts)
        default = (
            next((name for name, text in prompts.items() if text == config.prompt), None) if config.prompt else None
        )
        if config.prompt and default is None:
            prompts["default"], default = config.prompt, "default"
        made = library.SentenceTransformer(
            modules=parts, prompts=prompts, default_prompt_name=default, device="cpu", similarity_fn_name="cosine"
        )
        made.save_pretrained(str(folder))


def _problems(tower: Tower) -> list[str]:
    problems: list[str] = []
    model: Any = getattr(tower.encoder, "model", None)
    if tower.config.encoder.type != "hf-text":
        problems.append("its encoder is no transformer of the Hugging Face library (hf-text)")
    elif not hasattr(model, "save_pretrained") or getattr(tower.encoder, "_projection", None) is not None:
        problems.append("its encoder is a part of a joint model, with a projection")
    elif _halved(model) and model.config.model_type not in _ALONE:
        problems.append(f"its encoder is half of a {model.config.model_type!r} model, which the library builds whole")
    if tower.config.pool.type not in _POOLS:
        problems.append(f"it has no pooling {tower.config.pool.type!r} (it has {', '.join(_POOLS)})")
    elif tower.config.pool.type == "mean" and not tower.config.pool.config.special:
        problems.append("its mean counts special tokens (pool.special: true)")
    projector = tower.config.projector
    if projector.type not in ("identity", "linear", "dense") or getattr(projector.config, "standardize", False):
        problems.append(f"its projector {projector.type!r} is more than one linear map")
    return problems


def _halved(model: Any) -> bool:
    """Whether it is the encoder of an encoder-decoder, taken out of the whole."""
    return type(model).__name__ not in (model.config.architectures or [type(model).__name__])


def _network(encoder: Any) -> Any:
    """The encoder's model, as the class that the library builds from its config."""
    import transformers

    model = encoder.model
    if not _halved(model):
        return model
    whole: Any = getattr(transformers, _ALONE[model.config.model_type])(model.config)
    whole.encoder.load_state_dict(model.state_dict())
    whole.shared.load_state_dict(model.get_input_embeddings().state_dict())
    return whole


@torch.no_grad()
def _dense(tower: Tower, cls: Any) -> Any:
    linear: Any = tower.projector.map
    activation = getattr(tower.config.projector.config, "activation", "none")
    dense = cls(
        linear.in_features, linear.out_features, bias=linear.bias is not None,
        activation_function=_ACTIVATIONS[activation](),
    )  # fmt: skip
    dense.linear.load_state_dict(linear.state_dict())
    return dense
