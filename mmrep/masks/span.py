"""Spans of a sequence hidden (wav2vec 2.0, arXiv:2006.11477, section 3.1; HuBERT, data2vec).

With spans of geometric length it is the masking of SpanBERT (arXiv:1907.10529, section 3.1) and T5 (arXiv:1910.10683).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from mmrep.config import config
from mmrep.masks._blocks import Ratio, whole
from mmrep.masks.masker import Masker, draw, grouped, lowest, maskable, ranked, share
from mmrep.tokens import Grid, Mask


@config
class SpanMaskConfig:
    """ratio: share of a sample's tokens that ends up hidden, exactly; not the share of them that begins a span.

    length: of a span, in tokens: of each, or the mean. lengths: ``fixed``, or drawn from a ``geometric`` distribution.
    masks: of a sample, at once.
    """

    ratio: Ratio = 0.5
    length: Annotated[int, Field(ge=1)] = 10
    lengths: Literal["fixed", "geometric"] = "fixed"
    masks: Annotated[int, Field(ge=1)] = 1


class SpanMask(Masker):
    """Spans that do not overlap hide exactly ``round(ratio * n)`` of a sample's n tokens; the rest is visible.

    Spans and visible tokens are shuffled on a circle, which is then cut open at a random place. So each token is hidden
    equally often, the first and the last too, and a span that the cut meets is split between the two ends. One span is
    shorter than the others where their length does not divide the count; two spans may touch.
    """

    Config = SpanMaskConfig
    grids = frozenset({"sequence"})

    def __call__(self, grid: Grid, seeds: Tensor, progress: float = 0.0) -> Mask:
        """See `Masker.__call__`; groups are ``masks`` visible and ``masks`` target."""
        self.accept(grid)
        config = cast(SpanMaskConfig, self.config)
        groups, among = config.masks, maskable(grid).repeat_interleave(config.masks, 0)
        count = among.sum(1)
        wanted = share(config.ratio, count)
        circle = _circle(
            self._lengths(seeds, wanted, among.shape[1]), count, wanted, draw(seeds, groups, among.shape[1])
        )
        turn = whole(draw(seeds, groups, 1, 1)[:, 0], count)
        place = ranked(grid.coords[..., 0].repeat_interleave(groups, 0), among)
        hidden = among & circle.gather(1, (place + turn[:, None]) % count.clamp_min(1)[:, None])
        return Mask(visible=grouped(among & ~hidden, groups), target=grouped(hidden, groups))

    def _lengths(self, seeds: Tensor, wanted: Tensor, n: int) -> Tensor:
        """Lengths of spans that sum to ``wanted`` int64 [R]: int64 [R, n], 0 behind the last."""
        config = cast(SpanMaskConfig, self.config)
        lengths = torch.full((len(wanted), n), config.length, device=wanted.device)
        if config.lengths == "geometric" and config.length > 1:
            u = draw(seeds, config.masks, n, 2).double()
            lengths = 1 + ((1 - u).log() / math.log(1 - 1 / config.length)).floor().long()
        ends = lengths.cumsum(1).minimum(wanted[:, None])
        return ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))


def _circle(lengths: Tensor, count: Tensor, wanted: Tensor, scores: Tensor) -> Tensor:
    """Spans of ``lengths`` int64 [R, N] among single tokens, in random order: bool [R, N], True in a span.

    Args:
        lengths: 0 behind the last span.
        count: int64 [R], tokens in all.
        wanted: int64 [R], tokens in spans.
        scores: float [R, N] in [0, 1), random, to order by.
    """
    (R, N), spans = lengths.shape, (lengths > 0).sum(1)
    if N == 0:
        return scores > 1
    items = torch.arange(N, device=lengths.device) < (count - wanted + spans)[:, None]
    chosen = lowest(scores, items, spans)
    which = (chosen.long().cumsum(1) - 1).clamp_min(0)
    length = torch.where(chosen, lengths.gather(1, which), items.long())
    end = length.cumsum(1)
    change = torch.zeros(R, N + 1, dtype=torch.long, device=lengths.device)
    change.scatter_add_(1, end - length, chosen.long()).scatter_add_(1, end, -chosen.long())
    return change.cumsum(1)[:, :N] > 0
