"""Names to components: near matches, duplicates, missing packages, broken plug-ins."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from mmrep import registry
from mmrep.registry import DuplicateNameError, MissingPackageError, Registry, UnknownNameError, require


@pytest.fixture
def fresh(monkeypatch):
    points: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    monkeypatch.setattr(registry, "_entry_points", registry._entry_points.__wrapped__)  # these come and go

    def add(name, value):
        points.append(EntryPoint(name, value, "test.things"))

    made = Registry("test.things", "thing")
    made.add = add
    return made


def test_decorator_registers_and_get_returns_the_class(fresh):
    @fresh.register("one")
    class One:
        pass

    assert fresh.get("one") is One
    assert fresh.names() == ["one"]


def test_entry_point_is_listed_without_import_and_loaded_on_get(fresh):
    fresh.add("path", "pathlib:Path")
    fresh.add("broken", "no_such_module_anywhere:Thing")
    assert fresh.names() == ["broken", "path"]
    assert fresh.get("path").__name__ == "Path"


def test_names_match_shell_patterns(fresh):
    for name in ("image-vit", "image-cnn", "text-vit"):
        fresh.add(name, "pathlib:Path")
    assert fresh.names("*vit*") == ["image-vit", "text-vit"]


def test_unknown_name_says_the_near_match_and_all_names(fresh):
    fresh.add("info-nce", "pathlib:Path")
    with pytest.raises(UnknownNameError, match=r"unknown thing 'infonce'; did you mean 'info-nce'\? Known: info-nce"):
        fresh.get("infonce")


def test_duplicate_by_decorator_is_an_error(fresh):
    fresh.register("one")(type("One", (), {}))
    with pytest.raises(DuplicateNameError, match="'one' is registered already"):
        fresh.register("one")(type("Other", (), {}))


def test_decorator_may_not_shadow_an_entry_point(fresh):
    fresh.add("path", "pathlib:Path")
    with pytest.raises(DuplicateNameError):
        fresh.register("path")(type("Mine", (), {}))


def test_running_a_notebook_cell_again_is_no_duplicate(fresh):
    def cell():
        @fresh.register("one")
        class One:
            pass

        return One

    cell()
    assert fresh.get("one") is not None
    second = cell()
    assert fresh.get("one") is second


def test_two_packages_claiming_one_name_is_an_error_that_names_both(fresh):
    fresh.add("one", "pathlib:Path")
    fresh.add("one", "collections:OrderedDict")
    with pytest.raises(DuplicateNameError, match=r"pathlib:Path.*collections:OrderedDict"):
        fresh.get("one")


def test_one_distribution_seen_twice_is_no_duplicate(fresh):
    fresh.add("one", "pathlib:Path")
    fresh.add("one", "pathlib:Path")
    assert fresh.get("one").__name__ == "Path"


def test_a_broken_plugin_is_logged_and_breaks_nothing_else(fresh, caplog):
    fresh.add("good", "pathlib:Path")
    fresh.add("broken", "no_such_module_anywhere:Thing")
    with caplog.at_level(logging.WARNING):
        assert list(fresh.load_all()) == ["good"]
    assert "'broken' cannot be loaded" in caplog.text


def test_missing_package_names_the_pip_command():
    with pytest.raises(MissingPackageError, match=r'pip install "mmrep\[graph\]"'):
        require("no_such_module_anywhere", "graph")


def test_everything_we_register_can_be_imported():
    for made in registry.REGISTRIES.values():
        loaded = made.load_all()
        assert sorted(loaded) == made.names(), made.group
        for name, cls in loaded.items():
            assert hasattr(cls, "Config"), f"{made.noun} {name} has no Config"


def test_listing_imports_no_component():
    code = (
        "import sys; from mmrep.registry import REGISTRIES; [r.names() for r in REGISTRIES.values()];"
        "heavy = {'torch', 'timm', 'open_clip', 'transformers', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_mmrep_imports_nothing_heavy():
    code = (
        "import sys, mmrep; heavy = {'timm', 'open_clip', 'sentence_transformers', 'transformers', 'datasets',"
        "'sklearn', 'faiss', 'matplotlib', 'torch'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_exist_and_a_wrong_one_has_a_near_match():
    import mmrep

    for name in mmrep.__all__:
        assert getattr(mmrep, name) is not None
    with pytest.raises(AttributeError, match="did you mean 'load'"):
        mmrep.laod  # noqa: B018


def test_a_package_that_comes_later_is_found(tmp_path, monkeypatch):
    """What is installed is looked up once, and again when a folder of packages changes."""
    things = Registry("test.later", "thing")
    assert things.names() == []
    monkeypatch.syspath_prepend(tmp_path)
    assert things.names() == []
    info = tmp_path / "later-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: later\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[test.later]\none = json:JSONDecoder\n")
    assert things.names() == ["one"]
