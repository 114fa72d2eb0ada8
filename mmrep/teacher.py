"""The teacher: an exponential moving average of the weights of chosen modules, whose outputs are targets.

(Tarvainen and Valpola 2017, arXiv:1703.01780; as in MoCo, BYOL, DINO, I-JEPA and data2vec.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config
from mmrep.schedules import Clock, Schedule

M = TypeVar("M", bound=nn.Module)


@config
class TeacherConfig:
    """momentum: share of the old weights that stays in each optimizer step, at the start; 0 copies the student.

    schedule: how it moves from there; by default by half a cosine to 1 at the end of the run (BYOL, section 3.3; a run
    of unknown length keeps the base). buffers: running statistics and other floating-point buffers are copied, or
    averaged like the weights. Integer buffers (counters) are always copied.
    """

    momentum: Annotated[float, Field(ge=0, le=1)] = 0.996
    schedule: Schedule | None = field(default_factory=lambda: Schedule(shape="cosine", end=1.0))
    buffers: Literal["copy", "ema"] = "copy"


class Teacher(nn.Module):
    """Copies of modules that follow them: ``copy = momentum * copy + (1 - momentum) * weights``, once a step.

    The copies are always in eval mode (dropout and drop-path off, running statistics resting) and have no gradient.
    They are kept in fp32: in bf16 a momentum of 0.9996 would not move them at all. Being parameters and buffers of this
    module they are in the checkpoint, so a resumed run is exact.

    Args:
        config: momentum and buffers.
        modules: what is copied, each once; one that is a part of another is not copied twice.
    """

    def __init__(self, config: TeacherConfig, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.config = config
        parts = {id(part) for module in modules for part in list(module.modules())[1:]}
        live = [m for i, m in enumerate(modules) if id(m) not in parts and all(m is not n for n in modules[:i])]
        self.__dict__["_live"] = live  # seen, not owned: as submodules their weights would be saved twice
        self.copies = nn.ModuleList(_fp32(copy.deepcopy(module)) for module in live)
        self.copies.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """A teacher is never in training mode."""
        return super().train(False)

    def of(self, module: M) -> M:
        """The copy of a module, or of a part of one.

        Raises:
            KeyError: it was not to be copied.
        """
        for live, copied in zip(self.__dict__["_live"], self.copies, strict=True):
            for part, twin in zip(live.modules(), copied.modules(), strict=True):
                if part is module:
                    return twin  # type: ignore[return-value]
        raise KeyError(f"{type(module).__name__} has no teacher: its objective must name it in taught()")

    @torch.no_grad()
    def update(self, clock: Clock) -> float:
        """Take in the weights of one optimizer step; returns the momentum that was used."""
        momentum = clock.value(self.config.momentum, self.config.schedule)
        copies: list[Tensor] = []
        weights: list[Tensor] = []
        for live, copied in zip(self.__dict__["_live"], self.copies, strict=True):
            copies += [p.detach() for p in copied.parameters()]
            weights += [p.detach() for p in live.parameters()]
            for buffer, twin in zip(live.buffers(), copied.buffers(), strict=True):
                if self.config.buffers == "ema" and buffer.is_floating_point():
                    copies.append(twin)
                    weights.append(buffer)
                else:
                    twin.copy_(buffer)
        if copies:
            moved = [w.to(c.dtype) for w, c in zip(weights, copies, strict=True)]
            torch._foreach_lerp_(copies, moved, 1 - momentum)
        return momentum


def _fp32(module: nn.Module) -> nn.Module:
    short = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
    return module.float() if short else module
