"""The example of modalities/graph/README.md runs and prints what it says; every cause and field is listed."""

from __future__ import annotations

import re
from pathlib import Path

import mmrep.modalities.graph as graph

FOLDER = Path(graph.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_example_prints_what_it_says(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == code.strip().rsplit("# ", 1)[1]


def test_every_cause_of_a_bad_sample_is_listed():
    source = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py"))
    raised = set(re.findall(r'BadSampleError\(\s*"([^"]+)"', source))
    causes = " ".join(README.partition("with one of these causes")[2].partition("## Encoders")[0].split())
    assert raised == set(re.findall(r"`([^`]+)`", causes))
    assert len(raised) == 22


def test_nothing_heavy_is_imported_with_the_modality():
    import subprocess
    import sys

    program = (
        "import sys, mmrep.modalities.graph.gnn, mmrep.modalities.graph.transformer, mmrep.modalities.graph.views, "
        "mmrep.modalities.graph.levels; print([m for m in ('torch_geometric', 'rdkit', 'networkx', 'scipy') "
        "if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "torch_geometric" not in found.stdout
    assert "rdkit" not in found.stdout
