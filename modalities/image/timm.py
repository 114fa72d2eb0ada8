"""Any timm model by name (github.com/huggingface/pytorch-image-models), with its own preprocessing.

    encoder: {type: timm, model: vit_small_patch14_dinov2.lvd142m, pretrained: true}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from mmrep.config import config, dump, parse
from mmrep.modalities.image._base import ImageEncoder, Preprocess, Triple
from mmrep.modalities.image._trunks import TimmTrunk
from mmrep.registry import near, require
from mmrep.tokens import Encoding, Inputs, Tokens

_FILE = "timm.json"
Option = bool | int | float | str | list[int] | None


class TimmEncoder(ImageEncoder):
    """A timm network without its classifier.

    ``pooled`` is timm's own ``forward_head(…, pre_logits=True)``. ViT-like networks drop tokens and give layers, others
    do not: see `TimmTrunk`, and ``supports`` of the instance.
    """

    @config
    class Config:
        """Fields of a ``timm`` encoder. What is None is the model's own.

        model: a name of ``timm.list_models()``, or ``hf-hub:organisation/name``, or ``local-dir:path``. pretrained:
        load its published weights (a download). checkpoint: a ``.safetensors`` file of timm weights to load instead.
        options: more arguments for ``timm.create_model``, such as ``drop_path_rate``. size, resize, crop_share,
        interpolation, mean, std, background, fast_resize: see `Preprocess`.
        """

        model: str = "vit_tiny_patch16_224"
        pretrained: bool = False
        checkpoint: str | None = None
        options: dict[str, Option] = field(default_factory=dict[str, Option])
        size: Annotated[int, Field(ge=1)] | None = None
        resize: Literal["crop", "squash"] | None = None
        crop_share: Annotated[float, Field(gt=0, le=1)] | None = None
        interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
        mean: Triple | None = None
        std: Triple | None = None
        background: tuple[int, int, int] = (255, 255, 255)
        fast_resize: bool = False

        def __post_init__(self) -> None:
            if self.pretrained and self.checkpoint:
                raise ValueError("give either pretrained: true or a checkpoint, not both")
            if "patch_drop_rate" in self.options:
                raise ValueError("options.patch_drop_rate: tokens are dropped by an objective here, not inside the model")
            _check_suffix(self.checkpoint)

    # What ViT-like models can do; an instance narrows it to what its model can.
    supports = frozenset({"tokens", "drop_tokens", "layers"})

    def __init__(self, config: Config, files: Path | None = None) -> None:
        saved = _read(files)
        model = _build(config) if saved is None else _rebuild(saved)
        if saved is None:
            self_preprocess = _preprocess(config, model)
            arguments = _arguments(config)
        else:
            self_preprocess = parse(Preprocess, saved["preprocess"])
            arguments = {key: saved[key] for key in ("architecture", "options")}
        super().__init__(config, files, preprocess=self_preprocess)
        self._arguments = arguments
        self.trunk = TimmTrunk(model, self.preprocess.size)
        self.width, self.depth, self.pooled_width = self.trunk.width, self.trunk.depth, self.trunk.pooled_width
        self.supports = self.trunk.supports

    def tokenize(self, inputs: Inputs) -> Tokens:
        """``{"pixels": [B, 3, H, W]}`` to tokens; see `TimmTrunk.tokenize`."""
        return self.trunk.tokenize(self.normalize(inputs["pixels"]))

    def encode(self, tokens: Tokens, keep: Tensor | None = None, layers: Sequence[int] = ()) -> Encoding:
        """Tokens to an encoding; see `TimmTrunk.encode`."""
        self.check_request(keep, layers)
        return self.trunk.encode(tokens, keep, layers)

    def save_files(self, folder: Path) -> None:
        """Write what rebuilds network and preprocessing without the hub."""
        document = {**self._arguments, "preprocess": dump(self.preprocess)}
        (folder / _FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    def no_weight_decay(self) -> set[str]:
        """What timm says."""
        return {f"trunk.{name}" for name in self.trunk.no_weight_decay()}


def _build(config: TimmEncoder.Config) -> Any:
    timm = require("timm", "image")
    name = config.model
    if ":" not in name and not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{near(name.split('.')[0], timm.list_models())}; see timm.list_models()")
    options = dict(config.options)
    if config.size is not None and _fixed_size(config):
        options["img_size"] = config.size
    model = timm.create_model(name, pretrained=config.pretrained, num_classes=0, **options)
    if config.checkpoint:
        _load(model, Path(config.checkpoint))
    return model


def _rebuild(saved: dict[str, Any]) -> Any:
    timm = require("timm", "image")
    return timm.create_model(saved["architecture"], pretrained=False, **{**saved["options"], "num_classes": 0})


def _arguments(config: TimmEncoder.Config) -> dict[str, Any]:
    """What `_rebuild` needs: a hub model's own arguments are written out, since the hub may be out of reach then."""
    options: dict[str, Any] = dict(config.options)
    if config.size is not None and _fixed_size(config):
        options["img_size"] = config.size
    source, _, place = config.model.partition(":")
    if not place:
        return {"architecture": config.model, "options": options}
    from timm.models import load_model_config_from_hf, load_model_config_from_path

    read = load_model_config_from_path if source == "local-dir" else load_model_config_from_hf
    _, architecture, own = read(place)
    return {"architecture": architecture, "options": {**(own or {}), **options}}


def _fixed_size(config: TimmEncoder.Config) -> bool:
    """Whether the model is made for one input size, and so must be told of another."""
    if "img_size" in config.options or config.options.get("dynamic_img_size"):
        return False
    if ":" in config.model:
        from timm.models import load_model_config_from_hf, load_model_config_from_path

        source, _, place = config.model.partition(":")
        cfg = (load_model_config_from_path if source == "local-dir" else load_model_config_from_hf)(place)[0]
        return bool(cfg.get("fixed_input_size"))
    from timm.models import get_pretrained_cfg

    found = get_pretrained_cfg(config.model)
    return bool(found is not None and found.fixed_input_size)


def _preprocess(config: TimmEncoder.Config, model: Any) -> Preprocess:
    from timm.data import resolve_model_data_config

    own = resolve_model_data_config(model)
    size = config.size or config.options.get("img_size") or own["input_size"][1]
    if config.size is None and own["input_size"][1] != own["input_size"][2]:
        raise ValueError(f"{config.model} reads pictures of {own['input_size'][1:]}, which are not square; set `size`")
    resize = config.resize or {"center": "crop", "squash": "squash"}.get(own["crop_mode"])
    if resize is None:
        raise ValueError(f"{config.model} was trained with crop mode {own['crop_mode']!r}; set `resize` to crop or squash")
    chosen = {
        "size": size,
        "resize": resize,
        "crop_share": config.crop_share or own["crop_pct"],
        "interpolation": config.interpolation or own["interpolation"],
        "mean": config.mean or own["mean"],
        "std": config.std or own["std"],
        "background": config.background,
        "fast_resize": config.fast_resize,
    }
    return parse(Preprocess, chosen, f"the preprocessing of {config.model}")


def _load(model: Any, path: Path) -> None:
    from timm.models import load_checkpoint

    if not path.is_file():
        raise ValueError(f"checkpoint: there is no file {str(path)!r}")
    found = load_checkpoint(model, str(path), strict=False)
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    unknown = [key for key in found.unexpected_keys if not key.startswith(tuple(f"{head}." for head in heads) or ("\0",))]
    if found.missing_keys or unknown:
        raise ValueError(f"checkpoint {str(path)!r} does not fit; missing: {found.missing_keys[:5]}, unknown: {unknown[:5]}")


def _check_suffix(checkpoint: str | None) -> None:
    if checkpoint is not None and not checkpoint.endswith(".safetensors"):
        raise ValueError(f"checkpoint {checkpoint!r} is not a .safetensors file; pickled weights can run any program")


def _read(files: Path | None) -> dict[str, Any] | None:
    if files is None or not (files / _FILE).is_file():
        return None
    return json.loads((files / _FILE).read_text(encoding="utf-8"))
