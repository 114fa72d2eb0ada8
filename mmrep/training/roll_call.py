"""Who is gone, when the processes of a run cannot reach each other any more.

A process that ends, however it ends, closes its connections, and the collectives of the others fail at once with a
message that names an address. So each process says in the store of the rendezvous that it is alive, once a second, and
with what error it leaves; a process whose collective fails reads there whom it has lost. What is read is kept, since
the store may go with the process that keeps it.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from mmrep.training.errors import LostProcess

_BEAT = 1.0
_PATIENCE = 6.0
_BROKEN = re.compile(r"gloo|nccl|ProcessGroup|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
_FOLLOWED = " lost another process"


@contextmanager
def accounted(where: Callable[[], str]) -> Iterator[None]:
    """Run the body; if it fails because another process is gone, say which and why.

    An error of this process is told to the others before it is raised. It must then end the process, since only that
    closes the connections on which the others wait.

    Args:
        where: what this process is doing when it is asked, such as ``step 12``.

    Raises:
        LostProcess: a collective failed.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield
        return
    book = _Book()
    with book.beating():  # also in the roll call itself, or two that call it would take each other for dead
        try:
            yield
        except LostProcess:
            raise
        except BaseException as error:
            if not is_broken_collective(error):
                book.leave(f" stopped: {type(error).__name__}: {error}")
                raise
            gone = book.roll_call()
            book.leave(_FOLLOWED, gone)
            raise LostProcess(where(), dist.get_rank(), gone) from error


def is_broken_collective(error: BaseException) -> bool:
    """Whether the error is torch's word for processes that cannot reach each other; gloo has no class for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error))))


class _Book:
    """The pages of all processes in the store: who it is, its last beat, and why it left."""

    def __init__(self) -> None:
        # Its own connection: a thread that waits for the store would make the other one wait, too.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(timedelta(seconds=10))
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._store.set(self._key("who", self._rank), f"pid {os.getpid()} on {socket.gethostname()}")
        self._left: dict[int, str] = {}
        self._beats = 0
        self._beat()

    @contextmanager
    def beating(self) -> Iterator[None]:
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(_BEAT):
                try:
                    self._beat()
                except RuntimeError:  # the store is gone, and with it the run; the next collective will tell
                    return

        thread = threading.Thread(target=beat, name="mmrep-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def leave(self, why: str, gone: Mapping[int, str] | None = None) -> None:
        """Say why this process ends, and who it found gone: another may wait for this process only."""
        gone = gone or {}
        try:
            for rank, word in {**gone, self._rank: why}.items():
                self._store.set(self._key("left", rank), word.removeprefix(self._who(rank)))
                self._store.add(self._key("left", self._size), 1)
            if self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self._wait_for_readers({*range(1, self._size)} - {*gone})
        except RuntimeError:
            return  # the store is gone: nobody is left to read it

    def _wait_for_readers(self, ranks: set[int]) -> None:
        """The store is in this process: let the others, on a busy machine too, read it first."""
        told, deadline = int(self._read("left", self._size)), time.monotonic() + _PATIENCE
        while ranks and time.monotonic() < deadline:
            ranks = {r for r in ranks if not self._read("left", r) and int(self._read("read", r) or 0) < told}
            time.sleep(0.1)

    def roll_call(self) -> dict[int, str]:
        """By rank, who is gone and why."""
        try:
            return self._roll_call()
        except RuntimeError:
            unknown = {0: " is gone, or the launcher that kept the rendezvous for it"}
            return {rank: why for rank, why in self._left.items() if why != _FOLLOWED} or unknown

    def _roll_call(self) -> dict[int, str]:
        waiting = {rank: self._read("beat", rank) for rank in range(self._size) if rank != self._rank}
        deadline = time.monotonic() + _PATIENCE
        while waiting and time.monotonic() < deadline:
            for rank, beat in list(waiting.items()):
                if self._read_why(rank) or self._read("beat", rank) != beat:
                    del waiting[rank]
            time.sleep(0.1)
        gone = {r: f"{self._who(r)} is gone without a word: killed, or out of memory?" for r in waiting}
        gone |= {rank: why for rank, why in self._left.items() if why != _FOLLOWED}
        return gone or self._left

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(self._key("beat", self._rank), str(self._beats))
        if told := self._read("left", self._size):  # one question a beat, however many processes there are
            for rank in range(self._size):
                self._read_why(rank)
            self._store.set(self._key("read", self._rank), told)

    def _read_why(self, rank: int) -> str:
        if rank not in self._left and rank != self._rank and (why := self._read("left", rank)):
            self._left[rank] = why if why == _FOLLOWED else f"{self._who(rank)}{why}"
        return self._left.get(rank, "")

    def _who(self, rank: int) -> str:
        return f" ({self._read('who', rank)})"

    def _read(self, page: str, rank: int) -> str:
        key = self._key(page, rank)
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _key(self, page: str, rank: int) -> str:
        return f"mmrep/{page}/{rank}"
