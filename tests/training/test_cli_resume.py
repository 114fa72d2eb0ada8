"""`mmrep train`, kill -9, `mmrep train --resume`: the run folder of a straight run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mmrep.recipe import read_recipe
from mmrep.run import Run
from mmrep.training import checkpoint
from tests.training.test_kill_points import differences
from tests.training.toys import lines
from tests.world import make_world, write_recipe

CHANGES = [
    "train.steps=60", "train.save_every=10", "train.workers=2", "average=0.9", "monitor=[retrieval]",
    "train.eval_every=15", "data.views={image: [image-augment]}", "data.max_bad=0.5",
    "evaluations={retrieval: {type: retrieval, data: test, between: [caption, image]}}",
]  # fmt: skip


@pytest.mark.slow  # three processes that import everything; test_kill_points and test_interrupts resume, too
def test_the_command_line_resumes_bitwise(tmp_path):
    path = write_recipe(make_world(tmp_path, broken=2))
    straight, out = tmp_path / "straight", tmp_path / "run"
    Run(read_recipe(str(path), CHANGES), straight).train(command=f"mmrep train {path} {' '.join(CHANGES)}")

    command = [sys.executable, "-m", "mmrep", "train", str(path), *CHANGES, "--out", str(out)]
    # as many threads as here: another number sums in another order, which is no longer bitwise
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not checkpoint.steps(out / "checkpoints"):
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.005)
        time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert checkpoint.steps(out / "checkpoints")[-1] < 60
    resumed = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr

    assert differences(straight, out) == []
    assert lines(out) == lines(straight)
    ours = {p.relative_to(out / "model"): p.read_bytes() for p in (out / "model").rglob("*") if p.is_file()}
    theirs = {p.relative_to(straight / "model"): p.read_bytes() for p in (straight / "model").rglob("*") if p.is_file()}
    assert ours.keys() == theirs.keys()
    assert [str(name) for name in ours if ours[name] != theirs[name]] == []
    assert (out / "evaluation.json").read_bytes() == (straight / "evaluation.json").read_bytes()
    assert (out / "quarantine.jsonl").read_bytes() == (straight / "quarantine.jsonl").read_bytes()
