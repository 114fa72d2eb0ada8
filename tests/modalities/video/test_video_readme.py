"""The example of modalities/video/README.md runs and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import mmrep.modalities.video as video
from mmrep.data import raw


def test_the_example_prints_what_it_says(capsys):
    readme = (Path(video.__file__).parent / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == code.strip().rsplit("# ", 1)[1]


def test_every_cause_of_a_bad_sample_is_listed():
    folder = Path(video.__file__).parent
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    source += Path(raw.__file__).read_text(encoding="utf-8")
    raised = {"not a video", "truncated video", *re.findall(r'BadSampleError\(\s*"([^"]+)"', source)}
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert [cause for cause in sorted(raised) if f"`{cause}`" not in readme] == []
    listed = re.search(r"one of these causes: (.*?)\. Caps", readme, re.DOTALL).group(1)
    assert set(re.findall(r"`([^`]+)`", listed)) == raised
