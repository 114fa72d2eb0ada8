"""Models of one architecture, merged in the space of their weights: interpolation, soups, task vectors.

Fine-tuning moves a model from ``theta_0`` to ``theta_1``; a point between the two often keeps most of what was gained
and gives back most of what was forgotten. All of this supposes that the models began with the same weights: between
two that were trained from different random starts there is usually nothing good.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrep.config import ConfigError, dump
from mmrep.model import Model
from mmrep.registry import near

logger = logging.getLogger(__name__)

_COUNTER = "num_batches_tracked"  # of batch norm: how often its statistics were updated, not a part of the function
_TRACES = {"name_or_path", "_name_or_path", "transformers_version", "truncation", "padding", "local_files_only"}


def interpolate(start: Model, tuned: Model, alpha: float) -> Model:
    """``(1 - alpha) theta_0 + alpha theta_1`` (WiSE-FT, Wortsman et al. 2021, arXiv:2109.01903).

    Args:
        start: the model before fine-tuning, theta_0.
        tuned: the fine-tuned one, theta_1.
        alpha: 0 gives the start and 1 the tuned model, both to the bit; outside of [0, 1] it extrapolates.

    Returns:
        A new model in eval mode, on the device of ``tuned``.

    Raises:
        ConfigError: the two are not of one architecture; every difference by name.
    """
    return _filled([start, tuned], [1 - alpha, alpha])


def soup(models: Sequence[Model], weights: Sequence[float] | None = None) -> Model:
    """The mean of the weights of several fine-tuned models (uniform soup, Wortsman et al. 2022, arXiv:2203.05482).

    Args:
        models: at least one.
        weights: of each; they are divided by their sum. None = all alike.

    Raises:
        ConfigError: as `interpolate`; or weights that do not fit.
    """
    given = [1.0] * len(models) if weights is None else list(weights)
    if not models or len(given) != len(models) or not sum(given):
        raise ConfigError([f"soup: {len(models)} models with {len(given)} weights, whose sum is {sum(given):g}"])
    return _filled(models, [weight / sum(given) for weight in given])


def greedy_soup(models: Sequence[Model], score: Callable[[Model], float]) -> tuple[Model, list[int]]:
    """A uniform soup of those that help (greedy soup, arXiv:2203.05482).

    From the best model to the worst, each is put in if the soup with it scores at least as well as the one without.

    Args:
        models: at least one.
        score: higher is better, on validation data; the test must not choose the ingredients.

    Returns:
        The soup, and the places of its ingredients in ``models``, in the order in which they were put in.
    """
    if not models:
        raise ConfigError(["greedy_soup: it needs one model at least"])
    scores = [score(model) for model in models]
    order = sorted(range(len(models)), key=lambda i: -scores[i])
    kept, best = order[:1], scores[order[0]]
    for i in order[1:]:
        found = score(soup([models[j] for j in [*kept, i]]))
        if found >= best:
            kept, best = [*kept, i], found
    return soup([models[i] for i in kept]), kept


def add_task_vectors(base: Model, tuned: Sequence[Model], coefficients: Sequence[float]) -> Model:
    """``theta_0 + sum_i lambda_i (theta_i - theta_0)`` (task arithmetic, Ilharco et al. 2022, arXiv:2212.04089).

    Args:
        base: theta_0, from which all the others were tuned.
        tuned: theta_i.
        coefficients: lambda_i; a negative one takes away what a model has learned.

    Raises:
        ConfigError: as `interpolate`; or another number of coefficients than of models.
    """
    if len(coefficients) != len(tuned):
        raise ConfigError([f"coefficients: {len(coefficients)} for {len(tuned)} models; give one for each"])
    return _filled([base, *tuned], [1 - sum(coefficients), *coefficients])


def floats(model: Model, device: torch.device) -> dict[str, Tensor]:
    """Floating-point weights and buffers; tied ones by their first name."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point() and id(value) not in seen:
            seen.add(id(value))
            out[name] = value.detach().to(device)
    return out


def _filled(models: Sequence[Model], coefficients: Sequence[float]) -> Model:
    """A copy of the last model with the weighted sum of all in it, computed in fp64."""
    agree(models)
    merged = copy.deepcopy(models[-1]).eval()
    states = [model.state_dict() for model in models]
    terms = [(c, state) for c, state in zip(coefficients, states, strict=True) if c]
    new: dict[str, Tensor] = {}
    for name, value in states[-1].items():
        if name.rpartition(".")[2] == _COUNTER:
            new[name] = torch.stack([state[name].to(value.device) for state in states]).amax(0)
        elif value.is_floating_point():
            parts = [c * state[name].to(value.device, torch.float64) for c, state in terms]
            new[name] = torch.stack(parts).sum(0).to(value.dtype) if parts else torch.zeros_like(value)
    merged.load_state_dict(new, strict=False)
    _tell_statistics(merged, terms)
    return merged


def _tell_statistics(merged: Model, terms: Sequence[tuple[float, Mapping[str, Tensor]]]) -> None:
    running = [name for name in merged.state_dict() if name.endswith(".running_var")]
    if len(terms) > 1 and any((state[name].cpu() != terms[0][1][name].cpu()).any() for name in running
                              for _, state in terms):  # fmt: skip
        logger.warning(
            "batch norm in %s: its running statistics are averaged too, and those of the merged weights may differ: "
            "judge the merged model by an evaluation",
            ", ".join(name.removesuffix(".running_var") for name in running[:3]) + (" …" if len(running) > 3 else ""),
        )


def agree(models: Sequence[Model]) -> None:
    """Refuse models that are not of one architecture, or that read their inputs differently."""
    problems = [p for i, model in enumerate(models[1:], 1) for p in _differences(models[0], model, f"model {i}")]
    if problems:
        shown = problems[:8] + ([f"… and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise ConfigError([f"models of one architecture can be merged; {problem}" for problem in shown])


def _differences(first: Model, other: Model, who: str) -> Iterator[str]:
    a, b = first.config, other.config
    for what, left, right in (
        ("towers", set(a.towers), set(b.towers)), ("fusions", set(a.fusions), set(b.fusions)),
        ("temperatures", set(a.temperatures), set(b.temperatures)),
    ):  # fmt: skip
        for name in sorted(left ^ right):
            has, lacks = ("the first", who) if name in left else (who, "the first")
            yield f"{what}: {has} has {name!r} and {lacks} has not{near(name, right if name in left else left)}"
    if a.normalize != b.normalize:
        yield f"normalize: {a.normalize} in the first, {b.normalize} in {who}"
    for name in a.towers.keys() & b.towers.keys():
        for part in ("encoder", "pool", "projector"):
            left, right = (_flat(dump(getattr(config.towers[name], part))) for config in (a, b))
            for key in sorted(left.keys() | right.keys()):
                if left.get(key) != right.get(key):
                    values = f"{left.get(key)!r} in the first, {right.get(key)!r} in {who}"
                    yield f"towers.{name}.{part}.{key}: {values}"
        if _digest(first, name) != _digest(other, name):
            yield (
                f"towers.{name}: the first and {who} have other files (tokenizer, statistics): the same input would "
                "mean other rows of their tables"
            )
    left, right = first.state_dict(), other.state_dict()
    for name in sorted(left.keys() ^ right.keys()):
        yield f"{name}: {'the first' if name in left else who} alone has it"
    for name in left.keys() & right.keys():
        x, y = left[name], right[name]
        if x.shape != y.shape:
            yield f"{name}: shape {list(x.shape)} in the first, {list(y.shape)} in {who}"
        elif x.is_floating_point() != y.is_floating_point():
            yield f"{name}: {x.dtype} in the first, {y.dtype} in {who}"
        elif not x.is_floating_point() and name.rpartition(".")[2] != _COUNTER and not torch.equal(x.cpu(), y.cpu()):
            yield f"{name}: an integer buffer ({x.dtype}), which has no mean, has other values in {who}"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{path}.{key}" if path else key).items()}


def _digest(model: Model, tower: str) -> bytes:
    """Of the files that the encoder of a tower saves."""
    digest = blake2b(digest_size=16)
    with tempfile.TemporaryDirectory(prefix="mmrep-") as folder:
        model.tower(tower).encoder.save_files(Path(folder))
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                content = path.read_bytes() if path.suffix != ".json" else _without_traces(path)
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + content)
    return digest.digest()


def _without_traces(path: Path) -> bytes:
    """A JSON file without what says where a tokenizer came from and how it was called last."""
    document = json.loads(path.read_bytes())
    if isinstance(document, dict):
        document = {key: value for key, value in document.items() if key not in _TRACES}
    return json.dumps(document, sort_keys=True).encode()
