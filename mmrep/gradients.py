"""``mmrep check gradients``: does a recipe have the same gradient on several processes as on one?

Real processes take unequal shares of one global batch, with different data, wrapped as the trainer wraps them; one
process then computes the whole batch. A loss that is wrong across processes usually reports the right value, so that no
loss curve shows it; only the gradients do.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmrep._gradients_measure import Subject
from mmrep._gradients_table import Measured, Row, Table, causes, compare
from mmrep.config import ConfigError
from mmrep.recipe import Recipe, read_recipe, write_recipe
from mmrep.run import Run
from mmrep.training.collectives import world
from mmrep.training.engine import accelerator, barrier, end_processes, start_processes

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Relative error up to which a term agrees, by the precision of the comparison."""
_PER_PROCESS = 16
_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Report:
    """What was compared, and what came out.

    wrapper: the class that shares the root between processes. tables: the recipe as it trains; if it has batch
    statistics, also with those frozen. causes: typical causes of the differences in the last table, each with its
    terms. notes: what the comparison switched off or could not do.
    """

    processes: int
    shares: list[int]
    wrapper: str
    tables: list[Table]
    causes: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def agree(self) -> bool:
        """Whether all terms of all tables do."""
        return all(table.agree for table in self.tables)

    def text(self) -> str:
        """For the terminal."""
        from mmrep._gradients_words import report_text

        return report_text(self)


def check_gradients(recipe: Recipe, *, processes: int | None = None, samples: int | None = None) -> Report | None:
    """Compare the gradient of one process with that of several, term by term, in float64.

    Under ``torchrun`` or ``accelerate launch`` the launched processes are compared, with their devices and wrapper (DDP
    or FSDP2), and all of them call this. Otherwise it starts processes of its own on this machine's CPU, over gloo on
    the loopback interface; they import afresh, so every component must be installed (an entry point), not registered
    in the calling script.

    Args:
        recipe: the resolved recipe. Its weights are the untrained ones; nothing is trained or written.
        processes: how many to start, 2 or more; default 2. A launcher's number goes first.
        samples: of the global batch, at least 3 a process; default 16 a process, at most the recipe's batch.

    Returns:
        The report, on the first process; None on the others.

    Raises:
        ConfigError: too few samples or processes, another number of processes than the launcher's, or a recipe that
            cannot be built.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and processes not in (None, launched):
        raise ConfigError([f"--processes {processes}: the launcher started {launched}; leave the option out"])
    count = launched if launched > 1 else 2 if processes is None else processes
    if count < 2:
        raise ConfigError([f"--processes {count}: 2 or more are compared with one"])
    if samples is not None and samples < 3 * count:
        raise ConfigError([f"--samples {samples}: {count} processes need {3 * count} to share them unequally"])
    samples = samples or max(min(recipe.train.batch_size, _PER_PROCESS * count), 3 * count)
    if launched > 1:
        return _here(recipe, samples)
    source = Run(recipe).train_source  # what is wrong with it is said here, before processes start
    if not source.streaming and len(source) < 3 * count:
        raise ConfigError(
            [f"data.train has {len(source)} samples, and {count} processes need {3 * count} to share them"]
        )
    return _start(recipe, count, samples)


def _here(recipe: Recipe, samples: int) -> Report | None:
    """On every process of a launch."""
    start_processes()
    engine, ranks = accelerator("fp32"), world()
    with ExitStack() as stack:
        # What encoders learn from the data is learned once, into a folder of the first process.
        own = stack.enter_context(tempfile.TemporaryDirectory(prefix="mmrep-")) if ranks.rank == 0 else ""
        told = torch.tensor(list(own.encode()), dtype=torch.uint8, device=engine.device)
        folder = bytes(ranks.gather(told).tolist()).decode()
        subject = Subject(Run(recipe, Path(folder)), processes=ranks.size, samples=samples)
        many = subject.many(engine)
        barrier()
    end_processes()  # from here on the first process is alone, for the losses too
    return report(subject, many) if ranks.rank == 0 else None


def report(subject: Subject, many: Mapping[str, Measured]) -> Report:
    """Compare what several processes found with what this one finds alone, after it has left the others."""
    one = subject.one()
    tolerance = TOLERANCE[subject.dtype]
    shares = subject.shares(even=False)
    tables = [compare("as trained", one["trained"], many["trained"], tolerance)]
    if "frozen" in many:
        tables.append(compare("with batch statistics frozen", one["frozen"], many["frozen"], tolerance))
    even = compare("even", one.get("frozen", one["trained"]), many["even"], tolerance) if "even" in many else None
    found = {} if tables[-1].agree else causes(tables[-1], subject.processes, even)
    return Report(subject.processes, shares, subject.wrapper, tables, found, list(_notes(subject, tables)))


def _notes(subject: Subject, tables: Sequence[Table]) -> Iterator[str]:
    """What the comparison switched off, and what it could not do."""
    yield (
        f"The towers are in eval mode{', batch normalisation excepted' if subject.batch_norms else ''}: dropout and "
        "the like are off, since random numbers differ between processes"
        + (f" ({_few(subject.quiet)})." if subject.quiet else ".")
    )
    if subject.dtype is torch.float32:
        yield "A tower does not compute in float64: everything is in float32, with a wide tolerance."
    if subject.skipped:
        yield f"{subject.skipped} unreadable samples were passed over."
    if subject.micro_batch is not None:
        yield f"Several processes compute parts of {subject.micro_batch} samples, the one process all at once."
    if subject.batch_norms:
        yield (
            f"Batch normalisation in {_few(subject.batch_norms)}. Each process standardises by the statistics of its "
            "own samples, so several processes train another function than one. Use an encoder without it (image-cnn: "
            "norm: group), or convert it (torch.nn.SyncBatchNorm.convert_sync_batchnorm, GPUs only)."
        )
        if not tables[0].agree and tables[-1].agree:
            yield "With its statistics frozen all terms agree: the losses and their collectives are right."


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} layer{'s' if len(names) > 1 else ''}: {', '.join(names[:3])}{', …' if names[3:] else ''}"


def _start(recipe: Recipe, processes: int, samples: int) -> Report:
    """Start the processes on this machine."""
    from torch import multiprocessing

    with tempfile.TemporaryDirectory(prefix="mmrep-") as name:
        folder = Path(name)
        write_recipe(recipe, folder / "recipe.yaml")
        try:
            multiprocessing.start_processes(_worker, (processes, samples, name), nprocs=processes, start_method="spawn")  # type: ignore[no-untyped-call]
        except multiprocessing.ProcessRaisedException:
            if (folder / "refused").is_file():
                raise ConfigError((folder / "refused").read_text().split("\n")) from None
            raise
        return _read(json.loads((folder / "report.json").read_text()))


def _worker(rank: int, processes: int, samples: int, name: str) -> None:
    """One of the processes that `_start` starts: a launch of its own."""
    folder = Path(name)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", CUDA_VISIBLE_DEVICES="")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group(
        "gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=processes, timeout=_TIMEOUT
    )
    try:
        found = _here(read_recipe(str(folder / "recipe.yaml")), samples)
    except ConfigError as error:
        (folder / "refused").write_text(str(error))
        raise
    if found is not None:
        (folder / "report.json").write_text(json.dumps(asdict(found)))


def _read(data: dict[str, Any]) -> Report:
    tables = [Table(table["title"], [Row(**row) for row in table["rows"]]) for table in data.pop("tables")]
    return Report(tables=tables, **data)
