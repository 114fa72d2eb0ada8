"""The example of modalities/point_cloud/README.md runs and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import mmrep.modalities.point_cloud as point_cloud
from mmrep.data import raw

FOLDER = Path(point_cloud.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_example_prints_what_it_says(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == code.strip().rsplit("# ", 1)[1]


def test_every_cause_of_a_bad_sample_is_listed():
    sources = [*FOLDER.glob("*.py"), Path(raw.__file__)]
    source = "".join(path.read_text(encoding="utf-8") for path in sources)
    raised = {"not a point cloud", *re.findall(r'BadSampleError\(\s*"([^"]+)"', source)}
    listed = README.split("one of these causes:")[1].split("##")[0]
    assert raised == set(re.findall(r"`([^`]+)`", listed))
    assert len(raised) == 12
