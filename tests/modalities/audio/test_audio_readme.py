"""The example of modalities/audio/README.md runs and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import mmrep.modalities.audio as audio
from mmrep.data import raw
from mmrep.modalities.audio import decode


def test_the_example_prints_what_it_says(capsys):
    readme = (Path(audio.__file__).parent / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == code.strip().rsplit("# ", 1)[1]


def test_every_cause_of_a_bad_sample_is_listed():
    folder = Path(audio.__file__).parent
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    source += Path(raw.__file__).read_text(encoding="utf-8")
    raised = set(re.findall(r'BadSampleError\(\s*"([^"]+)"', source))
    readme = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    listed = " ".join((decode.decode.__doc__ or "").split())
    assert all(f"`{cause}`" in readme for cause in raised)
    assert all(f"``{cause}``" in listed for cause in raised - {"too short"})
    assert len(raised) == 15
