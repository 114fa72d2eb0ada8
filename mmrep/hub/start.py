"""Beginning from a saved model: its config under a recipe's, its encoders' files, its weights in the new model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmrep.config import ConfigError, dump, parse
from mmrep.finetune.adapter import merged
from mmrep.hub.folder import FILES, WEIGHTS, ModelFolderError, load, locate, read_config
from mmrep.hub.load import bridge
from mmrep.model import Model, ModelConfig


def saved_config(start: str) -> dict[str, Any]:
    """The ``model`` part of a saved model's config, as plain data, or that of another library's checkpoint.

    Raises:
        ConfigError: there is no such model.
    """
    try:
        found = bridge(model_folder(start))
        if found is not None:
            return dump(parse(ModelConfig, found.named(), "start"))
        return read_config(locate(model_folder(start)))["model"]
    except ModelFolderError as error:
        raise ConfigError([f"start: {error}"]) from error


class Start:
    """A saved model, or another library's checkpoint, as the beginning of another.

    Args:
        start: its folder, the run folder that holds it, or a hub id; or whatever else `mmrep.load` takes.
        config: of the model that begins from it.

    Raises:
        ConfigError: no such model, or one of its towers is another in ``config``.
    """

    def __init__(self, start: str, config: ModelConfig) -> None:
        self.name = start
        saved = parse(ModelConfig, saved_config(start), "start")
        self.bridge = bridge(model_folder(start))
        self.folder = None if self.bridge is not None else locate(model_folder(start))
        self._wrapped: list[str] = []  # towers whose encoder now stands around the saved one
        problems = [] if saved.dim == config.dim else [f"model.dim: {config.dim}, but {start!r} has {saved.dim}"]
        for name, tower in saved.towers.items():
            new = config.towers.get(name)
            if new is None:
                continue
            if new.encoder.cls.wrapped(new.encoder.config) == tower.encoder:
                self._wrapped.append(name)
            for part in ("encoder", "pool", "projector"):
                if getattr(tower, part) != getattr(new, part) and not (part == "encoder" and name in self._wrapped):
                    problems.append(
                        f"model.towers.{name}.{part}: differs from that of {start!r}, whose weights it begins with; "
                        "leave it out, or give the tower another name"
                    )
        if problems:
            raise ConfigError(problems)
        # Towers whose saved adapter, if any, is not the one that they go on with: it is added to the weights.
        self._other = [
            n for n, t in saved.towers.items() if n in config.towers and t.adapter != config.towers[n].adapter
        ]
        self._saved = saved
        self.towers = [name for name in saved.towers if name in config.towers]
        self.config = config

    def files(self) -> dict[str, Path]:
        """Per tower that begins from the saved model, the folder of its encoder's files (absent or not).

        Encoders of another library's checkpoint read it themselves, by the path that their config says.
        """
        if self.folder is None:
            return {}
        return {name: self.folder / FILES / name for name in self.towers}

    @torch.no_grad()
    def fill(self, model: Model) -> None:
        """Give the model the saved weights of all that has the same name; the rest keeps its own.

        Raises:
            ConfigError: a saved value has another shape.
        """
        expected = model.state_dict()
        if self.bridge is not None:
            self.bridge.fill(model)
            old = tuple(f"towers.{name}." for name in self.towers)
            model.began = frozenset(key for key in expected if key.startswith(old))
            return
        weights, fresh = self._weights(), set[str]()
        for name in self._wrapped:
            prefix = f"towers.{name}.encoder."
            weights = {f"{prefix}inner.{k.removeprefix(prefix)}" if k.startswith(prefix) else k: v
                       for k, v in weights.items()}  # fmt: skip
            fresh |= {k for k in expected if k.startswith(prefix) and not k.startswith(f"{prefix}inner.")}
        for name in self._other:
            tower, prefix = model.tower(name), f"towers.{name}.encoder."
            if tower.adapter is not None:
                base = {prefix + now: prefix + own for now, own in tower.adapter.base_names(tower.encoder).items()}
                fresh |= {key for key in expected if key.startswith(prefix) and key not in base}
                renamed = {now: weights.pop(own) for now, own in base.items() if own in weights}
                weights |= renamed
        old = tuple(f"towers.{name}." for name in self.towers)
        absent = [
            k
            for k in expected
            if k.startswith(old) and k not in weights and k not in fresh and not _is_shared(k, expected, weights)
        ]
        wrong = [k for k, v in weights.items() if k in expected and expected[k].numel() != v.numel()]
        if absent or wrong:
            named = ", ".join([*absent, *wrong][:5])
            raise ConfigError([f"start: {self.name!r} has no fitting values for {named}"])
        model.load_state_dict({k: v for k, v in weights.items() if k in expected}, strict=False)
        model.began = frozenset(k for k in expected if k in weights or _is_shared(k, expected, weights))
        for name in self._other:
            tower = model.tower(name)
            if tower.adapter is not None:
                tower.adapter.settle(tower.encoder)
        for name in self._wrapped:
            model.tower(name).encoder.settle()

    def _weights(self) -> dict[str, Tensor]:
        """The saved values, with adapters that end here added to the weights that they belong to."""
        assert self.folder is not None
        ending = [name for name in self._other if self._saved.towers[name].adapter is not None]
        if not ending:
            return load_file(self.folder / WEIGHTS)
        return dict(merged(load(self.folder, check_fingerprint=False), ending).state_dict())


def _is_shared(key: str, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Whether the value is another name of one that is there: tied weights are saved once."""
    mine = expected[key]
    return any(
        other.data_ptr() == mine.data_ptr() and other.shape == mine.shape and name in weights
        for name, other in expected.items()
        if name != key
    )


def model_folder(start: str) -> str:
    """A run folder stands for its model."""
    inner = Path(start).expanduser() / "model"
    return str(inner) if (inner / "config.json").is_file() else start
