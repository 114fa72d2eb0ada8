"""Runs the code blocks of a page of the documentation, in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str, str]]:
    """Language, file name and text of each block."""
    return BLOCK.findall(text)


def run_page(page: str, folder: Path) -> None:
    """Write the page's files into ``folder`` and run its commands there, each in a process of its own."""
    found = blocks((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    assert {"python", "bash"} <= {kind for kind, _, _ in found}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    for kind, file, code in found:
        if kind == "yaml":
            (folder / file).write_text(code)
            continue
        command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}.md:\n{code}\n{done.stdout}{done.stderr}"
