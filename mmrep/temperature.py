"""How similarities become logits: a learned or fixed scale, and a bias."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrep.config import config


@config
class TemperatureConfig:
    """How similarities become logits: ``scale * cosine + bias``.

    scale: initial value, 1 / temperature. learned: train it. max_scale, min_scale: bounds applied after each step; a
    start (or a loaded checkpoint) outside them widens them, so that nothing is cut by the first step. bias: initial
    additive bias, for the sigmoid loss; None = no bias.
    """

    scale: Annotated[float, Field(gt=0)] = 1 / 0.07
    learned: bool = True
    max_scale: Annotated[float, Field(gt=0)] | None = 100.0
    min_scale: Annotated[float, Field(gt=0)] = 1.0
    bias: float | None = None


class Temperature(nn.Module):
    """A learned (or fixed) logit scale, kept in fp32 and as a logarithm, with an optional bias.

    Both are kept in fp32 whatever the model is cast to: in bf16 a scale near 100 cannot move by less than 3 %.
    """

    def __init__(self, config: TemperatureConfig) -> None:
        super().__init__()
        self.config = config
        # [1] rather than 0-D: FSDP2 shards dimension 0.
        self.log_scale = nn.Parameter(_fp32(config.scale).log(), requires_grad=config.learned)
        self.bias = None if config.bias is None else nn.Parameter(_fp32(config.bias), requires_grad=config.learned)
        self._highest = self._lowest = config.scale

    @property
    def scale(self) -> Tensor:
        """exp(log_scale), float32 [1], differentiable."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Apply the bounds, after each optimizer step; inside forward they would kill the gradient."""
        lowest = min(self.config.min_scale, self._lowest)
        highest = None if self.config.max_scale is None else max(self.config.max_scale, self._highest)
        self.log_scale.clamp_(math.log(lowest), None if highest is None else math.log(highest))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        key = prefix + "log_scale"
        if key in state_dict:  # older files hold a 0-D scale
            state_dict[key] = state_dict[key].reshape(1)
            stored: Any = state_dict[key]
            stored = stored.full_tensor() if hasattr(stored, "full_tensor") else stored  # FSDP2: a shard may be empty
            loaded = float(stored.float().exp())
            # Only outwards: a run that began at 112 and resumes at 105 keeps its bound of 112.
            self._highest, self._lowest = max(self._highest, loaded), min(self._lowest, loaded)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Temperature:
        super()._apply(fn, recurse)
        for parameter in self.parameters(recurse=False):
            parameter.data = parameter.data.float()
        return self


def _fp32(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32)
