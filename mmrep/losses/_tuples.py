"""From one rank's tuples, some of which lack a field, to what a loss over complete tuples of all ranks must compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from mmrep.losses._batch import scalar
from mmrep.world import LocalWorld, World


class TupleLoss(Protocol):
    """A loss over tuples of M embeddings, one of each field.

    Attributes:
        fields: smallest and largest M; None = any number.
        takes_partial: a tuple that lacks some field still takes part; else only complete tuples do.
    """

    fields: tuple[int, int | None]
    takes_partial: ClassVar[bool]
    config: Any

    @property
    def draws_negatives(self) -> bool:
        """The negatives are a random choice, so that the order of the tuples matters."""
        ...

    @staticmethod
    def bounds(dim: int, fields: int) -> tuple[float, float]:
        """Scales from which a perfect tuple has a logit of 1 to where it has one of 100, as CLIP's bounds for pairs."""
        ...

    def __call__(
        self,
        embeddings: Sequence[Tensor],
        *,
        scale: Tensor | float,
        group: Tensor | None = None,
        valid: Tensor | None = None,
        anchor: int | None = None,
        world: World | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch of tuples.

        Args:
            embeddings: M of [n, D], this rank's rows; the caller has normalised them. bf16 and fp16 are cast to float32
                before any product and autocast is off inside; if all are float64, they stay so.
            scale: inverse temperature > 0, one number (not its logarithm).
            group: [n] integers; tuples of equal number, on any rank, are not each other's negatives.
            valid: [n, M] booleans: which fields are present. The rows of absent ones are never read.
            anchor: which of the fields is contrasted with the others; None = each in turn, averaged.
            world: the ranks that share the batch; None is one process.

        Returns:
            ``loss`` 0-D, whose mean over ranks is the loss of one process on the concatenated batch (see `mmrep.world`)
            and which is exactly 0, with zero gradients, where no tuple takes part; ``n``, the global number of tuples
            that do (int64); detached parts, which are means over ranks too.

        Raises:
            ValueError: shapes or dtypes do not fit, on this rank or between ranks.
        """
        ...


@dataclass(frozen=True)
class TupleBatch:
    """Complete tuples only, in float32 (or float64 where all inputs are).

    Attributes:
        fields: M of [n, D], this rank's rows.
        tuples: N, the number of complete tuples of all ranks.
        own: where this rank's are among those.
        groups: [n], numbers in 0..N-1; equal for tuples of one group, which are no negatives of each other.
        all_groups: [N], the same of all ranks.
        scale: 0-D.
        world: the ranks.
    """

    fields: list[Tensor]
    tuples: int
    own: slice
    groups: Tensor
    all_groups: Tensor
    scale: Tensor
    world: World

    def reduce(self, local_sum: Tensor) -> Tensor:
        """Global mean over tuples, up to the convention of `mmrep.world`; exactly 0 with a zero gradient if none."""
        return local_sum * (self.world.size / max(self.tuples, 1))

    def result(self, local_sum: Tensor, **parts: Tensor) -> dict[str, Tensor]:
        """What a tuple loss returns; ``parts`` are [n], one number for each tuple."""
        means = {name: self.reduce(value.detach().sum()) for name, value in parts.items()}
        return {"loss": self.reduce(local_sum), "n": torch.tensor(self.tuples, device=local_sum.device), **means}


def tuple_batch(
    embeddings: Sequence[Tensor],
    *,
    scale: Tensor | float,
    group: Tensor | None,
    valid: Tensor | None,
    world: World | None,
) -> TupleBatch:
    """Check, drop incomplete tuples, cast, and number the groups of all ranks. All ranks call it together."""
    check_tuples(embeddings, group, valid)
    world = world or LocalWorld()
    dtype = common_dtype(embeddings)
    if valid is not None:
        # Selecting (not masking) makes "neither anchor nor negative" true by construction.
        rows = valid.all(1).nonzero().squeeze(1)
        embeddings, group = [x[rows] for x in embeddings], None if group is None else group[rows]
    fields = agree([x.to(dtype) for x in embeddings], group, world)
    sizes = world.sizes(fields[0])
    first, tuples = sum(sizes[: world.rank]), sum(sizes)
    own = slice(first, first + len(fields[0]))
    all_groups = torch.arange(tuples, device=fields[0].device)
    if group is not None:
        everyone = world.gather(group)
        all_groups = torch.searchsorted(everyone.sort().values, everyone)
    return TupleBatch(fields, tuples, own, all_groups[own], all_groups, scalar(scale, fields[0]), world)


def anchors(anchor: int | None, fields: int) -> list[int]:
    """The fields that take the anchor's place: the one, or each in turn."""
    if anchor is None:
        return list(range(fields))
    if not 0 <= anchor < fields:
        raise ValueError(f"anchor is the place of a field, 0 to {fields - 1}, or None for each in turn; got {anchor}")
    return [anchor]


def check_fields(name: str, allowed: tuple[int, int | None], fields: int) -> None:
    """Refuse a number of fields that the loss is not defined for."""
    low, high = allowed
    if fields < low or (high is not None and fields > high):
        number = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        raise ValueError(f"{name} takes {number} fields, got {fields}")


def common_dtype(embeddings: Sequence[Tensor]) -> torch.dtype:
    """What a loss computes in."""
    return torch.float64 if all(x.dtype == torch.float64 for x in embeddings) else torch.float32


def agree(embeddings: list[Tensor], group: Tensor | None, world: World) -> list[Tensor]:
    """Make sure that all ranks will make the same collective calls, forward and backward."""
    if world.size == 1:
        return embeddings
    here = [group is not None, *(x.requires_grad for x in embeddings)]
    told = world.sum(torch.tensor(here, dtype=torch.int64, device=embeddings[0].device))
    with_group, *with_grad = (int(count) for count in told.cpu())
    if with_group not in (0, world.size):
        raise ValueError(
            f"`group` was given on {with_group} of {world.size} ranks; give it on all or on none "
            "(a rank with nothing to add gives a tensor of zero rows)"
        )
    # A rank whose rows are constants (an absent modality) still takes part in the backward collectives.
    learns = [bool(count) and torch.is_grad_enabled() for count in with_grad]
    return [
        x.detach().requires_grad_() if learning and not x.requires_grad else x
        for x, learning in zip(embeddings, learns, strict=True)
    ]


def check_tuples(embeddings: Sequence[Tensor], group: Tensor | None, valid: Tensor | None) -> None:
    """Refuse shapes and dtypes that do not fit."""
    if not embeddings:
        raise ValueError("a tuple has at least one field, got none")
    shape = embeddings[0].shape
    if any(x.ndim != 2 or x.shape != shape for x in embeddings):
        shapes = ", ".join(str(tuple(x.shape)) for x in embeddings)
        raise ValueError(f"the fields of a tuple are rows of one shape [n, D], got {shapes}")
    for x in embeddings:
        if not x.is_floating_point():
            raise ValueError(f"fields must hold floating-point embeddings, got {x.dtype}")
    if group is not None and (group.shape != shape[:1] or group.is_floating_point() or group.dtype == torch.bool):
        raise ValueError(f"group must be [{shape[0]}] integers, one per tuple, got {tuple(group.shape)} {group.dtype}")
    if valid is not None and (valid.shape != (shape[0], len(embeddings)) or valid.dtype != torch.bool):
        raise ValueError(
            f"valid must be [{shape[0]}, {len(embeddings)}] booleans, one per tuple and field, "
            f"got {tuple(valid.shape)} {valid.dtype}"
        )
