"""What a student is compared with a teacher in: points, and the relations between the points of a batch.

Relations need no equal widths: only distances, angles and similarities within each of the two spaces are compared. All
statistics are of the rows of all processes. No gradient reaches the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mmrep.losses._dominance import violations
from mmrep.losses._tiles import recomputed
from mmrep.world import LocalWorld, World

Relation = Literal["similarity", "similarity-mse", "distance", "angle", "rank"]
_BLOCK = 1 << 24
"""Figures that are held at a time of what grows faster than the square of the batch."""


def pointwise(
    student: Tensor, teacher: Tensor, kind: Literal["cosine", "mse"], *, world: World | None = None
) -> Tensor:
    """``mean_i (1 - cos(s_i, t_i))``, or ``mean_i |s_i - t_i|^2``.

    Args:
        student: [n, D] of this process, n >= 0.
        teacher: [n, D].
        kind: of the two.
        world: the processes.

    Returns:
        0-D; over all processes its mean is that over all rows. 0 with a zero gradient if there are none.
    """
    student, teacher, world = _ready(student, teacher, world)
    if student.shape != teacher.shape:
        raise ValueError(f"points are compared in one space, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if kind == "cosine":
        each = 1 - F.cosine_similarity(student, teacher, dim=1)
    else:
        each = (student - teacher).pow(2).sum(1)
    return _mean(each.sum(), len(student), world)


def relational(
    student: Tensor,
    teacher: Tensor,
    kind: Relation,
    *,
    temperature: float = 0.1,
    margin: float = 0.015,
    world: World | None = None,
) -> Tensor:
    """How differently the rows of a batch stand to each other in two spaces.

    With N rows of all processes, unit vectors ``s, t`` and ``c_ij = s_i . s_j`` (teacher: ``d_ij = t_i . t_j``):

    * ``similarity``: ``mean_i KL(softmax_j(d_ij / temperature) | softmax_j(c_ij / temperature))`` over ``j != i``.
    * ``similarity-mse``: ``sum_ij (c_ij - d_ij)^2 / N^2``.
    * ``rank``: the mean over pairs ``p != q`` of pairs of rows of ``max(0, margin - sign(d_p - d_q) (c_p - c_q))``.
      This, the former and ``1 - cos`` are the three losses of Stella (Zhang et al. 2024, arXiv:2412.19048), with the
      reduction of its published code (which counts a tie of the teacher as -1; here it is 0). It is computed over all
      N^4 / 4 of them exactly, in N^2 log N time, by sorting and counting: the hinge is linear where it is not 0.
    * ``distance``: ``sum_ij h(|s_i - s_j| / m_s, |t_i - t_j| / m_t) / N^2`` with ``h`` the Huber loss of width 1 and
      ``m`` the mean distance of two rows; the vectors as they are given. Relational knowledge distillation (Park et
      al. 2019, arXiv:1904.05068), whose published code divides so; the paper's formula is the sum.
    * ``angle``: ``sum_ijk h(cos(angle ijk of s), cos(angle ijk of t)) / N^3``, of the same source.

    Args:
        student: [n, D] of this process, n >= 0.
        teacher: [n, E] of the same samples.
        kind: which relation.
        temperature: of ``similarity``.
        margin: of ``rank``.
        world: the processes.

    Returns:
        0-D; its mean over processes is the loss of all rows together; 0 where fewer rows than a relation needs.
    """
    student, teacher, world = _ready(student, teacher, world)
    if len(student) != len(teacher):
        raise ValueError(f"student and teacher must have the same rows, got {len(student)} and {len(teacher)}")
    first, own = world.offset(len(student)), len(student)
    points, wanted = world.gather(student), world.gather(teacher)
    with torch.autocast(student.device.type, enabled=False):
        if kind in ("similarity", "similarity-mse", "rank"):
            points, wanted = F.normalize(points, dim=1), F.normalize(wanted, dim=1)
        rows = slice(first, first + own)
        return _RELATIONS[kind](points, wanted, rows, world, {"temperature": temperature, "margin": margin})


def _similarity(s: Tensor, t: Tensor, rows: slice, world: World, options: dict[str, float]) -> Tensor:
    if len(s) < 3:  # a distribution over one other row says nothing
        return s.sum() * 0
    mine = torch.arange(len(s), device=s.device)[rows]
    logs: list[Tensor] = []
    for points in (s, t):
        logits = points[rows] @ points.T / options["temperature"]
        logits = logits.scatter(1, mine[:, None], -torch.inf)
        logs.append(logits.log_softmax(1).scatter(1, mine[:, None], 0.0))  # 0 for both: the row itself adds nothing
    own, wanted = logs
    return _mean((wanted.exp() * (wanted - own)).sum(), len(own), world)


def _similarity_mse(s: Tensor, t: Tensor, rows: slice, world: World, options: dict[str, float]) -> Tensor:
    gaps = s[rows] @ s.T - t[rows] @ t.T
    return gaps.pow(2).sum() * (world.size / max(len(s), 1) ** 2)


def _rank(s: Tensor, t: Tensor, rows: slice, world: World, options: dict[str, float]) -> Tensor:
    i, j = torch.triu_indices(len(s), len(s), 1, device=s.device)
    pairs = len(i)
    if pairs < 2:
        return s.sum() * 0
    exact = s.dtype if s.device.type == "mps" else torch.float64
    # Products of equal rows may be rounded differently, and would be no tie: rounded once more, they are.
    own, wanted = (s @ s.T)[i, j], (t.to(exact) @ t.to(exact).T).float()[i, j]
    mine = ((i >= rows.start) & (i < rows.stop)).nonzero()[:, 0]  # a pair is the process's that has its first row
    # The hinge of (p, q) with d_p > d_q is margin - c_p + c_q where it is positive, so that only counts are needed.
    higher, lower, ties = violations(own.detach(), wanted, options["margin"], mine)
    moved = (own[mine].to(exact) * (lower - higher)).sum() + options["margin"] * higher.sum()
    # Each of these is two of the pairs of pairs, (p, q) and (q, p); a tie of the teacher costs the margin.
    total = 2 * moved + options["margin"] * ties.sum()
    return total.to(s.dtype) * (world.size / (pairs * (pairs - 1)))


def _distance(s: Tensor, t: Tensor, rows: slice, world: World, options: dict[str, float]) -> Tensor:
    n = len(s)
    if n < 2:
        return s.sum() * 0
    scaled: list[Tensor] = []
    for points in (s, t):
        distances = torch.cdist(points[rows], points, compute_mode="donot_use_mm_for_euclid_dist")
        mean = world.sum(distances.sum().reshape(1)) / (n * (n - 1))
        scaled.append(distances / mean.clamp_min(torch.finfo(mean.dtype).tiny))
    return F.smooth_l1_loss(scaled[0], scaled[1], reduction="sum") * (world.size / n**2)


def _norm(x: Tensor) -> Tensor:
    """The length of the vectors along the last dimension."""
    return cast(Tensor, cast(Any, torch.linalg).vector_norm(x, dim=-1))


def _angle(s: Tensor, t: Tensor, rows: slice, world: World, options: dict[str, float]) -> Tensor:
    n = len(s)

    def differ(part: Tensor, s: Tensor) -> Tensor:
        cosines: list[Tensor] = []
        for points in (s, t):
            gaps: Tensor = points[None] - points[part, None]
            sizes, far = _norm(points.detach()), _norm(gaps.detach())
            # The difference of two equal points is rounding, whose direction would be noise.
            floor = 1e3 * torch.finfo(points.dtype).eps * (sizes[None] + sizes[part, None])
            sides: Tensor = F.normalize(gaps, dim=2) * (far > floor)[..., None]
            cosines.append(sides @ sides.transpose(1, 2))
        return F.smooth_l1_loss(cosines[0], cosines[1], reduction="sum")

    mine = torch.arange(n, device=s.device)[rows]
    return _in_blocks(differ, mine, n * n, s) * (world.size / max(n, 1) ** 3)


_RELATIONS: dict[str, Callable[[Tensor, Tensor, slice, World, dict[str, float]], Tensor]] = {
    "similarity": _similarity, "similarity-mse": _similarity_mse, "rank": _rank, "distance": _distance, "angle": _angle,
}  # fmt: skip


def _in_blocks(f: Callable[[Tensor, Tensor], Tensor], rows: Tensor, each: int, points: Tensor) -> Tensor:
    """The sum of ``f(rows, points)`` over blocks of rows, of which the backward pass computes each anew."""
    total = points.sum() * 0
    size = max(1, _BLOCK // max(each, 1))
    for start in range(0, len(rows), size):
        total = total + recomputed(f, rows[start : start + size], points)
    return total


def _ready(student: Tensor, teacher: Tensor, world: World | None) -> tuple[Tensor, Tensor, World]:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.to(dtype), teacher.detach().to(dtype), world or LocalWorld()


def _mean(local_sum: Tensor, own: int, world: World) -> Tensor:
    count = world.sum(torch.tensor([own], device=local_sum.device)).clamp_min(1)
    return (local_sum * (world.size / count.to(local_sum.dtype))).sum()
