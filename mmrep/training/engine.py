"""The Accelerate engine of a run: devices, processes, sharding and number formats.

How processes are started and whether they replicate (DDP) or shard (FSDP2) the weights is Accelerate's own business:
``accelerate config`` and ``accelerate launch``, their environment variables, or plain ``torchrun``.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from mmrep.config import ConfigError
from mmrep.training.state import load_module, module_packet

Precision = Literal["auto", "fp32", "bf16", "fp16"]
M = TypeVar("M", bound=nn.Module)

TIMEOUT = timedelta(hours=1)
"""How long a process waits for another in one collective. A killed process is noticed at once, because its connections
close; this is for one that hangs. It must exceed what only the first process does: ranking, probes, saving."""


def accelerator(precision: Precision, *, deterministic: bool = False) -> Accelerator:
    """The engine, as the launcher (``accelerate launch``, ``torchrun``, or none) and the machine want it.

    Args:
        precision: number format of matrix products; weights stay fp32.
        deterministic: refuse kernels that are not reproducible.

    Raises:
        ValueError: fp16 without a GPU, or processes that a launcher started and Accelerate does not see.
        ConfigError: an engine that cannot keep our promises, or processes that a launcher was to start and did not.
    """
    cpu = _on_cpu()  # torchrun on CPUs: without being told, Accelerate starts no group
    if precision == "fp16" and cpu:
        raise ValueError("precision fp16 needs a GPU; use bf16, fp32 or auto")
    _refuse()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(deterministic)
    # A second run in one process may choose another precision or engine; the group of processes is kept.
    AcceleratorState._reset_state(reset_partial_state=True)
    engine = Accelerator(
        cpu=cpu,
        mixed_precision=_mixed_precision(precision),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True), InitProcessGroupKwargs(timeout=TIMEOUT),
        ],
    )  # fmt: skip
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != engine.num_processes:
        raise ValueError(
            f"the launcher started {started} processes, but Accelerate runs {engine.num_processes}: it was set up "
            "earlier in this process for one; create the trainer first"
        )
    if _asked("ACCELERATE_USE_FSDP"):
        _set_up_sharding(engine)
    return engine


def prepare(
    engine: Accelerator, root: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Spread a module, on its device already, and its optimizer over the processes.

    Returns:
        The module to call in a training step, and the optimizer to step. Under FSDP2 ``root`` itself is sharded.
    """
    if not engine.is_fsdp2:
        return cast(Any, engine.prepare(root, optimizer))
    cast(Any, root).to(memory_format=torch.contiguous_format)  # it cannot shard channels-last weights
    for tensor in [*root.parameters(), *root.buffers()]:  # as DDP does: all start from the first process's weights
        dist.broadcast(tensor.detach(), 0)
    parallel, prepared = cast(Any, engine.prepare(root, optimizer))
    inside: Callable[..., Any] = parallel.forward

    def forward(*args: Any, **options: Any) -> Any:
        with engine.autocast():
            return inside(*args, **options)

    parallel.forward = forward
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD):  # DTensor has no rule for the fused kernel of SGD
            group.update(fused=False, foreach=True)
    return parallel, prepared


def is_sharded(module: nn.Module) -> bool:
    """Whether processes hold parts of its weights, so that it cannot be called but through the root module."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(module: M, build: Callable[[], M]) -> M:
    """``module`` as it is evaluated and saved: itself, or its weights gathered in a new one if they are sharded.

    All processes must call it together, also those that do not need the result.

    Args:
        module: part of a root module.
        build: makes an equal module, with any weights.
    """
    if not is_sharded(module):
        return module
    fresh = build().to(next(module.parameters()).device)
    load_module(fresh, module_packet(module))
    return fresh.train(module.training)


def start_processes() -> None:
    """Join the processes of the launcher, if there is one, before anything is shared between them."""
    _refuse()
    PartialState(cpu=_on_cpu(), timeout=TIMEOUT)


def barrier() -> None:
    """Wait until every process is here."""
    PartialState(cpu=_on_cpu()).wait_for_everyone()


def share_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers (statistics of batch norm), which are also what is saved."""
    if dist.is_available() and dist.is_initialized():
        for buffer in module.buffers():
            if not isinstance(buffer, DTensor):
                dist.broadcast(buffer, 0)


def end_processes() -> None:
    """Leave the other processes in order; a process that just exits can be aborted by its communication threads.

    They end when nobody refers to the group any more, and a trained module does until it is collected: a thread that
    lets a tensor go while the interpreter closes is stopped inside C++, which aborts the process.
    """
    gc.collect()
    PartialState(cpu=_on_cpu()).destroy_process_group()


def has_fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _on_cpu() -> bool:
    return _asked("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def _mixed_precision(precision: Precision) -> str | None:
    if precision != "auto":
        return "no" if precision == "fp32" else precision
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None  # accelerate launch, or accelerate config, has chosen
    return "bf16" if has_fast_bf16() else "no"


def _refuse() -> None:
    """Refuse what Accelerate would do differently from what was asked, or what would break a promise of ours."""
    environment = os.environ
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError([
            "DeepSpeed is not supported: it moves the weights inside backward(), before a gradient that is not finite "
            "can stop the step, and keeps the optimizer's state in a form from which no exact checkpoint can be made. "
            "FSDP2 shards weights, gradients and optimizer as ZeRO does: choose FSDP with fsdp_version: 2 in "
            "`accelerate config`"
        ])  # fmt: skip
    if _asked("ACCELERATE_USE_MEGATRON_LM"):
        raise ConfigError(["Megatron-LM is not supported; choose multi-GPU (DDP) or FSDP in `accelerate config`"])
    if _asked("ACCELERATE_USE_FSDP") and environment.get("FSDP_VERSION", "1") != "2":
        raise ConfigError([
            "FSDP version 1 is not supported, as it hides single parameters: set fsdp_version: 2 in the Accelerate "
            "config (or FSDP_VERSION=2)"
        ])  # fmt: skip
    if _asked("ACCELERATE_USE_FSDP") and environment.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper() != "NO_WRAP":
        raise ConfigError([
            f"fsdp_auto_wrap_policy: {environment['FSDP_AUTO_WRAP_POLICY']} is not supported: a tower whose field is "
            "missing in one process's batch would leave the others waiting for its blocks. Set NO_WRAP"
        ])  # fmt: skip
    # The simple launcher of Accelerate sets this pair when several processes are asked for, and starts one.
    alone = not any(name in environment for name in ("WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if alone and "ACCELERATE_USE_CPU" in environment and "MASTER_PORT" in environment:
        raise ConfigError([
            "accelerate launch was asked for several processes and, on CPUs, has started one. Start them with "
            "`torchrun --nproc-per-node N -m mmrep.cli train …`, or with accelerate launch through mpirun"
        ])  # fmt: skip


def _set_up_sharding(engine: Accelerator) -> None:
    """FSDP2, and nothing that replaces it in silence."""
    state = engine.state
    if state.distributed_type == DistributedType.MULTI_CPU:  # Accelerate knows FSDP on accelerators only
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if state.distributed_type != DistributedType.FSDP:
        raise ConfigError(["FSDP was asked for, but there is one process; accelerate launch or torchrun start more"])
    plugin = state.fsdp_plugin
    assert plugin is not None
    # Every process has built the weights already. They stay fp32, and autocast chooses per operation as it does under
    # DDP: FSDP's own policy would also round temperatures, whose scale near 100 then could not move by less than 3 %.
    plugin.cpu_ram_efficient_loading = False
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
