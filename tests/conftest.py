"""Processes of a test run share the cores: each computes with its share of them, and so do those that it starts.

Read before torch is imported, whose threads wait for each other busily: more of them than cores are slower than one.
"""

from __future__ import annotations

import os

_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _PROCESSES)))
