"""A large batch in micro-batches: one loss over all embeddings, in the memory of one micro-batch.

GradCache (Gao et al. 2021, arXiv:2101.06983, section 3): the embeddings of all micro-batches are computed without a
graph; the loss is computed once, on them as leaves; each micro-batch is then computed again, with the same random
numbers, and the gradient of its leaves is pushed into the tower. The gradient is that of the whole batch, for any loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mmrep.data.batch import Batch
from mmrep.model import Tower
from mmrep.step import Step
from mmrep.tokens import Content, Encoding, Inputs, Tokens
from mmrep.views.view import Params

Key = tuple[str, int]


class CachedStep(Step):
    """A `Step` over a batch with parts, for objectives that couple samples.

    `embedding` is answered by a leaf. What belongs to single tokens (`encoding`, `inputs`, `params`) is refused: over
    the whole batch it would take the memory that the parts are there to save.

    Args:
        model: the towers.
        batch: a batch with parts.
        passes: number of parts of every process; this process gets empty ones if it has fewer.
        **options: as `Step`.
    """

    def __init__(self, model: Any, batch: Batch, *, passes: int, **options: Any) -> None:
        super().__init__(model, batch, **options)
        assert 1 <= len(batch.parts) <= passes, "the number of passes is the largest of all processes"
        self._options = options
        self._parts = [*batch.parts, *[Batch(ids=[])] * (passes - len(batch.parts))]
        self._random: dict[Key, list[list[Tensor]]] = {}

    @property
    def passes(self) -> int:
        """Number of parts, the same on every process."""
        return len(self._parts)

    def part(self, number: int) -> Step:
        """A part as a step of its own."""
        return Step(self.model, self._parts[number], **self._options)

    def embedding(self, field: str, view: int = 0) -> Tensor:
        """See `Step.embedding`: a leaf, in whose gradient that of the loss is collected; a fusion is one of leaves."""
        if field in self.model.fusions:
            return self._fuse(field)
        key = (field, view)
        if key not in self._embeddings:
            tower, states, chunks = self.tower(field), [], []
            with torch.no_grad(), _buffers_kept(tower):
                for number in range(self.passes):
                    states.append(_random_state(self.model.device))
                    chunks.append(self.part(number).embedding(field, view))
            self._random[key] = states
            self._embeddings[key] = torch.cat(chunks).requires_grad_(any(p.requires_grad for p in tower.parameters()))
        return self._embeddings[key]

    def features(self, field: str) -> Tensor:
        """See `Step.features`."""
        return torch.cat([self.part(number).features(field) for number in range(self.passes)])

    def embedding_by(self, twin: Tower, field: str, view: int = 0) -> Tensor:
        """See `Step.embedding_by`."""
        return torch.cat([self.part(number).embedding_by(twin, field, view) for number in range(self.passes)])

    def taught_embedding(self, field: str, view: int = 0) -> Tensor:
        """See `Step.taught_embedding`."""
        return torch.cat([self.part(number).taught_embedding(field, view) for number in range(self.passes)])

    def encoding(self, field: str, view: int = 0) -> Encoding:
        """Refused."""
        self._refuse("encoding")

    def pooled(self, field: str, view: int = 0) -> Tensor:
        """Refused."""
        self._refuse("pooled")

    def taught_pooled(self, field: str, view: int = 0) -> Tensor:
        """Refused."""
        self._refuse("taught_pooled")

    def tokens(self, field: str, view: int = 0) -> Tokens:
        """Refused."""
        self._refuse("tokens")

    def content(self, field: str, view: int = 0) -> Content:
        """Refused."""
        self._refuse("content")

    def taught(self, field: str, view: int = 0, layers: tuple[int, ...] = ()) -> Encoding:
        """Refused."""
        self._refuse("taught")

    def inputs(self, field: str, view: int = 0) -> Inputs:
        """Refused."""
        self._refuse("inputs")

    def params(self, field: str, view: int = 0) -> Params:
        """Refused."""
        self._refuse("params")

    def replay(self, number: int, scale: float = 1.0) -> tuple[Step, Tensor]:
        """Compute a part again, now with a graph.

        Args:
            number: which part.
            scale: what the loss was multiplied by before its backward pass (fp16).

        Returns:
            The part as a step that knows its embeddings, and the scalar whose gradient is the part's share of the
            gradient of the loss.
        """
        step = self.part(number)
        start = sum(len(part) for part in self._parts[:number])
        total = torch.zeros((), device=self.model.device)
        after = _random_state(self.model.device)
        for (field, view), leaf in self._embeddings.items():
            if leaf.grad is None:
                continue
            _set_random_state(self._random[field, view][number], self.model.device)
            found = step.embedding(field, view)
            total = total + (found * (leaf.grad[start : start + len(found)] / scale)).sum()
        _set_random_state(after, self.model.device)
        return step, total

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"an objective that couples samples asks for {what}() of a batch in micro-batches, which caches embeddings "
            "alone: set train.micro_batch to null, or give the objective scope = 'sample'"
        )


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Leave running statistics as they were: the second pass counts them."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def _random_state(device: torch.device) -> list[Tensor]:
    """The state of torch's generators; views need none of it, dropout and drop-path do."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        restore: Callable[..., None] = torch.get_device_module(device).set_rng_state
        restore(states[1], device)
