"""A pretrained `transformers` model from a folder, the hub or an installed package: only safetensors.

No code of a checkpoint is run, unless a caller says so (``code``) after `mmrep.hub.remote_code.check`.

Every modality's adapter of Hugging Face models goes through here: `locate` finds the checkpoint, `load_pretrained`
loads it, `rebuild` makes the same architecture again from what the adapter saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmrep.hub.fetch import ModelFolderError
from mmrep.hub.remote_code import refusal

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")

Choose = Callable[[Any], tuple[Any, Any]]
"""From a checkpoint's config to the transformers class to build and the config that is its own (a part's, say)."""


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


def load_pretrained(
    source: str,
    choose: Choose,
    *,
    noun: str,
    revision: str | None = None,
    local_files_only: bool = False,
    may_lack: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    code: bool = False,
) -> tuple[Any, Any, set[str]]:
    """Load a pretrained model in float32.

    Args:
        source: folder or hub id, from `locate`.
        choose: which class to build; it may raise ValueError for a checkpoint of another kind.
        noun: what kind of model is expected, for messages: ``"text"``.
        revision: branch, tag or commit on the hub.
        local_files_only: never touch the network.
        may_lack: prefixes of parameters that a checkpoint may have no values for (a pooling layer).
        ignore: prefixes of parameters that are not used and need no values (a decoder).
        code: run the checkpoint's own code; see `mmrep.hub.remote_code`.

    Returns:
        The model, its config, and the names of parameters of ``may_lack`` that have random values.

    Raises:
        ValueError: no safetensors, not a model of this kind, or weights that do not fit the architecture.
    """
    import torch
    import transformers

    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source, trust_remote_code=code, **options)
        cls, config = choose(config)
        asked = {"trust_remote_code": True} if code and cls is transformers.AutoModel else {}
        with quiet():
            model, report = cls.from_pretrained(
                source, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options,
                **asked,
            )  # fmt: skip
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(f"path {refusal(source, 'auto_map in its config.json')}") from error
        raise
    except OSError as error:
        raise ValueError(
            f"path {source!r} cannot be loaded as a Hugging Face {noun} model with safetensors weights (pickled "
            f"weights can run any program, so they are never read): {error}"
        ) from error
    missing = {key for key in report["missing_keys"] if not key.startswith(ignore)}
    bad = sorted(key for key in missing if not key.startswith(may_lack))
    if bad:
        raise ValueError(f"path {source!r}: the checkpoint has no values for {', '.join(bad[:5])}; it does not fit "
                         f"its config.json ({type(model).__name__})")  # fmt: skip
    model.config.architectures = [type(model).__name__]
    return model, model.config, missing


def rebuild(folder: Path, choose: Choose, *, code: bool = False) -> tuple[Any, Any]:
    """The architecture that ``folder/config.json`` describes, with random weights (the saved state fills them).

    Args:
        folder: of a saved encoder.
        choose: as in `load_pretrained`.
        code: run the code in the folder; see `mmrep.hub.remote_code`.
    """
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=code, local_files_only=True)
    cls, config = choose(config)
    whole = cls is transformers.AutoModel
    model: Any = transformers.AutoModel.from_config(config, trust_remote_code=code) if whole else cls(config)
    return model.float(), config


def load_processor(kind: str, source: str, *, noun: str, files: tuple[str, ...], says: str, **options: Any) -> Any:
    """What prepares a model's inputs, as its checkpoint says.

    Args:
        kind: the class of transformers, ``"AutoImageProcessor"``.
        source: folder or hub id, from `locate`.
        noun: what it is, for messages: ``"image processor"``.
        files: the names that its file may have, the best first.
        says: what it says, for messages.
        **options: ``revision`` and ``local_files_only``.

    Raises:
        ModelFolderError: there is none, or it cannot be read.
    """
    import transformers

    try:
        with quiet():
            return getattr(transformers, kind).from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        folder = Path(source)
        if folder.is_dir() and any((folder / name).is_file() for name in files):
            raise ModelFolderError(f"path {source!r}: its {noun} cannot be read: {error}") from error
        raise ModelFolderError(
            f"path {source!r} has no {noun}: {' or '.join(files)} beside its config.json says {says}. Copy it from "
            f"where the model came from, or write it there by transformers: {kind}.from_pretrained(the base model)"
            ".save_pretrained(the folder)" + ("" if folder.is_dir() else f" ({error})")
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no table of unused keys from transformers; `load_pretrained` checks the report itself."""
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
