"""Start real processes as a launcher would, without one: nobody stops the others when one dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch import multiprocessing


@contextmanager
def started(
    scenario: Callable[[Path], Any], size: int, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Sequence[BaseProcess]]:
    """Run ``scenario(folder)`` on ``size`` processes; none of them is left when the body ends.

    What the scenario returns, or the type and words of what it raises, goes to ``<scenario>-<rank>.json``.
    """
    # The fork server imports these once a session; every process would, for seconds, with "spawn".
    preload = ["torch.distributed", "torch.nn.parallel", "torch._dynamo", "mmrep.run", "mmrep.modalities.image.cnn"]
    multiprocessing.set_forkserver_preload(preload)
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **(environment or {}),
    }  # fmt: skip
    processes = [
        context.Process(target=_run, args=(scenario, folder, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}))
        for r in range(size)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(scenario: Callable[[Path], Any], size: int, folder: Path, environment: Mapping[str, str] | None = None) -> Any:
    """What the scenario gave on each process; a deadlock fails after a minute."""
    with started(scenario, size, folder, environment) as processes:
        ended(processes, 60)
    return [found(folder, scenario, rank) for rank in range(size)]


def ended(processes: Sequence[BaseProcess], seconds: float) -> float:
    """Wait until all have ended; returns how long that took."""
    begin = time.monotonic()
    for process in processes:
        process.join(max(0, begin + seconds - time.monotonic()))
    waiting = [number for number, process in enumerate(processes) if process.is_alive()]
    assert not waiting, f"after {seconds} s, of the {len(processes)} given, these still run: {waiting}"
    return time.monotonic() - begin


def found(folder: Path, scenario: Callable[[Path], Any], rank: int) -> Any:
    """What one process found."""
    return json.loads((folder / f"{scenario.__name__}-{rank}.json").read_text())


def kill(process: BaseProcess, mark: Path, seconds: float = 60) -> None:
    """``kill -9`` once the file ``mark`` is there."""
    end = time.monotonic() + seconds
    while not mark.exists():
        assert time.monotonic() < end, f"{mark} never came"
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)


def _run(scenario: Callable[[Path], Any], folder: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    import torch

    from mmrep.training.engine import end_processes

    torch.set_num_threads(1)
    try:
        result = scenario(folder)
    except BaseException as error:
        result = {"error": type(error).__name__, "message": str(error)}
    draft = folder / f".{scenario.__name__}-{environment['RANK']}"
    draft.write_text(json.dumps(result))
    draft.rename(folder / f"{scenario.__name__}-{environment['RANK']}.json")
    if "error" not in result:
        end_processes()
