"""What installed packages say of themselves, as sentences and documents."""

from __future__ import annotations

import pytest

from mmrep.config import ConfigError, component

LONG = "Fit a line.\n\n    Through all points, by least squares.\n\n    >>> fit(1)\n    2\n    "


@pytest.fixture
def package(tmp_path):
    for folder in ("stats", "signal", "_lib", "stats/tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "top.py").write_text(f'def top():\n    """{LONG}"""\n')
    (tmp_path / "_lib/a.py").write_text(f'def hidden():\n    """{LONG}"""\n')
    (tmp_path / "stats/tests/test_a.py").write_text(f'def tested():\n    """{LONG}"""\n')
    (tmp_path / "stats/a.py").write_text(
        f'def fit():\n    """{LONG}"""\n\nclass Short:\n    "Too short."\n\ndef _own():\n    """{LONG}"""\n\nx = 1\n'
    )
    (tmp_path / "signal/b.py").write_text(f'class Filter:\n    """Filter\n    a signal. {LONG}"""\n')
    (tmp_path / "signal/c.py").write_text(f'def again():\n    """{LONG}"""\n')
    return tmp_path


def source(root, **fields):
    return component("sources", "docstrings", root=str(root), **{"split": "all", "shortest": 5, **fields}).build()


def test_public_things_of_public_subpackages_are_rows_once(package):
    data = source(package)
    assert [data[i].id for i in range(len(data))] == ["signal/b.py:Filter", "signal/c.py:again"]
    assert data[0].label == "signal"
    assert data[0].fields["summary"] == "Filter a signal. Fit a line."
    assert data[1].fields["text"] == "Fit a line.\n\nThrough all points, by least squares.\n\n2"
    (package / "signal/c.py").unlink()
    assert [s.id for s in source(package)] == ["signal/b.py:Filter", "stats/a.py:fit"]


def test_the_splits_are_apart_and_nothing_is_an_error(package):
    ids = [{s.id for s in source(package, split=part)} if part != "none" else set() for part in ("all",)]
    assert len(ids[0]) == 2
    with pytest.raises(ConfigError, match="nothing of 'scipy' that is documented falls in 'all'"):
        source(package, shortest=500)
    with pytest.raises(ConfigError, match="pip install nowhere"):
        component("sources", "docstrings", package="nowhere").build()
