"""ruff, pyright and import-linter are part of the tests, so that the rules cannot drift."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def script(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def test_ruff_check():
    run(script("ruff"), "check", ".")


def test_ruff_format():
    run(script("ruff"), "format", "--check", ".")


def test_import_rules():
    run(script("lint-imports"), "--no-cache")


def test_pyright():
    run(script("pyright"), "--pythonpath", sys.executable)


def test_no_modality_imports_another():
    modalities = [p.name for p in (ROOT / "modalities").iterdir() if p.is_dir() and (p / "__init__.py").is_file()]
    assert len(modalities) >= 2
    for name in modalities:
        for path in (ROOT / "modalities" / name).rglob("*.py"):
            for other in set(modalities) - {name}:
                assert f"mmrep.modalities.{other}" not in path.read_text(), f"{path} imports {other}"


def test_the_core_names_no_modality():
    for path in (ROOT / "mmrep").rglob("*.py"):
        inside = path.relative_to(ROOT / "mmrep").parts[0]
        if inside not in ("modalities", "recipes"):
            named = re.search(r"^\s*(from|import) mmrep\.modalities", path.read_text(), re.MULTILINE)
            assert named is None, f"{path} imports a modality"


def test_nothing_loads_pickles():
    for folder in ("mmrep", "modalities"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "pickle.load" not in path.read_text(), f"{path} has pickle.load"


def test_remote_code_is_run_where_it_is_checked_alone():
    """Anything but False is passed on in these files only; tests/hub/test_remote_code.py has what they do."""
    may = {"mmrep/hub/remote_code.py", "mmrep/hub/pretrained.py", "mmrep/hub/bridges/transformers.py",
           "modalities/text/_hf_load.py"}  # fmt: skip
    for folder in ("mmrep", "modalities"):
        for path in (ROOT / folder).rglob("*.py"):
            passed = re.findall(r"""trust_remote_code(?:=|["']\s*:)\s*(?!False)""", path.read_text())
            name = path.resolve().relative_to(ROOT.resolve()).as_posix()
            assert not passed or name in may, f"{name} passes trust_remote_code on"


def test_torch_reads_tensors_alone():
    for folder in ("mmrep", "modalities"):
        for path in (ROOT / folder).rglob("*.py"):
            for arguments in re.findall(r"torch\.load\(([^()]*)", path.read_text()):
                assert "weights_only=True" in arguments, f"{path} may run a pickle"
