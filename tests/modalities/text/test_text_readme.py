"""The folder's README: its code runs, and its table is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mmrep.modalities.text as package
from mmrep.registry import encoders

README = Path(package.__path__[0], "README.md").read_text(encoding="utf-8")


def test_the_code_block_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert (tmp_path / "my-text-model" / "model.safetensors").is_file()


def test_the_table_names_every_text_encoder_and_what_it_supports() -> None:
    row = r"^\| `([\w-]+)` \|[^|]*\| (\w+) \| (\w+)[^|]*\| (\w+)[^|]*\| (\w+)"
    rows = {name: cells for name, *cells in re.findall(row, README, re.MULTILINE)}
    text = {name for name, cls in encoders.load_all().items() if getattr(cls, "modality", None) == "text"}
    assert set(rows) >= text
    for name, cells in ((name, cells) for name, cells in rows.items() if name in text):
        columns = ({"tokens"}, {"drop_tokens"}, {"layers"}, {"mask_token", "content"})
        said = [column for column, cell in zip(columns, cells, strict=True) if cell == "yes"]
        supports = set(encoders.get(name).supports)
        assert set().union(*said) == supports - {"attention"}
        assert (f"`{name}` also says what its tokens attend to" in README) == ("attention" in supports)
