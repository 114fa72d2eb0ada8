"""The equality table: terms of one process beside those of several, and what a difference usually comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_FLOOR = 1e-6
"""Share of the largest gradient that a term's error is measured against if it is smaller: rounding has no direction."""
_ALIGNED = 1e-5


@dataclass(frozen=True)
class Measured:
    """What one step gave, on the CPU.

    losses: every part of the loss, as its mean over processes. gradients: by parameter name, already reduced over
    processes; None where no gradient arrived.
    """

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor | None]

    @property
    def missing(self) -> list[str]:
        """Parameters without a gradient."""
        return [name for name, value in self.gradients.items() if value is None]


@dataclass(frozen=True)
class Row:
    """One term of the table.

    one, many: value of a loss, or norm of a gradient. error: norm of the difference / norm of one process's. ratio: of
    the norms. cosine: None for a loss. worst: the parameter that differs most, of several. missing: parameters without
    a gradient.
    """

    term: str
    one: float
    many: float
    error: float
    ratio: float
    cosine: float | None
    agrees: bool
    worst: str = ""
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """The rows of one comparison. title: under which conditions."""

    title: str
    rows: list[Row]

    @property
    def agree(self) -> bool:
        """Whether all terms do."""
        return all(row.agrees for row in self.rows)


def compare(title: str, one: Measured, many: Measured, tolerance: float) -> Table:
    """The table of all losses, towers, temperatures and objectives."""
    rows = [_loss(name, one.losses[name], many.losses[name], tolerance) for name in one.losses]
    terms: dict[str, list[str]] = {}
    for name in one.gradients:
        terms.setdefault(term(name), []).append(name)
    norms = [_norm(one.gradients[name] for name in names) for names in terms.values()]
    floor = _FLOOR * max(norms, default=0.0)
    rows += [_gradient(name, names, one.gradients, many.gradients, floor, tolerance) for name, names in terms.items()]
    return Table(title, rows)


def term(parameter: str) -> str:
    """The row that a parameter of the root belongs to: ``tower image, encoder``, ``temperature default, scale``."""
    kind, _, rest = parameter.partition(".")
    if kind == "objectives":
        return f"objective {rest.partition('.')[0]}"
    if kind == "model":
        kind, name, rest = [*rest.split(".", 2), "", ""][:3]
        part = rest.partition(".")[0]
        if kind == "towers":
            return f"tower {name}, {part}"
        if kind == "temperatures":
            return f"temperature {name}, {part.removeprefix('log_')}"
    return parameter.rpartition(".")[0] or parameter


def _loss(name: str, one: Tensor, many: Tensor, tolerance: float) -> Row:
    a, b = float(one), float(many)
    error = abs(b - a) / max(abs(a), 1e-12)
    ratio = b / a if a else math.nan
    return Row(name if name == "loss" else f"loss {name}", a, b, error, ratio, None, error <= tolerance)


def _gradient(
    name: str,
    parameters: list[str],
    one: Mapping[str, Tensor | None],
    many: Mapping[str, Tensor | None],
    floor: float,
    tolerance: float,
) -> Row:
    pairs = {p: (_flat(one[p]), _flat(many[p])) for p in parameters if one[p] is not None and many[p] is not None}
    missing = tuple(p for p in parameters if p not in pairs)
    a = torch.cat([x for x, _ in pairs.values()]) if pairs else torch.zeros(0)
    b = torch.cat([y for _, y in pairs.values()]) if pairs else torch.zeros(0)
    left, right, gap = (float(x.norm()) for x in (a, b, b - a))
    error = gap / max(left, floor, 1e-300)
    cosine = float(a @ b) / (left * right) if left and right else math.nan
    agrees = not missing and error <= tolerance
    worst = max(pairs, key=lambda p: float((pairs[p][1] - pairs[p][0]).norm())) if len(pairs) > 1 else ""
    ratio = right / left if left else math.nan
    return Row(name, left, right, error, ratio, cosine, agrees, "" if agrees else worst, missing)


def causes(table: Table, processes: int, even: Table | None) -> dict[str, list[str]]:
    """Typical causes of the differences, each with the terms that show its signature.

    Args:
        table: the comparison with shards of unequal size.
        processes: how many there were.
        even: the same with shards of equal size, which tells a local count from local statistics.
    """
    wrong = [row for row in table.rows if not row.agrees]
    unreduced = any(row.missing for row in wrong)
    parts = [row for row in table.rows if row.term.startswith("loss ")]
    bad_parts = [row.term for row in parts if not row.agrees]
    losses_agree = all(row.agrees for row in table.rows if row.cosine is None)
    found: dict[str, list[str]] = {}
    for row in wrong:
        cause = _signature(row, processes)
        if cause is None and unreduced:
            cause = "not to be judged: DDP did not reduce what shares a bucket with a parameter without a gradient"
        if cause is None and even is not None and next(r.agrees for r in even.rows if r.term == row.term):
            cause = _LOCAL_COUNT
        if cause is None and losses_agree:
            cause = _LOST_GRADIENT
        if cause is None and row.term not in bad_parts and len(bad_parts) < len(parts):
            cause = f"a sum over objectives, of which these differ: {', '.join(bad_parts)}"
        found.setdefault(cause or _LOCAL_STATISTICS, []).append(row.term)
    return found


def _signature(row: Row, processes: int) -> str | None:
    """What the row says by itself."""
    if row.missing:
        return (
            "no gradient arrives. DDP then leaves its whole bucket unreduced, and stops in the second step: use it in "
            f"some loss, freeze it, or take it out of the model ({_few(row.missing)})"
        )
    if not math.isfinite(row.one) or not math.isfinite(row.many):
        return "not finite: a mean over no valid pair, or a zero vector normalised?"
    if row.cosine is not None and abs(1 - row.cosine) > _ALIGNED:
        return None
    times = round(row.ratio) if math.isfinite(row.ratio) else 0
    if _is(row.ratio, 1 / processes):
        return (
            f"1/{processes} of what it should be: values of other processes were gathered without their gradient "
            "(all_gather, accelerator.gather and detached copies carry none; step.world.gather does), or a mean over "
            "processes stands where a sum belongs (return world.size * local sum / global count)"
        )
    if times > 1 and _is(row.ratio, times):
        each = f", or once by each of {processes} processes and then summed" if times == processes else ""
        return (
            f"counted {times} times: live in {times} passes, hops or terms that each give the whole gradient "
            f"(detach it in all but one){each}"
        )
    return None


_LOCAL_COUNT = (
    "right with equal shards and wrong with unequal ones: a mean over this process's own rows or valid pairs. Divide "
    "by the count of all processes (return world.size * local sum / world.sum(count))"
)
_LOST_GRADIENT = (
    "the loss is right and its gradient is not: values of other processes enter it without their gradient (gathered by "
    "all_gather or accelerator.gather, reduced by dist.all_reduce, or detached). Use the differentiable "
    "step.world.gather and step.world.sum"
)
_LOCAL_STATISTICS = (
    "another value or direction, also with equal shards: a statistic of this process's own batch (mean, variance, "
    "standardisation, covariance, Sinkhorn), or its own rows as the only negatives. Gather or sum over step.world "
    "before normalising"
)


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if names[3:] else "")


def _is(ratio: float, expected: float) -> bool:
    return math.isfinite(ratio) and abs(ratio / expected - 1) < 1e-4


def _flat(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.detach().double().reshape(-1)


def _norm(values: object) -> float:
    present = [_flat(v) for v in values if v is not None]  # type: ignore[attr-defined]
    return float(torch.cat(present).norm()) if present else 0.0
