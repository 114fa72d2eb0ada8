"""What the data sets share: splits by hash, where packages lie, names in options, meshes."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest
from set_fakes import files

from mmrep.config import ConfigError
from mmrep.data.sets._obj import read_obj, sample_surface
from mmrep.data.sets._options import wrong_names
from mmrep.data.sets._packages import debian_version, find, find_module, npm_version, python_version, sizes
from mmrep.data.sets._rows import RowSource
from mmrep.data.sets._split import SplitConfig, part_of
from mmrep.encoder import BadSampleError

GROUPS = [f"group {i}" for i in range(4000)]
CUBE = """
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
v 0 0 1
v 1 0 1
v 1 1 1
v 0 1 1
f 1 2 3 4
f 5/1 6/2 7/3 8/4
f 1/1/1 2//2 6 5
f -6 -5 -1 -2
f 2 3 7 \\
6
f 1 4 8 5
"""


def test_shares_of_a_split_are_kept():
    config = SplitConfig(validation=0.1, test=0.25)
    parts = [part_of(group, config) for group in GROUPS]
    for part, share in (("test", 0.25), ("validation", 0.1), ("train", 0.65)):
        assert abs(parts.count(part) / len(parts) - share) < 4 * math.sqrt(share * (1 - share) / len(parts))


def test_the_part_of_a_group_is_its_own_and_never_changes():
    config = SplitConfig()
    # Pinned: another hash would move what published figures were measured on.
    assert {name: part_of(name, config) for name in ("frog", "bed", "chair", "kite", "tree", "pear")} == {
        "frog": "train",
        "bed": "test",
        "chair": "train",
        "kite": "test",
        "tree": "validation",
        "pear": "train",
    }
    other = [part_of(group, SplitConfig(seed=1)) for group in GROUPS]
    assert np.mean([a == part_of(group, config) for a, group in zip(other, GROUPS, strict=True)]) < 0.7


def test_a_larger_share_takes_from_training_only():
    small, large = SplitConfig(validation=0.1, test=0.1), SplitConfig(validation=0.1, test=0.3)
    moved = {(part_of(g, small), part_of(g, large)) for g in GROUPS}
    assert moved == {("train", "train"), ("test", "test"), ("validation", "validation"), ("train", "test")}


def test_something_must_be_left_to_train_on():
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        SplitConfig(validation=0.5, test=0.5)


def test_a_package_that_is_absent_names_its_command(tmp_path):
    files(tmp_path, {"data/a.txt": "x"})
    assert find(None, str(tmp_path), "*/*.txt", "get it") == tmp_path
    assert find(str(tmp_path), "/nowhere", "*/*.txt", "get it") == tmp_path
    with pytest.raises(ConfigError, match=r"root: '/nowhere' is no folder.*`apt-get install x`"):
        find(None, "/nowhere", "*", "apt-get install x")
    with pytest.raises(ConfigError, match=r"holds no \*\.png.*`apt-get install x`"):
        find(str(tmp_path), "", "*.png", "apt-get install x")
    with pytest.raises(ConfigError, match=r"'no_such_module' is not installed.*`pip install y`"):
        find_module("no_such_module", None, "", "*", "pip install y")
    assert find_module("mmrep", None, "data", "source.py", "").name == "data"
    assert find_module("no_such_module", str(tmp_path), "data", "*.txt", "") == tmp_path / "data"


def test_what_was_unpacked_here_is_found(tmp_path, monkeypatch):
    files(tmp_path, {"usr/share/no-such-package/a.txt": "x"})
    monkeypatch.chdir(tmp_path)
    found = find(None, "/usr/share/no-such-package", "*.txt", "get it")
    assert found.samefile(tmp_path / "usr/share/no-such-package")
    with pytest.raises(ConfigError, match="'/elsewhere' is no folder"):
        find("/elsewhere", "/usr/share/no-such-package", "*.txt", "get it")


def test_versions(tmp_path):
    log = gzip.compress(b"stamps (2022.06-1) unstable; urgency=low\n\n  * (9.9)\n")
    files(tmp_path, {
        "usr/share/doc/stamps/changelog.Debian.gz": log,
        "usr/share/doc/stamps/changelog.gz": gzip.compress(b"other (1.0)\n"),
        "usr/share/stamps/deep/a": "",
        "package.json": '{"version": "3.1"}',
    })  # fmt: skip
    assert debian_version("stamps", tmp_path / "usr/share/stamps/deep") == "2022.06-1"
    assert debian_version("stamps", tmp_path) == "unknown"
    assert npm_version(tmp_path) == "3.1"
    assert npm_version(tmp_path / "usr") == "unknown"
    assert python_version("no-such-package") == "unknown"
    assert python_version("numpy") == np.__version__


def test_sizes_tell_changed_data_apart_and_nothing_else(tmp_path):
    one = files(tmp_path / "one", {"a": "12", "b/c": "3"})
    two = files(tmp_path / "two", {"b/c": "4", "a": "21"})
    digest = sizes([one / "a", one / "b/c"], one)
    assert sizes([two / "b/c", two / "a"], two) == digest
    assert sizes([one / "a"], one) != digest
    assert sizes([files(two, {"a": "123"}) / "a", two / "b/c"], two) != digest


def test_wrong_names():
    assert wrong_names("languages", ["en", "fr"], {"en", "fr", "de"}, "name in") == []
    assert wrong_names("languages", ["fra", "en", "en"], {"en", "fr"}, "name in") == [
        "languages: no name in 'fra'; did you mean 'fr'? There are: en, fr",
        "languages: 'en' is named twice",
    ]


class Rows(RowSource):
    Config = SplitConfig
    columns = ("name", "picture")
    media_columns = ("picture",)

    def __init__(self, config, rows):
        super().__init__(config)
        self.set_rows([(f"#{i}", {"name": name}) for i, name in enumerate(rows)], "split: nothing")

    def media(self, index):
        if index == 1:
            raise BadSampleError("missing file", "gone")
        return {"picture": None if index == 2 else b"x"}


def test_rows_hold_names_and_read_media_late():
    source = Rows(SplitConfig(group="name"), ["a", "b", None])
    assert source[0].fields == {"name": "a", "picture": b"x"}
    assert source[2].fields == {}
    assert source.record(1).cause == "missing file"
    assert source.record(1).id == "#1"
    assert source.column("name") == ["a", "b", None]
    assert source.groups() == ["a", "b", None]
    with pytest.raises(ConfigError, match="cannot give the column 'picture'"):
        source.column("picture")
    with pytest.raises(ConfigError, match="no column 'nam'; did you mean 'name'"):
        source.column("nam")
    assert Rows(SplitConfig(id="name"), ["a", "b"]).record(1).id == "b"


def test_rows_refuse_what_cannot_work():
    with pytest.raises(ConfigError, match="split: nothing"):
        Rows(SplitConfig(), [])
    with pytest.raises(ConfigError, match="more than once"):
        Rows(SplitConfig(id="name"), ["a", "a"])
    with pytest.raises(ConfigError, match="label: 'picture' holds media"):
        Rows(SplitConfig(label="picture"), ["a"])


def test_a_mesh_is_read_as_triangles():
    corners, triangles = read_obj(CUBE.encode())
    assert corners.shape == (8, 3)
    assert triangles.shape == (12, 3)
    a, b, c = (corners[triangles[:, i]] for i in range(3))
    np.testing.assert_allclose(np.linalg.norm(np.cross(b - a, c - a), axis=1), 1)  # every half of a unit square


@pytest.mark.parametrize(
    ("text", "detail"),
    [("v 1 2\nf 1 1 1", "fewer than three"), ("v 1 2 3\nf 1 2 3", "none of the 1"), ("v a b c", "could not convert"),
     ("v 0 0 0\nf 1 0 1", "none of the 1"), ("v 0 0 0\nf x y z", "invalid literal")],
)  # fmt: skip
def test_a_malformed_mesh_is_a_bad_sample(text, detail):
    with pytest.raises(BadSampleError, match=detail) as error:
        read_obj(text.encode())
    assert error.value.cause == "malformed mesh"


def test_points_lie_on_the_surface_as_evenly_as_it_is_large():
    corners, triangles = read_obj(CUBE.encode())
    points = sample_surface(corners * [2, 1, 1], triangles, 6000, 7)
    size = np.array([2, 1, 1])
    on_side = [np.isclose(points[:, axis], side * size[axis]) for axis in range(3) for side in (0, 1)]
    assert np.any(on_side, axis=0).all()
    # The two ends have area 1, the four sides 2: exactly so many points, since strips of equal area have one each.
    assert [int(s.sum()) for s in on_side] == pytest.approx([600, 600, 1200, 1200, 1200, 1200], abs=3)
    side = points[on_side[2]]
    counts = np.histogram2d(side[:, 0] / 2, side[:, 2], bins=4, range=[[0, 1], [0, 1]])[0]
    assert abs(counts - 75).max() < 4 * math.sqrt(75)  # uniform on a side; without the square root corners are crowded
    np.testing.assert_array_equal(points, sample_surface(corners * [2, 1, 1], triangles, 6000, 7))
    assert not np.allclose(points, sample_surface(corners * [2, 1, 1], triangles, 6000, 8))
    first = points[:600]
    assert np.abs(first.mean(axis=0) - size / 2).max() < 0.1  # the order is random: the first points are of all sides


def test_a_mesh_without_a_surface_is_a_bad_sample():
    with pytest.raises(BadSampleError, match="no area"):
        sample_surface(np.zeros((3, 3)), np.array([[0, 1, 2]]), 10, 0)
