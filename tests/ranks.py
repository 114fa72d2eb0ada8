"""Run a function on several real processes over gloo on the loopback interface."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def run_ranks(function: Callable[..., Any], size: int, folder: Path, *arguments: Any) -> list[Any]:
    """Call ``function(*arguments)`` on ``size`` ranks and return what each returned, which must be JSON.

    The function must be importable (not a lambda), and ``folder`` empty. A rank that waits for another in vain fails
    after a minute.
    """
    # The fork server imports these once a session; with "spawn" every rank would, for seconds of CPU time each.
    multiprocessing.set_forkserver_preload(["torch.distributed", "torch.nn.parallel", "torch._dynamo"])
    multiprocessing.start_processes(
        _rank, (function, size, str(folder), arguments), nprocs=size, start_method="forkserver"
    )
    results = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]
    assert len(list(folder.glob("rank*.json"))) == size
    return results


def _rank(rank: int, function: Callable[..., Any], size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    assert dist.get_world_size() == size
    result = function(*arguments)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    gc.collect()  # or threads of the group may outlive it, and abort the process as it exits
    dist.destroy_process_group()
