"""Finding and building the text part of a Hugging Face model. Only safetensors, no remote code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_PARTS = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}
"""Composite model type to the class of its text part."""
FULL_LENGTH = frozenset({"siglip", "siglip2", "siglip_text_model", "siglip2_text_model"})
"""Model types that were trained without an attention mask on texts padded to full length, and read the padding."""


def locate(path: str) -> str:
    """Resolve the ``path`` of a config to a folder or a hub id.

    Args:
        path: a folder; a hub id ``organisation/name``; or ``package:name/folder``, a folder inside an installed
            package, which is looked up without running the package.

    Raises:
        ValueError: there is no such package or folder, or the folder has no safetensors weights.
    """
    if path.startswith("package:"):
        name, _, inside = path.removeprefix("package:").partition("/")
        spec = find_spec(name) if name.isidentifier() else None  # a dotted name would import its parents
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"path {path!r}: no package {name!r} is installed: pip install {name.replace('_', '-')}")
        folder = Path(next(iter(spec.submodule_search_locations))) / inside
        if not folder.is_dir():
            raise ValueError(f"path {path!r}: the package {name!r} has no folder {inside!r}")
    else:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            if path.count("/") > 1 or path.startswith((".", "/", "~")):
                raise ValueError(f"path {path!r}: there is no such folder; give a folder or a hub id organisation/name")
            return path
    _check_folder(folder)
    return str(folder)


def load(
    source: str, *, revision: str | None, local_files_only: bool, projection: bool
) -> tuple[nn.Module, Any, set[str]]:
    """Load a pretrained text model in float32.

    Args:
        source: folder or hub id, from `locate`.
        revision: branch, tag or commit on the hub.
        local_files_only: never touch the network.
        projection: keep a CLIP checkpoint's text projection.

    Returns:
        The model, its config, and the names of parameters that the checkpoint has no values for (pooling layer only).

    Raises:
        ValueError: not a text model, no safetensors, or weights that do not fit the architecture.
    """
    import torch
    import transformers

    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        cls, config = _class(config, projection, source)
        with _quiet():
            model, report = cls.from_pretrained(
                source, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
            )
    except OSError as error:
        raise ValueError(
            f"path {source!r} cannot be loaded as a Hugging Face text model with safetensors weights (pickled weights "
            f"can run any program, so they are never read): {error}"
        ) from error
    missing = {key for key in report["missing_keys"] if not key.startswith("decoder.")}
    bad = sorted(key for key in missing if not key.startswith("pooler."))
    if bad:
        raise ValueError(f"path {source!r}: the checkpoint has no values for {', '.join(bad[:5])}; it does not fit "
                         f"its config.json ({type(model).__name__})")  # fmt: skip
    config = model.config
    config.architectures = [type(model).__name__]
    return _encoder_part(model), config, missing


def rebuild(folder: Path, *, projection: bool) -> tuple[nn.Module, Any]:
    """The architecture that ``folder/config.json`` describes, with random weights (the saved state fills them)."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    cls, config = _class(config, projection, str(folder))
    model: Any = transformers.AutoModel.from_config(config) if cls is transformers.AutoModel else cls(config)
    return _encoder_part(model.float()), config


def without_pooler(model: Any) -> None:
    """Take off a pooling layer that is not asked for: it would get no gradient."""
    if getattr(model, "pooler", None) is not None and "add_pooling_layer" in inspect.signature(type(model)).parameters:
        model.pooler = None


def max_length(model: Any, config: Any, tokenizer: Any) -> int:
    """The most tokens that both the positions and the tokenizer allow."""
    limits = [int(tokenizer.model_max_length)]
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        # RoBERTa's positions begin after the padding id: 514 of them hold 512 tokens.
        limits.append(int(positions) - (0 if padding is None else padding + 1))
    smallest = min(limits)
    return smallest if smallest < 1_000_000 else 512  # "no limit" is a huge number in some tokenizers


def _class(config: Any, projection: bool, source: str) -> tuple[Any, Any]:
    """The transformers class to build, and the config that is its own."""
    import transformers

    projected = (getattr(config, "architectures", None) or [""])[0] != "CLIPTextModel"
    kind = config.model_type
    if kind == "clip":
        config.text_config.projection_dim = config.projection_dim  # the whole model goes by its own value
    if kind in _PARTS:
        config = config.text_config
    kind = kind.removesuffix("_text_model")
    if kind in _PARTS:
        name = "CLIPTextModel" if kind == "clip" and not (projection and projected) else _PARTS[kind]
        return getattr(transformers, name), config
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        raise ValueError(
            f"path {source!r} is a {kind!r} model of several modalities; hf-text knows the text part of "
            f"{', '.join(_PARTS)} only: save the text part as a model of its own and name that"
        )
    return transformers.AutoModel, config


def _encoder_part(model: Any) -> nn.Module:
    """The encoder of an encoder-decoder; anything else as it is."""
    model.config.use_cache = False
    # Not by config.is_encoder_decoder: a saved T5EncoderModel denies it, and AutoModel builds the decoder all the same.
    both = all(isinstance(getattr(model, part, None), nn.Module) for part in ("encoder", "decoder"))
    return model.get_encoder() if both else model


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no table of unused keys from transformers; `load` checks the report itself."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{str(folder)!r} holds no safetensors weights, only {', '.join(pickles[:3])}: reading a pickle can run "
            "any program, so it is refused. Where you trust it, load it with transformers and save_pretrained it again"
        )
    raise ValueError(f"{str(folder)!r} holds no model weights (*.safetensors)")
