"""Any timm model by name (github.com/huggingface/pytorch-image-models), with its own preprocessing.

In a recipe::

    encoder: {type: timm, model: vit_small_patch14_dinov2.lvd142m, pretrained: true}
"""

from __future__ import annotations

import sys
from dataclasses import field
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from mmrep.config import config
from mmrep.hub.torch_file import in_order, read_weights
from mmrep.modalities.image._preprocess import Overrides, Preprocess
from mmrep.modalities.image._trunks import TimmTrunk, TrunkEncoder
from mmrep.registry import near

PACKAGE = "package:"
Option = bool | int | float | str | list[int] | None


class TimmEncoder(TrunkEncoder):
    """A timm network without its classifier.

    ``pooled`` is timm's own ``forward_head(…, pre_logits=True)``, of width ``pooled_width``. ViT-like networks drop
    tokens and give layers, others do not: see `TimmTrunk`, and ``supports`` of the instance.
    """

    @config
    class Config(Overrides):
        """Fields of a ``timm`` encoder, beside what it may override of the model's preprocessing.

        model: a name of ``timm.list_models()``, or ``hf-hub:organisation/name``, or ``local-dir:path``. pretrained:
        load its published weights (a download). checkpoint: a ``.safetensors`` file of timm weights to load instead, or
        ``package:name/file``, weights of the same network inside an installed Python package, in safetensors or torch's
        format (of which tensors alone are read), matched by order where they have other names.
        options: more arguments for ``timm.create_model``, such as ``drop_path_rate``. Where ``channels`` is not 3, timm
        repeats the pretrained filters of the first convolution over the channels, scaled (or sums them, for one).
        """

        model: str = "vit_tiny_patch16_224"
        pretrained: bool = False
        checkpoint: str | None = None
        options: dict[str, Option] = field(default_factory=dict[str, Option])

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.pretrained and self.checkpoint:
                raise ValueError("give either pretrained: true or a checkpoint, not both")
            if "patch_drop_rate" in self.options:
                raise ValueError(
                    "options.patch_drop_rate: tokens are dropped by an objective here, not inside the model"
                )
            if "in_chans" in self.options:
                raise ValueError("options.in_chans: say `channels`, which the preprocessing must know too")
            if not (self.checkpoint or "").startswith(PACKAGE):
                check_safetensors(self.checkpoint)

    file = "timm.json"
    # What ViT-like models can do; an instance narrows it to what its model can.
    supports = frozenset({"tokens", "drop_tokens", "layers"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        timm = import_module("timm")  # by name: static checkers take `import timm` in a file timm.py for this file
        if files is not None and (files / self.file).is_file():
            made_of, preprocess = self.read_files(files)
            model = timm.create_model(made_of["architecture"], num_classes=0, **made_of["options"])
        else:
            made_of = _resolve(config)
            model = timm.create_model(config.model, pretrained=config.pretrained, num_classes=0, **made_of["options"])
            preprocess = _preprocess(config, model, made_of["options"])
            if config.checkpoint:
                _load(model, config.checkpoint, made_of)
        trunk = TimmTrunk(model, preprocess.size, channels=preprocess.channels)
        super().__init__(config, files, trunk=trunk, made_of=made_of, preprocess=preprocess)


def check_safetensors(path: str | None) -> None:
    """Refuse weights in any other format than safetensors.

    Raises:
        ValueError: another suffix.
    """
    if path is not None and not path.endswith(".safetensors"):
        raise ValueError(f"checkpoint {path!r} is not a .safetensors file; loading a pickle can run any program")


def _resolve(config: TimmEncoder.Config) -> dict[str, Any]:
    """Architecture and arguments, written out: a hub model's own are not at hand when the saved model is loaded."""
    from timm.models import get_pretrained_cfg, is_model, list_models, load_model_config_from_hf
    from timm.models._hub import load_model_config_from_path

    source, _, place = config.model.rpartition(":")
    if source:
        read = load_model_config_from_path if source == "local-dir" else load_model_config_from_hf
        described, architecture, own = read(place)
    else:
        architecture, own = config.model, None
        if not is_model(architecture.partition(".")[0]):
            names = list_models()
            raise ValueError(f"timm has no model {architecture!r}{near(architecture, names)}; see timm.list_models()")
        found = get_pretrained_cfg(architecture)
        described = {} if found is None else found.to_dict()
    options = {key: value for key, value in {**(own or {}), **config.options}.items() if key != "num_classes"}
    sized = "img_size" in options or options.get("dynamic_img_size")
    if config.size is not None and described.get("fixed_input_size") and not sized:
        options["img_size"] = config.size
    if config.channels != 3:
        options["in_chans"] = config.channels
    return {"architecture": architecture, "options": options}


def _preprocess(config: TimmEncoder.Config, model: Any, options: dict[str, Any]) -> Preprocess:
    from timm.data import resolve_model_data_config

    own = resolve_model_data_config(model)
    told = options.get("img_size") or own["input_size"][1:]
    height, width = (told, told) if isinstance(told, int) else told
    if height != width and config.size is None:
        raise ValueError(f"{config.model} reads pictures of {height} x {width}; set `size` to the side of a square")
    resize = {"center": "crop", "squash": "squash"}.get(own["crop_mode"])
    if resize is None and config.resize is None:
        raise ValueError(
            f"{config.model} was trained with crop mode {own['crop_mode']!r}; set `resize` to crop or squash"
        )
    brought = {"size": height, "resize": resize, "crop_share": own["crop_pct"]}
    return config.over({**brought, **{key: own[key] for key in ("interpolation", "mean", "std")}}, config.model)


def _packaged(path: str, made_of: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file in an installed package, under timm's names."""
    whole = import_module("timm").create_model(made_of["architecture"], **made_of["options"])
    state, like = read_weights(path), whole.state_dict()
    return state if state.keys() & like.keys() else in_order(state, like)


def _load(model: Any, path: str, made_of: dict[str, Any]) -> None:
    from timm.models import adapt_input_conv, load_checkpoint

    packaged = _packaged(path, made_of) if path.startswith(PACKAGE) else None
    if packaged is None and not Path(path).is_file():
        raise ValueError(f"checkpoint: there is no file {path!r}")
    other_names = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # and another image size
    first = model.pretrained_cfg.get("first_conv") or ()

    def convert(state: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
        state = state if other_names is None else other_names(state, network)
        for name in (first,) if isinstance(first, str) else first:
            wanted, found = network.state_dict().get(f"{name}.weight"), state.get(f"{name}.weight")
            if wanted is not None and found is not None and wanted.shape[1] != found.shape[1]:
                state[f"{name}.weight"] = adapt_input_conv(wanted.shape[1], found)
        return state

    try:
        if packaged is None:
            found = load_checkpoint(model, path, strict=False, filter_fn=convert)
        else:
            found = model.load_state_dict(convert(packaged, model), strict=False)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path!r} cannot be loaded: {error}") from error
    classifiers = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{c}." for c in ((classifiers,) if isinstance(classifiers, str) else classifiers))
    unknown = [key for key in found.unexpected_keys if not key.startswith(heads)]
    if found.missing_keys or unknown:
        raise ValueError(f"checkpoint {path!r} does not fit; missing: {found.missing_keys[:5]}, unknown: {unknown[:5]}")
