"""What code targets are made of: standardised content, nearest codes, and codebooks that follow their data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmrep.model import Tower
from mmrep.targets.target import look
from mmrep.tokens import Content
from mmrep.world import World

if TYPE_CHECKING:
    from mmrep.step import Step

ROWS = 4096
"""Of so many vectors at once the distances to all codes are in memory."""


@torch.no_grad()
def nearest(values: Tensor, codes: Tensor) -> Tensor:
    """Which of ``codes`` [K, D] is nearest to each of ``values`` [n, D]: int64 [n]."""
    with torch.autocast(values.device.type, enabled=False):  # in bf16 near codes are taken for each other
        codes = codes.to(values.dtype)
        half = codes.square().sum(1) / 2
        chosen = [(half - part @ codes.T).argmin(1) for part in values.split(ROWS)]
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.long, device=values.device)


def perplexity(share: Tensor) -> Tensor:
    """``exp`` of the entropy of shares [..., K] that sum to 1: how many codes are in use; near 1 the target is dead."""
    return (-torch.special.xlogy(share, share).sum(-1)).exp()


def spread(codes: Tensor, rows: Tensor) -> Tensor:
    """Codes [n, C] of the tokens where bool [B, N] is True, among all tokens: int64 [B, N, C], 0 elsewhere."""
    out = codes.new_zeros(*rows.shape, codes.shape[1])
    out[rows] = codes
    return out


class Figures(nn.Module):
    """The content of a field's tokens, each figure minus its mean, over its deviation.

    The statistics are those of all tokens of all processes in the first ``settle`` batches of training; then they rest,
    since codes that go on changing their meaning cannot be learned. They are buffers, in the checkpoint with the rest.
    """

    def __init__(self, tower: Tower, settle: int) -> None:
        super().__init__()
        content = tower.encoder.content(look(tower.encoder).inputs)
        if content.vocabulary is not None or content.points is not None:
            raise ValueError(f"{tower.modality} tokens are no list of measured values: their codes would mean nothing")
        self.width, self.settle = content.values.shape[-1], settle
        self.register_buffer("sums", torch.zeros(3, self.width, dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.sums: Tensor  # count, sum and sum of squares of each figure
        self.batches: Tensor

    @torch.no_grad()
    def forward(self, step: Step, field: str, view: int = 0) -> tuple[Tensor, Tensor, Content]:
        """Figures float32 [n, P] of the tokens of bool [B, N] (neither padding nor special), and the content itself."""
        grid, content = step.tokens(field, view).grid, step.content(field, view)
        rows = grid.valid & ~grid.special
        values = content.values[rows].float()
        observed = None if content.observed is None else content.observed[rows]
        if observed is not None:
            values = values.masked_fill(~observed, 0)
        self._count(values, observed, step.world)
        count, total, squares = self.sums.unbind()
        mean = total / count.clamp_min(1)
        deviation = (squares / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
        # A figure that never changes says nothing; before any batch was seen, figures are taken as they are.
        scale = torch.where(count > 0, deviation, torch.ones_like(deviation))
        scaled = ((values - mean) / scale.clamp_min(1e-5)).float()
        return scaled if observed is None else scaled.masked_fill(~observed, 0), rows, content

    def absent(self, step: Step) -> None:
        """See `Target.absent`."""
        nothing = self.sums.new_zeros(0, self.width, dtype=torch.float32)
        self._count(nothing, None, step.world)

    @torch.no_grad()
    def _count(self, values: Tensor, observed: Tensor | None, world: World) -> None:
        if not self.training or int(self.batches) >= self.settle:
            return
        seen = torch.ones_like(values) if observed is None else observed
        wide = values.double()
        sums = torch.stack([seen.double().sum(0), wide.sum(0), wide.square().sum(0)])
        self.sums += world.sum(sums)
        self.batches += 1


class Codebook(nn.Module):
    """K codes that are the moving averages of what is nearest to them: k-means over the stream of batches.

    ``weight = decay * weight + (1 - decay) * count`` and ``code * weight`` likewise, for codes that were chosen (van
    den Oord et al. 2017, arXiv:1711.00937, appendix A.1). It starts at vectors of the first batch.

    Attributes:
        used: how many codes the last batch of this process used: the `perplexity` of their shares. ``weight`` does not
            tell, since a code that is no longer chosen keeps its own.
    """

    def __init__(self, size: int, width: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.randn(size, width))
        self.register_buffer("weight", torch.ones(size))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.codes: Tensor
        self.weight: Tensor
        self.started: Tensor
        self.used = torch.ones(())
        # Not a buffer: DDP would overwrite it between micro-batches, and after a step it is spent.
        self._seen: Tensor | None = None

    @torch.no_grad()
    def forward(self, values: Tensor, world: World) -> Tensor:
        """The nearest codes of ``values`` float32 [n, D]: int64 [n]. In training they are counted, for `update`.

        Every process must call it, with no rows where it has none.
        """
        if self.training and not bool(self.started):
            self._start(world.gather(values))
        chosen = nearest(values, self.codes)
        counts = torch.bincount(chosen, minlength=len(self.codes)).float()
        self.used = perplexity(counts / counts.sum().clamp_min(1))
        if self.training:
            seen = torch.zeros_like(self.codes[:, :1]).expand(-1, values.shape[1] + 1).clone()
            seen.index_add_(0, chosen, torch.cat([torch.ones_like(values[:, :1]), values], 1))
            self._seen = seen if self._seen is None else self._seen + seen
        return chosen

    @torch.no_grad()
    def update(self, world: World) -> None:
        """Move the codes to what all processes saw since the last call."""
        if self._seen is None:
            return
        seen, self._seen = world.sum(self._seen), None
        count, total = seen[:, 0], seen[:, 1:]
        weight = self.decay * self.weight + (1 - self.decay) * count
        codes = (self.decay * self.weight[:, None] * self.codes + (1 - self.decay) * total) / weight[:, None]
        chosen = count > 0
        self.codes.copy_(torch.where(chosen[:, None], codes, self.codes))
        self.weight.copy_(torch.where(chosen, weight, self.weight))

    def _start(self, values: Tensor) -> None:
        """Take vectors evenly from those of all processes; of too few, all, and the other codes stay random."""
        n, size = len(values), len(self.codes)
        if n:
            m = min(n, size)
            self.codes[:m] = values[torch.arange(m, device=values.device) * n // m]
            self.started.fill_(True)
