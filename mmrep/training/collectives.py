"""Collectives with gradients between the ranks of ``torch.distributed``: `mmrep.world.World` over many processes.

Ranks may hold unequal numbers of rows, none included. Before any payload travels, the ranks tell each other what they
are about to send, so that a mismatch is an error on every rank rather than a hang.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrep.world import LocalWorld, World

# Renamed in torch 2.14, which warns of the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_MAX_DIMS = 8
_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def world() -> World:
    """The ranks of the default process group, or the one process where none is initialised."""
    if dist.is_available() and dist.is_initialized():
        return DistributedWorld()
    return LocalWorld()


class DistributedWorld:
    """The ranks of an initialised process group (by default all of them).

    Tensors must live on a device that the group's backend serves: CPU for gloo, CUDA for NCCL. Each verb, and the
    backward pass of each verb that has one, is collective: all ranks call it, in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._size = dist.get_world_size(group)
        self._rank = dist.get_rank(group)

    @property
    def size(self) -> int:
        """See `World.size`."""
        return self._size

    @property
    def rank(self) -> int:
        """See `World.rank`."""
        return self._rank

    def gather(self, x: Tensor) -> Tensor:
        """See `World.gather`. Any dtype that a rank may hold; only the first dimension may differ between ranks.

        If the rows of any rank need a gradient, the result does on all ranks, so that all meet in the backward pass.

        Raises:
            ValueError: on every rank, with a table, where dtype or trailing shape differ.
        """
        sizes, needs_grad = self._announce(x)
        if needs_grad and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        return _Gather.apply(x, sizes, self._rank, self._group)

    def logsumexp(self, x: Tensor) -> Tensor:
        """See `World.logsumexp`. ``x`` has one shape on all ranks and needs a gradient on all or on none."""
        return _LogSumExp.apply(x, self._group)

    def sum(self, x: Tensor) -> Tensor:
        """See `World.sum`. ``x`` has one shape on all ranks and needs a gradient on all or on none."""
        return _Sum.apply(x, self._group)

    def offset(self, n: int) -> int:
        """See `World.offset`."""
        return int(sum(row[0] for row in self._exchange([n])[: self._rank]))

    def sizes(self, x: Tensor) -> list[int]:
        """See `World.sizes`. Any dtype that `gather` takes."""
        return self._announce(x)[0]

    def shift(self, x: Tensor, rows: int) -> Tensor:
        """See `World.shift`. Sends and receives are posted together, so that no order of ranks can deadlock."""
        if self._size == 1:
            return x
        arriving = x.new_empty(rows, *x.shape[1:])
        posted = [
            dist.P2POp(operation, tensor, group=self._group, group_peer=(self._rank + step) % self._size)
            for operation, tensor, step in ((dist.isend, x.contiguous(), 1), (dist.irecv, arriving, -1))
            if tensor.numel()  # nothing is sent of no rows: the sizes have told the receiver so
        ]
        for work in dist.batch_isend_irecv(posted) if posted else ():
            work.wait()
        return arriving

    def _announce(self, x: Tensor) -> tuple[list[int], bool]:
        """Tell shape and dtype; return every rank's number of rows, and whether any rank needs a gradient."""
        known = 1 <= x.ndim <= _MAX_DIMS and x.dtype in _DTYPES
        shape = [*x.shape, *[-1] * (_MAX_DIMS - x.ndim)][:_MAX_DIMS]
        dtype = _DTYPES.index(x.dtype) if x.dtype in _DTYPES else -1
        table = self._exchange([int(known), int(x.requires_grad), dtype, *shape], x.device)
        if not all(row[0] for row in table) or len({tuple([row[2], *row[4:]]) for row in table}) > 1:
            lines = [
                f"  rank {rank}: [{', '.join(str(n) for n in row[3:] if n >= 0)}] "
                f"{_DTYPES[row[2]] if row[2] >= 0 else 'unsupported dtype'}"
                for rank, row in enumerate(table)
            ]
            raise ValueError(
                "cannot exchange rows: ranks must agree in dtype and in all dimensions but the first, "
                f"of 1 to {_MAX_DIMS} dimensions:\n" + "\n".join(lines)
            )
        return [row[3] for row in table], any(row[1] for row in table)

    def _exchange(self, numbers: list[int], device: torch.device | None = None) -> list[list[int]]:
        device = device if device is not None and device.type != "cpu" else _backend_device(self._group)
        here = torch.tensor(numbers, dtype=torch.int64, device=device)
        table = here.new_empty(self._size, len(numbers))
        _all_gather(table.view(-1), here, group=self._group)
        return table.tolist()


def _backend_device(group: dist.ProcessGroup | None) -> torch.device:
    """A device on which the group can exchange small tensors."""
    if "nccl" in dist.get_backend(group) and "gloo" not in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _pad(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x.contiguous()
    padded = x.new_zeros(rows, *x.shape[1:])
    padded[: len(x)] = x
    return padded


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], rank: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.rank, ctx.group = sizes, rank, group
        longest = max(sizes)
        gathered = x.new_empty(len(sizes) * longest, *x.shape[1:])
        if gathered.numel():
            _all_gather(gathered, _pad(x, longest), group=group)
        if min(sizes) == longest:
            return gathered
        return torch.cat([part[:n] for part, n in zip(gathered.split(longest), sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sizes: list[int] = ctx.sizes
        longest = max(sizes)
        mine = grad.new_empty(longest, *grad.shape[1:])
        if mine.numel():
            padded = torch.cat([_pad(part, longest) for part in grad.split(sizes)])
            _reduce_scatter(mine, padded, group=ctx.group)
        return mine[: sizes[ctx.rank]], None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        largest = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shift = largest.masked_fill(largest == -torch.inf, 0)  # nothing anywhere: exp(-inf - 0) = 0, log 0 = -inf
        total = (x - shift).exp_()
        dist.all_reduce(total, group=group)
        result = total.log_().add_(shift)
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, result = ctx.saved_tensors
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        share = (x - result).exp_().masked_fill_(x == -torch.inf, 0)
        return total.masked_fill_(x == -torch.inf, 0).mul_(share), None
