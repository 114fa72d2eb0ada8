"""sdist and wheel: built, installed in a clean environment, used from / and from the repository root."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    # The sdist first, then the wheel from that sdist, as pip does it.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=ROOT)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def clean_python(built, tmp_path_factory):
    """A fresh environment with the wheel; its dependencies are borrowed from the environment of the tests."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=home).strip())
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", built[1], cwd=home)
    borrowed = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "zz_borrowed.pth").write_text(borrowed + "\n")
    return python


def test_the_wheel_holds_modalities_recipes_and_the_typing_marker(built):
    names = zipfile.ZipFile(built[1]).namelist()
    for wanted in (
        "mmrep/__init__.py", "mmrep/py.typed", "mmrep/modalities/image/vit.py", "mmrep/modalities/text/hf.py",
        "mmrep/recipes/quickstart.yaml", "mmrep/report/template.html",
    ):  # fmt: skip
        assert wanted in names, wanted
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"mmrep"}, (
        "only mmrep may be installed at the top level"
    )
    assert not any("__pycache__" in name or "/tests/" in name for name in names)


def test_the_sdist_holds_the_sources_once_and_the_tests(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for wanted in ("pyproject.toml", "README.md", "LICENSE", "mmrep/registry.py", "tests/test_packaging.py"):
        assert wanted in names, wanted


@pytest.mark.parametrize("where", ["/", "root"])
def test_the_installed_wheel_works_from_anywhere(clean_python, where):
    cwd = Path("/") if where == "/" else ROOT
    code = (
        "import mmrep, mmrep.modalities.image.vit as v, mmrep.recipe as r;"
        "from mmrep.registry import encoders; cls = encoders.get('image-vit'); assert cls is v.ImageViT;"
        "m = cls(cls.Config()); x = m.collate([m.prepare(x) for x in m.examples(1, 0)]); m(x);"
        "assert 'quickstart' in r.recipe_names(); print(mmrep.__file__)"
    )
    out = run(clean_python, "-c", code, cwd=cwd)
    inside = Path(out.splitlines()[-1]).resolve()
    if where == "/":
        assert clean_python.parent.parent in inside.parents, "the wheel was shadowed"
    assert "quickstart" in run(clean_python.parent / "mmrep", "list", "recipes", cwd=cwd)


@pytest.mark.parametrize("folder", ["modalities", "recipes"])
def test_the_folders_refuse_to_be_imported_under_their_own_name(folder):
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"import mmrep.{folder}, not {folder}" in done.stderr


def test_the_two_links_are_relative_and_tracked():
    for name in ("modalities", "recipes"):
        link = ROOT / "mmrep" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"
    if (ROOT / ".git").exists():
        tracked = run("git", "ls-files", "-s", "mmrep/modalities", "mmrep/recipes", cwd=ROOT)
        assert [line.split()[0] for line in tracked.splitlines()] == ["120000", "120000"]
