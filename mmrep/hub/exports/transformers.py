"""Towers of transformers' own networks as a folder of transformers, with tokenizer and processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmrep.hub.bridges._families import JOINT
from mmrep.hub.exports.export import Export, ExportError, refuse
from mmrep.tower import Tower

_KINDS = ("hf-text", "hf-image", "hf-audio", "hf-video", "hf-series")
_HEADS = {"image": "visual_projection", "text": "text_projection"}


class HuggingFace(Export):
    """One tower as what ``AutoModel`` loads, or both towers of a joint model (CLIP, MetaCLIP 2, SigLIP) as one.

    The library's own pooling is not a part of such a folder, so any pool will do; a projector is one that it cannot
    hold. What is written is in float32 safetensors.
    """

    def write(self, folder: Path) -> None:
        """See `Export.write`."""
        if self.only is None and len(self.model.config.towers) > 1:
            self._joint(folder)
            return
        tower = self.one_tower("a model that AutoModel loads")
        problems = _problems(tower)
        network: Any = None if problems else _network(tower)
        state: dict[str, torch.Tensor] = {}
        if network is None and not problems:
            problems.append(_larger(tower))
        elif network is not None:
            state, lacks = _completed(network)
            if lacks:
                problems.append(f"{_larger(tower)}: it has no values for {', '.join(lacks[:3])}")
        refuse(tower, "transformers", problems)
        assert network is not None, "it was refused"
        network.save_pretrained(folder, state_dict=state)
        tower.encoder.save_files(folder)
        network.config.save_pretrained(folder)

    @torch.no_grad()
    def _joint(self, folder: Path) -> None:
        towers = {name: self.model.tower(name) for name in self.model.config.towers}
        for tower in towers.values():
            refuse(tower, "transformers", _problems(tower))
        kinds = {name: _parent(tower) for name, tower in towers.items()}
        kind = next(iter(kinds.values()))
        if set(kinds.values()) != {kind} or kind not in _BUILDABLE or set(towers) != set(JOINT[kind].towers):
            said = ", ".join(f"{name}: {found or 'no part of a joint model'}" for name, found in kinds.items())
            alone = "" if all(kinds.values()) else " A tower that is no part of one is written alone, with tower="
            raise ExportError(
                f"these towers cannot be written as one joint model ({said}); both towers of one of "
                f"{', '.join(_BUILDABLE)} can.{alone}"
            )
        image: Any = towers["image"].encoder
        text: Any = towers["text"].encoder
        made = _built(kind, image, text, self.model.dim)
        _copy(made, kind, image, text)
        temperature = self.model.temperature("default") if "default" in self.model.temperatures else None
        if temperature is not None:
            made.logit_scale.copy_(temperature.log_scale.reshape(made.logit_scale.shape))
            if temperature.bias is not None and hasattr(made, "logit_bias"):
                made.logit_bias.copy_(temperature.bias.reshape(made.logit_bias.shape))
        image.save_files(folder)
        text.tokenizer.save_pretrained(folder)
        made.save_pretrained(folder)  # its config last: the parts' must not stay


_IDLE = ("mask_token", "masked_spec_embed")
"""Ends of names of what pretraining alone reads, and encoders here take off: zeros are written for it."""
_BUILDABLE = {"clip": "CLIP", "metaclip_2": "MetaClip2", "siglip": "Siglip"}


def _problems(tower: Tower) -> list[str]:
    problems: list[str] = []
    if tower.config.encoder.type not in _KINDS:
        problems.append(f"its network is not one of transformers ({', '.join(_KINDS)})")
    if tower.config.projector.type != "identity":
        problems.append(f"a folder of transformers has no place for the projector {tower.config.projector.type!r}")
    return problems


def _network(tower: Tower) -> Any:
    """The library's model that a folder can hold alone, None if it is a part of one."""
    encoder: Any = tower.encoder
    model: Any = getattr(encoder, "model", None)
    model = getattr(encoder.trunk, "model", None) if model is None else model
    if not hasattr(model, "save_pretrained") or getattr(model.config, "is_encoder_decoder", False) or _parent(tower):
        return None
    return model if type(model).__name__ in (model.config.architectures or []) else None


def _completed(network: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """All that its class has values for, and the names of what has none here (a pooling layer need not have any)."""
    with torch.device("meta"):
        wanted = type(network)(network.config).state_dict()
    state = network.state_dict()
    lacks = [name for name in wanted if name not in state and not name.startswith("pooler.")]
    idle = {name: torch.zeros(wanted[name].shape) for name in lacks if name.endswith(_IDLE)}
    return {**state, **idle}, [name for name in lacks if name not in idle]


def _larger(tower: Tower) -> str:
    parent = _parent(tower)
    return f"its network is a part of a larger one ({'an encoder of two halves' if parent is None else parent})"


def _parent(tower: Tower) -> str | None:
    """The joint model that the tower's network is a part of."""
    config: Any = getattr(tower.encoder, "hf_config", None)
    kind = str(getattr(config, "model_type", ""))
    if kind in JOINT:
        return kind
    for end in ("_text_model", "_vision_model", "_audio_model"):
        if kind.endswith(end):
            return kind.removesuffix(end)
    if tower.config.encoder.type == "hf-text" and not hasattr(getattr(tower.encoder, "model", None), "save_pretrained"):
        return str(config.architectures[0])  # PE's text, whose model type is its network's alone
    return None


def _built(kind: str, image: Any, text: Any, dim: int) -> Any:
    """The joint model with random values."""
    import transformers

    parts = {"text_config": text.hf_config.to_dict(), "vision_config": image.hf_config.to_dict()}
    if kind != "siglip":
        parts["projection_dim"] = dim
    config = getattr(transformers, f"{_BUILDABLE[kind]}Config")(**parts)
    return getattr(transformers, f"{_BUILDABLE[kind]}Model")(config).float().eval()


def _copy(made: Any, kind: str, image: Any, text: Any) -> None:
    """The towers' values into the joint model, every one of them."""
    inner = getattr(text.model, "text_model", text.model)
    _fill(made.text_model, inner.state_dict(), "text")
    _fill(made.vision_model, image.trunk.model.state_dict(), "image")
    if kind != "siglip":
        made.text_projection.load_state_dict(text.model.text_projection.state_dict())
        made.visual_projection.load_state_dict(image.trunk.projection.state_dict())


def _fill(module: Any, state: dict[str, torch.Tensor], name: str) -> None:
    wanted = dict(module.named_parameters())
    absent = sorted(set(wanted) - set(state))
    if absent:
        raise ExportError(f"tower {name} has no values for {', '.join(absent[:3])}")
    module.load_state_dict(state, strict=False)
