"""Labels of a batch as places in a list of classes, for objectives that tell classes apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmrep.registry import near
from mmrep.step import Step


def label_places(step: Step, places: Mapping[str, int], where: str) -> Tensor:
    """The place of each sample's class, int64 [B]; -1 where it has no label.

    Args:
        step: whose labels.
        places: by the name of a class.
        where: the objective, for the message.

    Raises:
        ValueError: a label is none of the classes.
    """
    found = [-1 if label is None else places.get(str(label), -2) for label in step.labels]
    if -2 in found:
        label = str(step.labels[found.index(-2)])
        raise ValueError(f"label {label!r} is none of objectives.{where}.classes{near(label, places)}")
    return torch.tensor(found, dtype=torch.long, device=step.model.device)
