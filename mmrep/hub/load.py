"""`mmrep.load`: one name for a model, whoever made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmrep.config import ConfigError, parse
from mmrep.hub import folder
from mmrep.hub.bridges._peft_places import is_adapter
from mmrep.hub.bridges.bridge import Bridge
from mmrep.hub.bridges.transformers import located
from mmrep.hub.fetch import ModelFolderError, fetch
from mmrep.hub.remote_code import asked, permitted
from mmrep.model import Model, ModelConfig
from mmrep.registry import bridges, near


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    check_fingerprint: bool = True,
    pool: str | None = None,
    trust_remote_code: bool = False,
    base: str | None = None,
    **hub: Any,
) -> Model:
    """Load a model: one of ours, or a checkpoint of another library as one of ours.

    Args:
        name: a folder, or a hub id ``organisation/name``, of a model of ours or of transformers,
            sentence-transformers, open_clip or timm, or an adapter of peft for one of transformers; or
            ``scheme:name``, where the scheme is the library: ``hf:organisation/name``,
            ``open_clip:ViT-B-32/laion2b_s34b_b79k``, ``timm:resnet50.a1_in1k``.
        device: where to put the model; None = CPU.
        check_fingerprint: refuse a model of ours whose embeddings are not those it was saved with.
        pool: for checkpoints of others, a pool instead of their own, such as ``"mean"`` or ``"cls"``.
        trust_remote_code: run Python code that comes with the checkpoint, as transformers does under that name; for
            models of text. A model that was saved from one needs it again. Read the code first.
        base: of an adapter of peft, the model that it is put into, by any name; None = the one that it names.
        **hub: huggingface_hub's own: ``revision, token, cache_dir, force_download, local_files_only``.

    Raises:
        ModelFolderError: no such model, damaged, or only pickles.
    """
    with asked(trust_remote_code):
        found = bridge(name, pool=pool, base=base, **hub)
        if found is None and pool is not None:
            raise ModelFolderError(f"pool={pool!r}: {str(name)!r} is a model of ours, which has its own")
        try:
            if found is None:
                return folder.load(name, device=device, check_fingerprint=check_fingerprint, **hub)
            model = build(found)
        except ConfigError as error:  # a tower cannot be built: something is missing in its folder, say
            raise ModelFolderError(f"{str(name)!r}: {error}") from error
    return model if device is None else model.to(device)


def bridge(name: str | Path, *, pool: str | None = None, base: str | None = None, **hub: Any) -> Bridge | None:
    """The bridge to a checkpoint of another library; None for a model of ours.

    Raises:
        ModelFolderError: an unknown scheme, or no such checkpoint.
    """
    scheme, colon, rest = str(name).partition(":")
    if colon and len(scheme) > 1 and not Path(name).exists():
        if scheme not in bridges.names():
            known = bridges.names()
            raise ModelFolderError(
                f"{str(name)!r}: no bridge {scheme!r}{near(scheme, known)} There are {', '.join(known)}"
            )
        if scheme == "hf" and is_adapter(_place(rest, **hub)):
            scheme = "peft"
        return bridges.get(scheme)(rest, pool=pool, **_base(name, scheme, base), **hub)
    place = folder.locate(name, **hub)
    kind = _written_by(place)
    options = _base(name, kind, base)
    if kind is None:
        return None
    # Of open_clip, what has a slash and no scheme is a model and its tag.
    told = "hf-hub:" if kind == "open_clip" and not Path(name).expanduser().is_dir() else ""
    return bridges.get(kind)(f"{told}{name}", pool=pool, **options, **hub)


def build(found: Bridge) -> Model:
    """The model on the other side of a bridge, in eval mode; its config says the checkpoint's public name."""
    model = Model(parse(ModelConfig, found.config()))
    found.fill(model)
    model.config = parse(ModelConfig, found.named())
    for name, tower in model.config.towers.items():
        model.tower(name).config = tower
    return model.eval()


def _written_by(place: Path) -> str | None:
    """The scheme of the library that wrote a folder; None = ours, or nobody's that we know."""
    if is_adapter(place):
        return "peft"
    if (place / "open_clip_config.json").is_file():
        return "open_clip"
    if (place / "modules.json").is_file():
        return "hf"
    path = place / "config.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "model_type" in document:
        return "hf"
    return "timm" if "architecture" in document and "format" not in document else None


def _place(name: str, **hub: Any) -> Path:
    """The folder of what stands after ``hf:``."""
    path = Path(located(name) if name.startswith("package:") else name).expanduser()
    return path if path.is_dir() else fetch(name, code=permitted(), **hub).folder


def _base(name: str | Path, kind: str | None, base: str | None) -> dict[str, Any]:
    if base is not None and kind != "peft":
        raise ModelFolderError(f"base={base!r}: {str(name)!r} is no adapter of peft, and stands on nothing else")
    return {"base": base} if kind == "peft" else {}
