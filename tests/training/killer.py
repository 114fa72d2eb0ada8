"""The other end of `tests.training.forking`: starts runs there, and kills them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Server:
    """The process that forks runs; with ``home`` for its error output and caches."""

    def __init__(self, home):
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        self.errors = home / "errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.training.forking"], cwd=ROOT, env=os.environ | settings,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
            )  # fmt: skip
        while self._answer()[0] != "ready":
            pass

    def start(self, kill=None, victim=0, **arguments):
        """Do a run to its end and return the exit status of each process.

        ``kill``: (step, seconds after it) of the kill, of the process ``victim``. ``arguments`` go to the run.
        """
        size = arguments.get("processes", 1)
        self.process.stdin.write(json.dumps(arguments) + "\n")
        numbers, statuses = [], []
        while len(statuses) < size:
            word, value = self._answer()
            if word == "pid":
                numbers.append(value)
            elif word == "status":
                statuses.append(value)
            elif kill is not None and value >= kill[0] and len(numbers) == size:
                time.sleep(kill[1])
                os.kill(numbers[victim], signal.SIGKILL)
                kill = None
        for number in numbers:
            try:  # loader workers that were left behind would see it after some seconds only
                os.killpg(number, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return statuses

    def run(self, **arguments):
        """Do a run of one process; returns whether it was killed. It must not fail of itself."""
        (status,) = self.start(**arguments)
        assert status in {0, -signal.SIGKILL}, self.log()
        return status != 0

    def log(self):
        """The end of what the runs wrote to stderr."""
        return self.errors.read_text()[-6000:]

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, self.log()
        word, value = line.split()
        return word, int(value)

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()
