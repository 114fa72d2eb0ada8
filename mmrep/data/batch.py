"""A batch with missing fields: each field is collated over the samples that have it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmrep.data.sample import Quarantined
from mmrep.tokens import Inputs
from mmrep.views.view import Params


@dataclass
class Batch:
    """One batch, as the loader made it. B samples; a field's inputs hold only the rows where it is present.

    Attributes:
        ids: sample ids, B of them.
        inputs: per field, one collated `Inputs` per view; absent from the dict if no sample of the batch has it.
        present: per field, bool [B].
        seeds: int64 [B]; all randomness of a sample's views derives from its seed.
        group: int64 [B], equal for samples that are positives of each other; None if the source has no groups.
        labels: B labels, None where unknown.
        items: per *memoised* field (frozen encoder, no view), the uncollated prepared items of the present rows.
        keys: per memoised field, a content key for each of those items.
        quarantined: samples that were to be in this batch and could not be read.
        params: per field, one dict per view of the parameters that it drew sample by sample; rows as in `inputs`.
        parts: micro-batches, whose samples in order are this batch's; `inputs`, `items`, `keys` and `params` are then
            theirs alone. Empty: the batch is computed at once.
    """

    ids: list[str]
    inputs: dict[str, list[Inputs]] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    seeds: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    group: Tensor | None = None
    labels: list[int | str | None] = field(default_factory=list)
    items: dict[str, list[Inputs]] = field(default_factory=dict)
    keys: dict[str, list[bytes]] = field(default_factory=dict)
    quarantined: list[Quarantined] = field(default_factory=list)
    params: dict[str, list[Params]] = field(default_factory=dict)
    parts: list[Batch] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on ``device``; items of memoised fields stay where they are."""
        move = {"device": device, "non_blocking": True}
        return Batch(
            ids=self.ids,
            inputs={f: [{k: v.to(**move) for k, v in view.items()} for view in vs] for f, vs in self.inputs.items()},
            present={f: p.to(**move) for f, p in self.present.items()},
            seeds=self.seeds.to(**move),
            group=None if self.group is None else self.group.to(**move),
            labels=self.labels,
            items=self.items,
            keys=self.keys,
            quarantined=self.quarantined,
            params={f: [{k: v.to(**move) for k, v in view.items()} for view in vs] for f, vs in self.params.items()},
            parts=[part.to(device) for part in self.parts],
        )

    def pin_memory(self) -> Batch:
        """The batch with page-locked tensors; torch's loader calls it when it feeds a GPU."""
        return Batch(
            **{
                **self.__dict__,
                "inputs": {f: [_pinned(view) for view in vs] for f, vs in self.inputs.items()},
                "params": {f: [_pinned(view) for view in vs] for f, vs in self.params.items()},
                "parts": [part.pin_memory() for part in self.parts],
            },
        )


def _pinned(inputs: Inputs) -> Inputs:
    return {key: value.pin_memory() for key, value in inputs.items()}
