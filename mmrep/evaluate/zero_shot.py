"""Zero-shot classification: the class whose prompts lie nearest (CLIP, arXiv:2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrep.evaluate._arrays import ArrayLike, as_labels, as_matrix, as_pair, products, spans, working_dtype

TEMPLATES: tuple[str, ...] = ("{}", "a {}", "an example of {}", "this is {}", "something called {}")
"""Our own small set of prompts that name no modality; a modality's recipe may have better ones."""


def expand_templates(class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Every class name in every template, class by class: prompt `c * len(templates) + t`.

    Raises:
        ValueError: when there is no class or no template, or a template has no place `{}` for the name.
    """
    if isinstance(class_names, str) or isinstance(templates, str):
        raise ValueError("class_names and templates are lists of strings, not one string")
    if not class_names or not templates:
        raise ValueError(f"zero-shot needs classes and templates, got {len(class_names)} and {len(templates)}")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} where the class name goes, as in {TEMPLATES[1]!r}")
    return [template.replace("{}", name) for name in class_names for template in templates]


@torch.no_grad()
def class_embeddings(
    encode: Callable[[list[str]], ArrayLike], class_names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """One unit vector a class: each prompt is normalised, the prompts of a class are averaged, the mean is normalised.

    Without the first step long vectors outvote short ones; without the last, classes whose prompts disagree get smaller
    scores from every item.

    Args:
        encode: prompts to embeddings [prompts, D]; called once.
        class_names: C names.
        templates: strings with a place `{}` for the name.

    Returns:
        fp32 (fp64 if `encode` returns it) [C, D] of unit norm.
    """
    prompts = expand_templates(class_names, templates)
    embedded = as_matrix(encode(prompts), "prompt embeddings")
    if len(embedded) != len(prompts):
        raise ValueError(f"encode returned {len(embedded)} embeddings for {len(prompts)} prompts")
    unit = F.normalize(embedded.to(working_dtype(embedded)), dim=1)
    return F.normalize(unit.unflatten(0, (len(class_names), len(templates))).mean(dim=1), dim=1)


@torch.no_grad()
def zero_shot_probabilities(items: ArrayLike, classes: ArrayLike, *, scale: float, bias: float | None = None) -> Tensor:
    """Probability of each class for each item, [N, C].

    Args:
        items: [N, D], normalised here.
        classes: [C, D] as `class_embeddings` gives them.
        scale: what the similarity is multiplied by (about 100 for CLIP), not its logarithm.
        bias: given for a model trained with the sigmoid loss (SigLIP, arXiv:2303.15343): sigmoid(scale · s + bias),
            each class by itself. Without it: softmax(scale · s) over the classes.
    """
    x, c = as_pair(items, classes, ("items", "class embeddings"))
    return _probabilities(_cosines(x, c), scale, bias)


@torch.no_grad()
def zero_shot_metrics(
    items: ArrayLike,
    classes: ArrayLike,
    labels: ArrayLike,
    *,
    scale: float | None = None,
    bias: float | None = None,
    ks: Sequence[int] = (1, 5),
    tile: int = 2048,
) -> dict[str, float]:
    """Accuracy of the nearest class; among classes with equal scores the expected value of a random choice is counted.

    Args:
        items: [N, D], normalised here.
        classes: [C, D] as `class_embeddings` gives them.
        labels: integers [N] in [0, C).
        scale: with it the probabilities are taken as in `zero_shot_probabilities`.
        bias: likewise; needs `scale`.
        ks: cut-offs of the top-k accuracies.
        tile: items scored at once.

    Returns:
        `top{k}` in [0, 1]; `mean_per_class`: top-1 accuracy averaged over the classes that occur; `chance_top{k}`: k /
        C;
        `ties`: items whose true class ties with another; `items`, `classes`; with `scale` also
        `true_class_probability`, the mean probability given to the true class.
    """
    if bias is not None and scale is None:
        raise ValueError("bias is given without scale: a sigmoid probability needs both")
    if any(k < 1 for k in ks):
        raise ValueError(f"ks must be at least 1, got {tuple(ks)}")
    x, c = as_pair(items, classes, ("items", "class embeddings"))
    truth = as_labels(labels, len(x), "labels")
    if not len(x):
        raise ValueError("there are no items to classify")
    if not np.issubdtype(truth.dtype, np.integer) or truth.min() < 0 or truth.max() >= len(c):
        raise ValueError(f"labels must be integers from 0 to {len(c) - 1}, the index of the class embedding")
    target = torch.from_numpy(truth.astype(np.int64)).to(x.device)
    above, tied, probability = [], [], []
    for rows in spans(len(x), tile):
        scores = _cosines(x[rows], c)
        own = scores.gather(1, target[rows, None])
        above.append((scores > own).sum(dim=1))
        tied.append((scores == own).sum(dim=1))
        if scale is not None:
            probability.append(_probabilities(scores, scale, bias).gather(1, target[rows, None]).flatten())
    higher, equal = torch.cat(above).double(), torch.cat(tied).double()
    metrics = {f"top{k}": ((k - higher) / equal).clamp(0, 1).mean().item() for k in ks}
    first = ((1 - higher) / equal).clamp(0, 1).cpu().numpy()
    metrics["mean_per_class"] = float(np.mean([first[truth == label].mean() for label in np.unique(truth)]))
    metrics |= {f"chance_top{k}": min(k / len(c), 1.0) for k in ks}
    if probability:
        metrics["true_class_probability"] = torch.cat(probability).double().mean().item()
    return metrics | {"ties": float((equal > 1).sum()), "items": float(len(x)), "classes": float(len(c))}


def _cosines(items: Tensor, classes: Tensor) -> Tensor:
    return products(F.normalize(items.to(working_dtype(items)), dim=1), classes)


def _probabilities(scores: Tensor, scale: float, bias: float | None) -> Tensor:
    return torch.softmax(scale * scores, dim=1) if bias is None else torch.sigmoid(scale * scores + bias)
