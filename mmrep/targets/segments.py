"""Segments of a sequence, found in the teacher's own tokens: each token is to say the mean of its segment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.targets.teacher import TeacherTarget, TeacherTargetConfig
from mmrep.tokens import Content, Grid

if TYPE_CHECKING:
    from mmrep.step import Step


@config
class SegmentsConfig(TeacherTargetConfig):
    """threshold: a token joins the segment before it where its cosine with the segment's mean is at least this.

    quiet: tokens whose length is below this share of the mean length of the sample's tokens are in no segment, and
    their target is zero; 0 = none is. layers, norm, final: of the tokens that are segmented; see ``teacher``.
    """

    threshold: Annotated[float, Field(gt=-1, le=1)] = 0.5
    quiet: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Segments(TeacherTarget):
    """Self-segmentation distillation (Sylber, Cho et al. 2024, arXiv:2410.07168, section 3).

    The teacher's tokens are segmented greedily, in order of their first coordinate and in linear time; what is to be
    said of a token is the mean of the teacher's tokens over its segment.
    """

    Config = SegmentsConfig
    losses = ("mse", "l1", "smooth-l1", "cosine")

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> Content:
        """See `Target.forward`."""
        config = cast(SegmentsConfig, self.config)
        values = super().forward(step, field, view).values
        grid = step.tokens(field, view).grid
        among = grid.valid & ~grid.special
        _check(grid, among)
        if config.quiet:
            length = values.norm(dim=-1)
            mean = (length * among).sum(1, keepdim=True) / among.sum(1, keepdim=True).clamp_min(1)
            among = among & (length >= config.quiet * mean)
        number = segment(values, among, config.threshold)
        S = int(number.max()) + 1 if number.numel() else 0
        at = number.clamp_min(0)[..., None].expand_as(values)
        weight = among[..., None].to(values.dtype)
        sums = values.new_zeros(len(values), max(S, 1), values.shape[-1]).scatter_add(1, at, values * weight)
        counts = values.new_zeros(len(values), max(S, 1), 1).scatter_add(1, at[..., :1], weight)
        self._parts = {"segments": (number.amax(1) + 1).float().mean() if number.numel() else values.new_zeros(())}
        return Content((sums / counts.clamp_min(1)).gather(1, at) * weight)

    def parts(self) -> dict[str, Tensor]:
        """See `Target.parts`: ``segments`` of a sample, on average; at 1 each is one vector."""
        return getattr(self, "_parts", {})


def segment(values: Tensor, among: Tensor, threshold: float) -> Tensor:
    """Number of each token's segment, from 0 in each sample, -1 where not ``among``: int64 [B, N].

    A token that is ``among`` bool [B, N] joins the segment of the token before it where its cosine with the mean of
    what that segment has by then is at least ``threshold``; else it begins one, as it does behind one that is not.
    """
    B, N, _ = values.shape
    number = torch.full((B, N), -1, device=values.device)
    current = number.new_full((B,), -1)
    total, inside = torch.zeros_like(values[:, 0]) if N else values.new_zeros(B, 0), among.new_zeros(B)
    for n in range(N):
        token, here = values[:, n], among[:, n]
        near = torch.cosine_similarity(token, total, dim=1) >= threshold
        joins = here & inside & near
        current = current + (here & ~joins).long()
        total = torch.where(joins[:, None], total + token, torch.where(here[:, None], token, total))
        number[:, n] = torch.where(here, current, -1)
        inside = here
    return number


def _check(grid: Grid, among: Tensor) -> None:
    """Refuse tokens that stand beside each other: they are no sequence.

    Raises:
        ValueError: two tokens of a sample have one first coordinate, or they are not in its order.
    """
    place = grid.coords[..., 0]
    both = among[:, 1:] & among[:, :-1]
    if bool((both & (place[:, 1:] <= place[:, :-1])).any()):
        raise ValueError(
            "target 'segments' takes a sequence of tokens, one after the other along their first coordinate"
        )
