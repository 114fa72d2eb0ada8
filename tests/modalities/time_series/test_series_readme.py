"""The example of modalities/time_series/README.md runs and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import mmrep.modalities.time_series as time_series
from mmrep.data import raw

FOLDER = Path(time_series.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_example_prints_what_it_says(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == code.strip().rsplit("# ", 1)[1]


def test_every_cause_of_a_bad_sample_is_listed_and_no_other():
    source = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py"))
    source += Path(raw.__file__).read_text(encoding="utf-8")
    raised = {"not a series", *re.findall(r'BadSampleError\(\s*"([^"]+)"', source)}
    listed = README[README.index("one of these causes:") :].split("\n\n")[0]
    assert set(re.findall(r"`([^`]+)`", listed)) - {"hf-series"} == raised
