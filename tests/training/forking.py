"""``python -m tests.training.forking`` imports everything once, then forks the runs that it is told to start.

It reads one JSON object a line, the arguments of `killable.run` (or of another ``program``, on several ``processes``),
and answers with ``pid N`` of each process, ``step N`` for each step that is over, and ``status N`` of each process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import tqdm
from accelerate.state import PartialState

from mmrep.training.engine import end_processes
from tests.training.killable import run, write_data


def serve():
    importlib.import_module("datasets")  # but not tried out below, since it starts threads
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # a thread
    with tempfile.TemporaryDirectory() as folder:  # much is imported only when it is first used
        write_data(Path(folder))
        for data in ("map", "webdataset"):
            run(f"{folder}/{data}", data, folder, workers=0)
    assert threading.active_count() == 1, "a process with threads must not fork"
    os.write(1, b"ready 0\n")
    for line in sys.stdin:
        command = json.loads(line)
        program, size = command.pop("program", "tests.training.killable:run"), command.pop("processes", 1)
        with tempfile.TemporaryDirectory() as meeting:
            children = [_start(program, command, rank, size, meeting) for rank in range(size)]
            for child in children:
                os.write(1, b"pid %d\n" % child)
            for child in children:
                os.write(1, b"status %d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _start(program, arguments, rank, size, meeting):
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    status = 1
    try:
        if size > 1:
            _join(rank, size, meeting)
        module, _, name = program.partition(":")
        getattr(importlib.import_module(module), name)(**arguments)
        end_processes()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def _join(rank, size, meeting):
    """Be one of several processes, as a launcher would have it; who waits for another in vain fails after a minute."""
    PartialState._reset_state()  # of what was tried out
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place, patience = f"file://{meeting}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", place, rank=rank, world_size=size, timeout=patience)


if __name__ == "__main__":
    serve()
