"""An exponential moving average of the trained weights, used in their place when a run is evaluated and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class WeightAverage(nn.Module):
    """``average = decay * average + (1 - decay) * weights`` after each optimizer step (Polyak and Juditsky 1992).

    Trainable parameters and floating-point buffers (running statistics) are averaged, in fp32 and in one fused pass;
    frozen ones stay as they are. In the first steps the decay is ``(1 + t) / (10 + t)`` if that is smaller, so that the
    random start is soon forgotten. The averages are buffers, so a checkpoint holds them and a resumed run is exact.
    Where the weights are sharded over processes (FSDP2), so are the averages.

    Args:
        module: whose weights are averaged.
        decay: 0 to 1; 0.99 averages over about the last 100 steps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.__dict__["_of"] = module  # seen, not owned: as a submodule its weights would be saved twice
        for i, value in enumerate(_averaged(module)):
            self.register_buffer(f"average_{i}", value.detach().float().clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self._count: int | None = None  # of `updates`, since reading that would wait for the device in every step

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Averages and weights of this process; looked up anew, since moving a module replaces its buffers."""
        live = _averaged(self.__dict__["_of"])
        for i, value in enumerate(live):
            average = self.get_buffer(f"average_{i}")
            if isinstance(value, DTensor) and not isinstance(average, DTensor):
                average = distribute_tensor(average, value.device_mesh, value.placements)
                self.register_buffer(f"average_{i}", average)
        return [_local(self.get_buffer(f"average_{i}")) for i in range(len(live))], [_local(value) for value in live]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one optimizer step."""
        updates = self.get_buffer("updates").add_(1)
        t = self._count = int(updates) if self._count is None else self._count + 1
        weight = 1 - min(self.decay, (1 + t) / (10 + t))
        averages, live = self._pairs()
        torch._foreach_lerp_(averages, [value.detach().float() for value in live], weight)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._count = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in the place of the weights, and the weights back at the end."""
        averages, live = self._pairs()
        with torch.no_grad():
            kept = [value.detach().clone() for value in live]
            torch._foreach_copy_(live, averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(live, kept)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _averaged(module: nn.Module) -> list[Tensor]:
    """Trainable parameters, and the floating-point buffers of modules that hold one or that keep statistics."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    own = (
        part for part in module.modules()
        if any(p.requires_grad for p in part.parameters(recurse=False))
        or (isinstance(part, nn.modules.batchnorm._NormBase) and not part.affine)
    )  # fmt: skip
    buffers = [b for part in own for b in part.buffers(recurse=False) if b.is_floating_point()]
    return [*parameters, *buffers]
