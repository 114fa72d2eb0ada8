"""The example of modalities/image/README.md runs and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import mmrep.modalities.image as image
from mmrep.data import raw


def test_the_example_prints_what_it_says(capsys):
    readme = (Path(image.__file__).parent / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == code.strip().rsplit("# ", 1)[1]


def test_every_cause_of_a_bad_sample_is_listed():
    folder = Path(image.__file__).parent
    source = "".join(
        (folder / name).read_text(encoding="utf-8")
        for name in ("decode.py", "_preprocess.py", "_bands.py", "_normalization.py")
    )
    source += Path(raw.__file__).read_text(encoding="utf-8")
    raised = {"truncated image", "damaged image", *re.findall(r'BadSampleError\(\s*"([^"]+)"', source)}
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"`{cause}`" in readme for cause in raised)
    assert len(raised) == 13
