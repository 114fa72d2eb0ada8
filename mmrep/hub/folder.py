"""A saved model is a folder: config, weights, tokenizer and preprocessing files, card, fingerprint. No pickle anywhere.

The fingerprint is the embedding of each tower's own example inputs. It is made when the folder is written and made
again when it is read, so that weights, preprocessing, pooling or activation that do not belong together are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmrep.config import ConfigError, dump, parse
from mmrep.hub.fetch import PICKLES, ModelFolderError, fetch
from mmrep.hub.remote_code import permitted

if TYPE_CHECKING:
    from mmrep.model import Model

FORMAT = "mmrep-model"
VERSION = 1
CONFIG, WEIGHTS, FINGERPRINT, FILES = "config.json", "model.safetensors", "fingerprint.json", "files"
_TOLERANCE = (
    2e-3  # of a unit vector's entries; other machines and kernels round differently, other models differ by 0.1
)


def write(model: Model, folder: Path) -> None:
    """Write config, weights, encoder files and fingerprint into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in model.towers:
        target = folder / FILES / name
        target.mkdir(parents=True, exist_ok=True)
        model.tower(name).encoder.save_files(target)
        if not any(target.iterdir()):
            target.rmdir()
    save_file(_unshared(model.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / FINGERPRINT).write_text(json.dumps(fingerprint(model), indent=1))
    document = {"format": FORMAT, "version": VERSION, "model": dump(model.config)}
    (folder / CONFIG).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def load(
    name: str | Path, *, device: str | torch.device | None = None, check_fingerprint: bool = True, **hub: Any
) -> Model:
    """Load a model from a folder or from the Hugging Face hub.

    Args:
        name: a folder, or a hub id ``organisation/name``.
        device: where to put the model; None = CPU.
        check_fingerprint: refuse a model whose embeddings are not those it was saved with.
        **hub: huggingface_hub's own: ``revision, token, cache_dir, force_download, local_files_only``.

    Raises:
        ModelFolderError: not a model of ours, damaged, or only pickles.
    """
    from mmrep.model import Model, ModelConfig

    folder = locate(name, **hub)
    document = read_config(folder)
    try:
        config = parse(ModelConfig, document["model"])
    except ConfigError as error:
        raise ModelFolderError(
            f"{folder / CONFIG} does not describe a model that this version can build:\n{error}"
        ) from error
    model = Model(config, files={tower: folder / FILES / tower for tower in config.towers})
    _load_weights(model, folder)
    model.eval()
    if check_fingerprint:
        _check_fingerprint(model, folder)
    return model if device is None else model.to(device)


@torch.no_grad()
def fingerprint(model: Model) -> dict[str, list[list[float]]]:
    """Per tower, fusion and reduction, the embeddings of two examples of the encoders, rounded to 6 decimals."""
    return {name: _example_embeddings(model, name).round(decimals=6).tolist() for name in _names(model)}


def _names(model: Model) -> list[str]:
    return [*model.towers, *model.fusions, *map(_reduction, model.config.reductions)]


def _reduction(width: int) -> str:
    return f"{width} dimensions"


def _example_embeddings(model: Model, name: str) -> torch.Tensor:
    for width in model.config.reductions:
        if name == _reduction(width):
            with torch.no_grad():
                return model.reduce(_example_embeddings(model, next(iter(model.towers))).to(model.device), width).cpu()
    if name in model.fusions:
        members = {m: _example_embeddings(model, tower) for m, tower in model.config.fusions[name].of.items()}
        was_training = model.fusions.training
        model.fusions.eval()
        with torch.no_grad():
            fused = model.fuse(name, {m: values.to(model.device) for m, values in members.items()}).cpu()
        model.fusions.train(was_training)
        return fused
    examples = model.tower(name).encoder.examples(2, seed=0)
    return torch.as_tensor(model.encode(examples, name, show_progress_bar=False, normalize_embeddings=True))


def locate(name: str | Path, **hub: Any) -> Path:
    """The folder of a saved model: itself, or the local copy of a hub repository (without its pickles).

    Raises:
        ModelFolderError: neither a folder nor a hub id.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if isinstance(name, Path) or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ModelFolderError(
            f"there is no folder {str(name)!r}; give a saved model's folder, or a hub id as organisation/name"
        )
    return fetch(str(name), code=permitted(), **hub).folder


def read_config(folder: Path) -> dict[str, Any]:
    """The document in a saved model's config.json; its ``model`` is the config.

    Raises:
        ModelFolderError: there is none, or it is not ours, or of a newer version.
    """
    path = folder / CONFIG
    if not path.is_file():
        runs = folder / "model" / CONFIG
        hint = f"; did you mean its model, {str(folder / 'model')!r}?" if runs.is_file() else ""
        raise ModelFolderError(f"{str(folder)!r} has no {CONFIG}, so it is no saved model{hint}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        kind = document.get("model_type") or document.get("architectures") if isinstance(document, dict) else None
        seen = f"a transformers model ({kind})" if kind else "something else"
        raise ModelFolderError(
            f'{path} describes {seen}, not an mmrep model (no "format": "{FORMAT}"). '
            "To use it as one tower, name the folder in a recipe: encoder: {type: hf-text, path: …}"
        )
    if document.get("version", 0) > VERSION:
        raise ModelFolderError(
            f"{path} has format version {document['version']}, this mmrep reads up to {VERSION}: pip install -U mmrep"
        )
    if "model" not in document:
        raise ModelFolderError(f"{path} has no `model` entry")
    return document


def _load_weights(model: Model, folder: Path) -> None:
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = [p.name for pattern in PICKLES for p in folder.glob(pattern)]
        why = (
            f" It has {', '.join(pickles)}, which are pickles: loading one can run any program, so mmrep never does. "
            "Convert it to safetensors where you trust it."
            if pickles
            else ""
        )
        raise ModelFolderError(f"{str(folder)!r} has no {WEIGHTS}.{why}")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ModelFolderError(f"{path} is damaged or was cut short ({error}); copy or download it again") from error
    expected = model.state_dict()
    shared = set(expected) - set(_unshared(expected))
    missing = [k for k in expected if k not in weights and k not in shared]
    extra = [k for k in weights if k not in expected]
    wrong = [
        f"{k}: {tuple(weights[k].shape)} for {tuple(v.shape)}"
        for k, v in expected.items()
        if k in weights and weights[k].numel() != v.numel()
    ]
    if missing or extra or wrong:
        lines = [
            f"{label}: {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}"
            for label, keys in (("missing", missing), ("unknown", extra), ("wrong shape", wrong))
            if keys
        ]
        raise ModelFolderError(f"{path} does not fit its {CONFIG}; " + "; ".join(lines))
    model.load_state_dict(weights, strict=not shared)


def _check_fingerprint(model: Model, folder: Path) -> None:
    path = folder / FINGERPRINT
    if not path.is_file():
        raise ModelFolderError(
            f"{str(folder)!r} has no {FINGERPRINT}; load with check_fingerprint=False to accept that"
        )
    try:
        saved = json.loads(path.read_text())
        worst = {
            name: float((torch.tensor(saved[name]) - _example_embeddings(model, name)).abs().max())
            for name in _names(model)
        }
    except (json.JSONDecodeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelFolderError(f"{path} cannot be compared with the model: {error!r}") from error
    off = {name: gap for name, gap in worst.items() if not gap <= _TOLERANCE}
    if off:
        kind = {n: "tower" if n in model.towers else "fusion" if n in model.fusions else "reduction to" for n in off}
        gaps = ", ".join(f"{kind[name]} {name} (off by {gap:.2g})" for name, gap in off.items())
        raise ModelFolderError(
            f"{str(folder)!r}: {gaps} does not give the embeddings that it was saved with. Weights, "
            "preprocessing or a library version do not belong together; check_fingerprint=False loads it all the same"
        )


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state without second names of one tensor (tied weights), each tensor contiguous and on the CPU."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    out: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        identity = (value.data_ptr(), tuple(value.shape))
        if value.numel() and identity in seen:
            continue
        seen.add(identity)
        out[key] = value.detach().contiguous().cpu()
    return out
