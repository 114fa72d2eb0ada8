"""The Accelerate engine of a run: devices, processes and number formats."""

from __future__ import annotations

import os
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def accelerator(precision: Precision, *, deterministic: bool = False) -> Accelerator:
    """The engine, as the launcher (``accelerate launch``, ``torchrun``, or none) and the machine want it.

    Args:
        precision: number format of matrix products; weights stay fp32.
        deterministic: refuse kernels that are not reproducible.

    Raises:
        ValueError: fp16 without a GPU, or processes that a launcher started and Accelerate does not see.
    """
    cpu = not torch.accelerator.is_available()  # torchrun on CPUs: without being told, Accelerate starts no group
    if precision == "fp16" and cpu:
        raise ValueError("precision fp16 needs a GPU; use bf16, fp32 or auto")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(deterministic)
    AcceleratorState._reset_state()  # a second run in one process may choose another precision; groups are kept
    engine = Accelerator(
        cpu=cpu,
        mixed_precision=_mixed_precision(precision),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != engine.num_processes:
        raise ValueError(
            f"the launcher started {started} processes, but Accelerate runs {engine.num_processes}: it was set up "
            "earlier in this process for one; create the trainer first"
        )
    return engine


def _mixed_precision(precision: Precision) -> str | None:
    if precision != "auto":
        return "no" if precision == "fp32" else precision
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None  # accelerate launch, or accelerate config, has chosen
    return "bf16" if has_fast_bf16() else "no"


def has_fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def start_processes() -> None:
    """Join the processes of the launcher, if there is one, before anything is shared between them."""
    PartialState(cpu=not torch.accelerator.is_available())


def barrier() -> None:
    """Wait until every process is here."""
    PartialState(cpu=not torch.accelerator.is_available()).wait_for_everyone()


def share_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers (statistics of batch norm), which are also what is saved."""
    if dist.is_available() and dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def end_processes() -> None:
    """Leave the other processes in order; a process that just exits can be aborted by its communication threads."""
    PartialState(cpu=not torch.accelerator.is_available()).destroy_process_group()
