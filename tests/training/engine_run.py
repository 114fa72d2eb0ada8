"""What the tests of engines and faults do on every process: functions of the folder that holds ``recipe.yaml``.

Also started by launchers: ``-m tests.training.engine_run FOLDER SCENARIO …`` writes what a scenario finds to
``FOLDER/<scenario>-<rank>.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from mmrep.data.source import Source, SourceConfig
from mmrep.objectives.root import Root
from mmrep.recipe import read_recipe
from mmrep.run import Run
from mmrep.training import roll_call as roll_call_module
from mmrep.training.engine import end_processes, start_processes
from mmrep.training.errors import NonFiniteLoss
from mmrep.training.roll_call import accounted
from mmrep.training.state import module_packet
from tests.training.distributed_run import Exact
from tests.training.toys import ToyLoader, toy_trainer
from tests.world import make_world, write_recipe

QUICK = {"steps": 8, "batch_size": 16, "precision": "fp32", "workers": 0, "log_every": 3, "save_every": 4,
         "eval_every": 4}  # fmt: skip
SGD = {"optimizer": "sgd", "lr": 0.2, "weight_decay": 0.01, "clip_norm": 0.5,  # Adam would hide a factor
       "layer_decay": 0.8, "groups": [{"match": "model.towers.text.*", "lr": 0.7, "begin": 0.2}]}  # fmt: skip


def make_recipe(folder):
    """Everything that an engine can get wrong: clipping, an average, monitoring, several checkpoints."""
    write_recipe(make_world(folder), train=QUICK, optim=SGD, average=0.9, monitor=["retrieval"])


def rank():
    return int(os.environ.get("RANK", "0"))


def run_of(folder, name, *overrides):
    return Run(read_recipe(str(folder / "recipe.yaml"), overrides), folder / name)


@contextmanager
def after_step(action):
    """Call ``action(root, number of the step)`` after each optimizer step."""
    original, steps = Root.after_optimizer_step, []

    def seen(self):
        original(self)
        steps.append(1)
        action(self, len(steps))

    Root.after_optimizer_step = seen
    try:
        yield
    finally:
        Root.after_optimizer_step = original


def straight(folder):
    """A whole run, each process with a folder of its own; also says how the weights were spread."""
    kinds = set()
    with after_step(lambda root, _: kinds.update(type(p).__name__ for p in root.parameters())):
        results = run_of(folder, "straight" if rank() == 0 else f"straight-{rank()}").train()
    return {"kinds": sorted(kinds), "results": results, **group()}


def group():
    if not dist.is_initialized():
        return {"world": 1}
    timeout = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
    return {"world": dist.get_world_size(), "backend": dist.get_backend(), "patience": timeout.total_seconds()}


def parts(folder):
    """The same, the gradient of each batch replayed in parts of three samples."""
    run_of(folder, f"parts-{rank()}", "train.micro_batch=3", "evaluations={}", "monitor=[]").train()
    return {}


def resumed(folder):
    """Stopped between two checkpoints, and resumed."""

    def stop(_, step):
        if step == 6:
            raise KeyboardInterrupt

    try:
        with after_step(stop):
            run_of(folder, "resumed").train()
    except KeyboardInterrupt:
        pass
    steps = []
    with after_step(lambda _, step: steps.append(step)):
        results = run_of(folder, "resumed").train(resume=True)
    return {"steps": len(steps), "results": results}


def statistics(folder):
    """With batch norm every process sees statistics of its own; one model is evaluated and saved."""
    changes = ["model.towers.image.encoder.norm=batch", "monitor=[]", "train.eval_every=null"]
    run = run_of(folder, "statistics", *changes)
    run.train()
    return rank() == 0 and {name: value.tolist() for name, value in run.encoded("test").embeddings.items()}


def toy(folder):
    """What a trainer does with weights that differ at the start, with bf16, and with a bad gradient."""
    seen = []

    class Root(Exact):
        def forward(self, batch):
            seen.append(torch.is_autocast_enabled("cpu"))
            report = super().forward(batch)
            if len(seen) == 3:  # a finite loss with a gradient that is not
                report["loss"] = report["loss"] + (0 * self.encode.weight.sum()).sqrt()
            return report

        def after_optimizer_step(self):
            pass

    loader = ToyLoader(rank=rank(), world=dist.get_world_size() if dist.is_initialized() else 1)
    trainer = toy_trainer(None, root=Root(seed=rank()), loader=loader, precision="bf16", optim={"clip_norm": 0.1})
    start = {name: value.tolist() for name, value in module_packet(trainer.root).tensors.items()}
    try:
        trainer.fit()
    except NonFiniteLoss as error:
        end = {name: value.isfinite().all().item() for name, value in module_packet(trainer.root).tensors.items()}
        return {"start": start, "autocast": seen, "step": error.step, "culprits": error.culprits, "finite": end}
    return {}


def endless(folder):
    """A run to be killed: it leaves a mark when it is well under way."""

    def mark(_, step):
        if step == 5:
            (folder / f"mark-{rank()}").touch()

    with after_step(mark):
        run_of(folder, "endless", "train.steps=100000", "train.save_every=null", "monitor=[]").train()


def out_of_memory(folder):
    """The second process alone fails in the middle of a run."""

    def fail(_, step):
        if step == 5 and rank() == 1:
            raise MemoryError("no room for a picture of 3 GiB")

    with after_step(fail):
        run_of(folder, "out_of_memory").train()


def refused(folder):
    """The first process alone refuses the folder, before anything is trained."""
    if rank() == 0:
        (folder / "refused").mkdir()
        (folder / "refused" / "precious.txt").touch()
    run_of(folder, "refused").train()


def roll_call(folder):
    """The third process fails, the second one because of it, and the first one hears of both when they have left."""
    start_processes()
    with accounted(lambda: "here"):
        if rank() == 2:
            raise MemoryError("full")
        time.sleep(0 if rank() == 1 else 4)
        raise RuntimeError("gloo: connection closed by peer")


def late_reader(folder):
    """The second process dies, the first one finds out, and the third one, whose machine is busy, looks late."""
    start_processes()
    late, begin = rank() == 2, time.monotonic()
    if late:
        roll_call_module._BEAT = 4.0
    with accounted(lambda: "here"):
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(begin + (13 if late else 1) - time.monotonic())  # a roll call takes 6 s
        raise RuntimeError("gloo: connection closed by peer")


class Uneven(Source):
    """The training pictures as a stream, of which the last part holds only ``last`` records."""

    Config = SourceConfig
    streaming = True
    has_group = True

    def __init__(self, source, last):
        super().__init__(SourceConfig())
        self._source, self._last = source, last
        self.columns = source.columns

    def stream(self, part=0, parts=1, seed=None):
        everything = list(self._source.stream())
        cut = len(everything) - self._last
        yield from everything[cut:] if part == parts - 1 else everything[:cut][part :: parts - 1]


def _streamed(folder, name, last):
    changes = ["train.steps=null", "train.epochs=2", "optim.schedule={shape: constant}", "train.batch_size=4",
               "evaluations={}", "monitor=[]", "optim.groups=[]"]  # fmt: skip
    run = run_of(folder, name, *changes)
    run.__dict__["train_source"] = Uneven(run.train_source, last)
    steps = []
    with after_step(lambda _, step: steps.append(step)):
        run.train()
    return {"steps": len(steps), "lines": (folder / name / "metrics.jsonl").read_text().count("\n")}


def uneven(folder):
    """Of 32 records the second process has 7, which are 3 batches of 2."""
    return _streamed(folder, "uneven", last=7)


def empty(folder):
    """The second process has no record at all."""
    return _streamed(folder, "empty", last=0)


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        result = globals()[name](folder)
        (folder / f"{name}-{rank()}.json").write_text(json.dumps(result))
    end_processes()


if __name__ == "__main__":
    main()
