"""Heads of self-distilling objectives: an MLP on embeddings or pooled features, prototypes behind it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrep.world import World

Norm = Literal["batch", "layer", "none"]


class BatchNorm(nn.Module):
    """Batch normalisation (arXiv:1502.03167) by the statistics of all processes, in training; running ones later.

    `torch.nn.BatchNorm1d` takes those of each process, and `torch.nn.SyncBatchNorm` runs on GPUs alone. Here the mean
    and the variance go through the `World`, so that many processes compute what one would, with any number of rows.
    """

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, x: Tensor, world: World) -> Tensor:
        """[n, width] to [n, width], float32 (or float64). Of fewer than two rows, running statistics are used."""
        x = x if x.dtype == torch.float64 else x.float()
        mean, variance = self.running_mean, self.running_var
        if self.training:
            n = world.sum(torch.tensor(len(x), device=x.device))
            if int(n) > 1:
                mean = world.sum(x.sum(0)) / n
                variance = world.sum((x - mean).square().sum(0)) / n
                with torch.no_grad():
                    self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                    self.running_var.lerp_((variance * n / (n - 1)).to(self.running_var.dtype), self.momentum)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


class MLP(nn.Module):
    """Linear maps with a norm and an activation between them; the last is bare.

    Args:
        widths: of the input, of what is between, of the output.
        norm: between the linear maps; ``batch`` is `BatchNorm`.
        activation: ``relu`` (BYOL, SimSiam) or ``gelu`` (DINO).
    """

    def __init__(self, widths: Sequence[int], norm: Norm, activation: Literal["relu", "gelu"] = "relu") -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(a, b, bias=True) for a, b in pairwise(widths))
        kinds = {"batch": BatchNorm, "layer": nn.LayerNorm, "none": lambda width: nn.Identity()}
        self.norms = nn.ModuleList(kinds[norm](width) for width in widths[1:-1])
        self.activation = F.relu if activation == "relu" else F.gelu

    def forward(self, x: Tensor, world: World) -> Tensor:
        """[n, widths[0]] to [n, widths[-1]]; every process calls it."""
        for linear, norm in zip(self.maps, self.norms, strict=False):
            x = linear(x)
            x = self.activation(norm(x, world) if isinstance(norm, BatchNorm) else norm(x))
        return self.maps[-1](x)


class Prototypes(nn.Module):
    """Cosines [n, K] of rows [n, width] to K learned directions.

    A direction is the weight's row brought to unit length, which is the weight normalisation of DINO with its gain held
    at 1 (arXiv:2104.14294, appendix C): neither its length nor weight decay changes anything.
    """

    def __init__(self, width: int, K: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(K, width), std=0.02))

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Float32 (or float64); ``frozen`` prototypes get a gradient of zero."""
        x = x if x.dtype == torch.float64 else x.float()
        weight = self.weight.detach() + 0 * self.weight if frozen else self.weight
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x, dim=-1, eps=1e-6), F.normalize(weight.to(x.dtype), dim=-1))
