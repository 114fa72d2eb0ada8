"""Runs whose disk gets full, for real: a limit on the size of files, or a disk of a few hundred kilobytes."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import shutil
import signal
from logging.handlers import MemoryHandler
from pathlib import Path

from mmrep.training.contracts import Callback
from tests.training.killable import build

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000


class Limit(Callback):
    """No file may grow past ``size`` bytes from step ``at`` on, until step ``until``."""

    def __init__(self, size, at, until):
        self.size, self.at, self.until = size, at, until

    def on_step_end(self, trainer, step):
        if step == self.at:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
        if step == self.until:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def limited(out, folder, *, size, at, until=None, last):
    """A run under a limit; ``last``: whether a save that fails is taken as the last one."""
    trainer = build(Path(out), "map", Path(folder))
    trainer.callbacks = [*trainer.callbacks, Limit(size, at, until)]
    save = trainer._state.save
    trainer._state.save = lambda counters, **_: save(counters, last=last)
    os.dup2(os.open(os.devnull, os.O_WRONLY), trainer.callbacks[0].file)  # the limit holds for this file as well
    said = MemoryHandler(1000, flushLevel=logging.CRITICAL, target=logging.StreamHandler())  # and for the log
    logging.getLogger().addHandler(said)
    try:
        trainer.fit(resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.flush()


def small_disk(out, folder, *, size, mount):
    """A run on a disk of ``size`` bytes, mounted for this process alone; what stands at its end is copied to ``out``.

    Exits with 77 where nothing may be mounted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    root = os.geteuid() == 0
    if libc.unshare(_NEW_MOUNTS if root else _NEW_MOUNTS | _NEW_USER):
        os._exit(77)
    libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)  # what is mounted here stays here
    if libc.mount(b"tmpfs", os.fsencode(mount), b"tmpfs", 0, f"size={size}".encode()):
        os._exit(77)
    disk = Path(mount)
    try:
        build(disk / "run", "map", Path(folder)).fit()
    finally:
        shutil.copytree(disk / "run", out)
        shutil.copy(disk / "run.ids", f"{out}.ids")
